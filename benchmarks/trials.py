"""How to cut, and to fine-tune: ways to a ratio, judged on training images that were held out.

    .venv/bin/python -m benchmarks.trials                      # quick, minutes
    .venv/bin/python -m benchmarks.trials --profile laptop     # hours; goes on where it was stopped
    .venv/bin/python -m benchmarks.trials --help               # another ratio, some of the ways

A fifth of the training images takes the place of the test images, so that what is chosen here can
still be tested on those. Each way changes one thing of a single cut as the profile has it (a
schedule goes with its lr). A gain counts if it is larger than two standard errors of its mean over
the seeds.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from models.vgg import VGG
from utils.cost import macs
from utils.engine import pick_device
from utils.images.data import ImageData
from utils.images.sources import load_data
from utils.profile import Profile, get_profile
from utils.pruning import PruningPlan, plan_pruning
from utils.run import lab, tuning
from utils.run.identity import Run, begin
from utils.run.machine import describe_machine
from utils.store.files import write_json

BASE = "one cut"
UNPENALIZED = "one cut of λ = 0"
SAME_MACS = "the same MACs, twice the floor"


def ways(profile: Profile) -> dict[str, dict]:
    """What each way changes in `profile`. (UNPENALIZED cuts another network, SAME_MACS cuts by MACs
    instead of by channels, so that what a higher floor keeps is not taken from other layers.)"""
    once: dict = {"multipass_ratios": ()}
    hardest, epochs = max(profile.pruning_ratios), profile.finetune_epochs
    floor = profile.min_channels
    milder = [round(share * hardest, 2) for share in (0.78, 0.92)]  # 0.7 and 0.83 before 0.9
    faster = {"finetune_lr": 2 * profile.finetune_lr}
    half = {f"a floor of {floor // 2}": once | {"min_channels": floor // 2}} if floor > 1 else {}
    return {
        BASE: once,
        SAME_MACS: once | {"min_channels": 2 * floor},  # right after it: those MACs
        f"a floor of {2 * floor}": once | {"min_channels": 2 * floor},
        **half,
        "no crop": once | {"crop_padding": 0},
        "schedule: step, lr 0.1": once | {"finetune_schedule": "step", "finetune_lr": 0.1},
        "twice the lr": once | faster,
        "weight decay 5e-4": once | {"finetune_weight_decay": 5e-4},
        "twice the lr, weight decay 5e-4": once | faster | {"finetune_weight_decay": 5e-4},
        "distillation 0.5": once | {"distillation": 0.5},
        f"{3 * epochs} epochs": once | {"finetune_epochs": 3 * epochs},
        UNPENALIZED: once,
        "two passes": {"multipass_ratios": (milder[0], hardest)},
        "three passes": {"multipass_ratios": (*milder, hardest)},
    }


def reached(
    run: Run, data: ImageData, l1_lambda: float, network: VGG, dense: VGG | None,
    plan: PruningPlan | None,
) -> dict:  # fmt: skip
    """The accuracy on the held-out images of what one way, the profile of `run`, makes of
    `network`, and its cost; cut by `plan`, if there is one, instead of by the profile's ratios."""
    profile = run.profile
    ratios = profile.multipass_ratios or (max(profile.pruning_ratios),)
    if plan:
        network = lab.cut_on(run, data, network, plan)
    else:
        *_, (_, network, _) = tuning.in_passes(run, data, network, l1_lambda, ratios)
    tuned = tuning.finetune(run, data, network, teacher=dense, label=run.name)
    return {
        "accuracy (%)": tuned.history.test_accuracy[-1],
        "MACs (M)": macs(network) / 1e6,
        "epochs after the first cut": (len(ratios) - 1) * profile.epochs + profile.finetune_epochs,
    }


def one_seed(
    profile: Profile,
    held: ImageData,
    device: torch.device,
    l1_lambda: float,
    chosen: dict[str, dict],
) -> list[dict]:
    """A row for each way of `chosen`, all of networks trained with the profile's seed."""
    named = replace(profile, name=f"{profile.name}_trials_seed_{profile.seed}")
    run = begin(named, held, device, remember=False)
    sparse = lab.train(run, held, l1_lambda).model
    needs_dense = UNPENALIZED in chosen or any("distillation" in way for way in chosen.values())
    dense = lab.train(run, held, 0.0).model if needs_dense else None
    rows = []
    for way, change in chosen.items():
        # The passes share their first training; no other files of theirs have the same name.
        shared = "passes" if change.get("multipass_ratios") else way
        folder = re.sub(r"\W+", "_", f"{run.name} {shared}")
        network = dense if way == UNPENALIZED else sparse
        plan = None
        try:
            of_its_own = replace(run, profile=replace(run.profile, name=folder, **change))
            if way == SAME_MACS:
                share = rows[-1]["MACs (M)"] * 1e6 / macs(sparse)
                plan = plan_pruning(sparse, macs=share, min_channels=change["min_channels"])
        except ValueError as error:  # a floor that forbids the cut
            print(f"{way}: left out, {error}")
            continue
        found = reached(of_its_own, held, l1_lambda, network, dense, plan)
        rows.append({"way": way, "seed": profile.seed, **found})
    return rows


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation of each way, and its gain over BASE in standard errors of that gain."""
    accuracy = rows.pivot(index="seed", columns="way", values="accuracy (%)")[rows["way"].unique()]
    gain = accuracy.sub(accuracy[BASE], axis=0)
    table = rows.groupby("way", sort=False).mean(numeric_only=True).drop(columns="seed")
    table["± (standard deviation)"] = accuracy.std()
    table["gain"] = gain.mean()
    table["gain in standard errors"] = gain.mean() / gain.sem()
    return table


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--l1-lambda", type=float, help="default: the profile's second")
    parser.add_argument("--ratio", type=float, help="default: the profile's hardest")
    parser.add_argument("--ways", nargs="+", help=f"default: all; {BASE!r} is always one")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 100), metavar="N")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    given = parser.parse_args()
    profile, device = get_profile(given.profile), pick_device()
    l1_lambda = profile.l1_lambdas[1] if given.l1_lambda is None else given.l1_lambda
    if given.ratio is not None:
        profile = replace(profile, pruning_ratios=(given.ratio,))
    known = ways(profile)
    asked = {BASE, *(given.ways or known)}
    if unknown := asked - known.keys():
        parser.error(f"--ways: {', '.join(sorted(unknown))}: must be of: {', '.join(known)}")
    chosen = {way: change for way, change in known.items() if way in asked}
    data = load_data(profile.data).to(device)
    held = data.hold_out(len(data.train_labels) // 5)
    rows = []
    for seed in range(1, given.seeds + 1):
        rows += one_seed(replace(profile, seed=seed), held, device, l1_lambda, chosen)
    ratio = max(profile.pruning_ratios)
    print(f"{profile.name}, {ratio:.0%} of λ = {l1_lambda:g}, {given.seeds} seeds, {held.name}")
    print(compare(pd.DataFrame(rows)).round(2).to_string())
    report = {
        "machine": describe_machine(device), "profile": profile.name, "data": held.name,
        "l1_lambda": l1_lambda, "pruning_ratio": ratio,
    }  # fmt: skip
    if given.out:
        write_json(given.out, report | {"runs": rows})


if __name__ == "__main__":
    main()
