"""Does mixed precision cost accuracy? The same trainings in float32 and in a lower precision.

    .venv/bin/python -m benchmarks.parity                                  # quick, minutes
    LAB_EPOCHS=4 .venv/bin/python -m benchmarks.parity --profile laptop    # a short CIFAR-10 run

The two agree if their means are no more than two standard errors apart. Four epochs are the fewest
in which the learning rate drops: before that, the test accuracy jumps by ten points an epoch.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from models.vgg import VGG
from utils.engine import pick_device
from utils.images.sources import load_data
from utils.profile import get_profile
from utils.run.machine import describe_machine
from utils.store.files import write_json
from utils.training import fit


def compare(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation for each precision, and how many standard errors lie between."""
    by_precision = runs.groupby("precision")
    table = by_precision.agg(["mean", "std"]).T.unstack()
    errors = by_precision.sem().pow(2).sum().pow(0.5)
    apart = by_precision.mean().diff().iloc[-1].abs() / errors
    table["standard errors apart", ""] = apart
    return table


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--precision", default="bfloat16", help="to hold against float32")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()

    device, profile = pick_device(), get_profile(options.profile)
    data = load_data(profile.data).to(device)
    kinds = [replace(profile, precision=kind) for kind in ("float32", options.precision)]
    rows = []
    for seed in range(1, options.seeds + 1):
        for kind in kinds:
            torch.manual_seed(seed)
            model = VGG(profile.cfg, num_classes=len(data.classes)).to(device)
            seeded = replace(kind, seed=seed)
            history = fit(model, data, seeded, l1_lambda=profile.l1_lambdas[1])
            last = {
                "training loss": history.train_loss[-1],
                "training accuracy (%)": history.train_accuracy[-1],
                "test accuracy (%)": history.test_accuracy[-1],
                "sparsity": history.sparsity[-1],
            }
            rows.append({"precision": kind.precision, "seed": seed, **last})
    print(f"{profile.name}, λ = {profile.l1_lambdas[1]:g}, {options.seeds} seeds, {data.name}")
    print(compare(pd.DataFrame(rows).drop(columns="seed")).round(3).to_string())
    report = {"machine": describe_machine(device), "profile": profile.name, "data": data.name}
    if options.out:
        write_json(options.out, report | {"runs": rows})


if __name__ == "__main__":
    main()
