"""How to cut to 90 %: in which passes, with which floor? Chosen on held-out training images.

    LAB_DATA=path/to/cifar10 .venv/bin/python -m benchmarks.choices     # two hours on two cores

5,000 training images are held out and the rest trains, so the test images stay unseen by the
choice. Finished trainings are kept in checkpoints/choices/, and an interrupted run goes on.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch

from models.vgg import VGG
from utils.compensation import absorb_bias, recalibrate_bn
from utils.config import get_profile
from utils.data import load_data
from utils.machine import describe_machine, pick_device
from utils.pruning import plan_pruning, slim
from utils.training import evaluate, fit

HELD_OUT = 5_000
CANDIDATES = [
    # the passes, and the channels that every layer keeps
    ((0.7, 0.9), 2),
    ((0.7, 0.9), 4),
    ((0.7, 0.84, 0.9), 2),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/choices.json"))
    options = parser.parse_args()

    device, profile = pick_device(), get_profile(options.profile)
    data = load_data(profile.data).to(device).hold_out(HELD_OUT)
    held = list(data.plain_batches("test", profile.test_batch_size))
    calibration = data.calibration_batches(
        seed=profile.seed, crop_padding=profile.crop_padding, flip=profile.flip
    )
    l1_lambda = profile.l1_lambdas[1]
    folder = Path("checkpoints/choices")
    torch.manual_seed(profile.seed)
    start = VGG(profile.cfg, num_classes=len(data.classes)).to(device)
    total = sum(v for v in start.cfg if v != "M")

    rows = []
    for passes, floor in CANDIDATES:
        network, name = start, profile.name
        for ratio in passes:
            network = slim(network, plan_pruning(network, 0))  # a copy: `fit` trains in place
            fit(network, data, profile, l1_lambda=l1_lambda, checkpoint=folder / f"{name}.pt")
            kept = total - round(total * ratio)
            left = sum(v for v in network.cfg if v != "M")
            plan = plan_pruning(network, 1 - kept / left, min_channels=floor)
            network = recalibrate_bn(slim(absorb_bias(network, plan), plan), calibration)
            name += f"_{ratio:g}_floor_{floor}"
        cfg, right_after = network.cfg, evaluate(network, held).accuracy
        file = folder / f"{name}_finetuned.pt"
        history = fit(network, data, profile.for_finetuning(), checkpoint=file, kind="finetuned")
        row = {"passes": ", ".join(f"{100 * r:g}%" for r in passes), "floor": floor}
        row |= {"right after": right_after, "held out (%)": history.test_accuracy[-1]}
        rows.append(row | {"cfg": cfg})
        print(f"{row['passes']}, floor {floor}: {history.test_accuracy[-1]:.2f} %")
    print(pd.DataFrame(rows).drop(columns="cfg").to_string(index=False))
    report = {"machine": describe_machine(device), "profile": profile.name, "data": data.name}
    report |= {"λ": l1_lambda, "seed": profile.seed, "candidates": rows}
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
