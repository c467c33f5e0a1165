"""Recipes, judged on training images that were held out: how to train, to cut and to fine-tune.

    .venv/bin/python -m benchmarks.trials                      # quick, minutes
    .venv/bin/python -m benchmarks.trials --profile laptop     # hours; goes on where it was stopped
    .venv/bin/python -m benchmarks.trials --set "width=0.5, weight_decay=2e-4"   # train otherwise
    .venv/bin/python -m benchmarks.trials --ways "distillation=0.5" "min_channels=8, same_macs=True"

A fifth of the training images takes the place of the test images, so that what is chosen here can
still be tested on those. Each way changes settings of a single cut as the profile has it:
`same_macs` cuts by MACs, to as many as that one has, so that what a higher floor keeps is not taken
from other layers; `l1_lambda` cuts another network. A gain counts if it is larger than two standard
errors of its mean over the seeds.
"""

import argparse
import ast
import functools
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
from utils.profile import FIELDS, Profile, get_profile
from utils.run import lab, tuning
from utils.run.identity import Run, begin
from utils.run.machine import describe_machine
from utils.store.files import write_json
from utils.training import evaluate

TRAINED, BASE = "as trained", "one cut"


def settings(text: str) -> dict:
    """What "width=0.5, multipass_ratios=(0.7, 0.9)" says. Raises ValueError for anything else."""
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        if call.args:
            raise SyntaxError
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, AttributeError):
        raise ValueError(f"{text!r}: must be settings, as in width=0.5, nesterov=True") from None


def ways(profile: Profile) -> list[str]:
    """Ways to cut and to fine-tune that are tried if none is named."""
    hardest, floor = max(profile.pruning_ratios), profile.min_channels
    milder = [round(share * hardest, 2) for share in (0.78, 0.92)]  # 0.7 and 0.83 before 0.9
    return [
        f"min_channels={2 * floor}, same_macs=True",
        f"min_channels={2 * floor}",
        *([f"min_channels={floor // 2}"] if floor > 1 else []),
        "crop_padding=0",
        f"finetune_lr={2 * profile.finetune_lr:g}",
        f"finetune_lr={profile.finetune_lr / 2:g}",
        "finetune_weight_decay=1e-4",
        "distillation=0.5",
        f"finetune_epochs={3 * profile.finetune_epochs}",
        "l1_lambda=0",
        f"multipass_ratios={(milder[0], hardest)}",
        f"multipass_ratios={(*milder, hardest)}",
    ]


def one_seed(
    profile: Profile, held: ImageData, device: torch.device, l1_lambda: float, chosen: list[str]
) -> list[dict]:
    """A row for the trained network, for a single cut of it, and for each of the ways `chosen`."""
    run = begin(profile, held, device, remember=False)
    network_of = functools.cache(lambda k: lab.train(run, held, k))
    sparse = network_of(l1_lambda)
    trained = {
        "accuracy (%)": sparse.history.test_accuracy[-1],
        "MACs (M)": _macs(sparse.model, held),
    }
    rows = [{"way": TRAINED, **trained, "sparsity": sparse.history.sparsity[-1]}]
    for way in (BASE, *chosen):
        change = {"multipass_ratios": ()} | ({} if way == BASE else settings(way))
        share = rows[1]["MACs (M)"] / trained["MACs (M)"] if change.pop("same_macs", 0) else None
        k = change.pop("l1_lambda", l1_lambda)
        try:
            of_its_own = replace(run, profile=replace(run.profile, **change))
            dense = network_of(0.0).model if of_its_own.profile.distillation else None
            found = _reached(of_its_own, held, k, network_of(k).model, dense, share)
        except ValueError as error:  # a floor that forbids the cut
            print(f"{way}: left out, {error}")
        else:
            rows.append({"way": way, **found})
    return [row | {"seed": profile.seed} for row in rows]


def _reached(
    run: Run, data: ImageData, l1_lambda: float, network: VGG, dense: VGG | None,
    share: float | None,
) -> dict:  # fmt: skip
    """What one way, the profile of `run`, makes of `network` on the held-out images, and its cost;
    cut to a `share` of the MACs, if one is given."""
    profile = run.profile
    ratios = profile.multipass_ratios or (max(profile.pruning_ratios),)
    if share:
        network = lab.cut_on(run, data, network, lab.plan_cut(run, data, network, macs=share))
    else:
        *_, (_, network, _) = tuning.in_passes(run, data, network, l1_lambda, ratios)
    cut = evaluate(network, data.plain_batches("test", profile.test_batch_size))
    tuned = tuning.finetune(run, data, network, teacher=dense, label=run.name)
    return {
        "accuracy (%)": tuned.history.test_accuracy[-1],
        "MACs (M)": _macs(network, data),
        "epochs after the first cut": (len(ratios) - 1) * profile.epochs + profile.finetune_epochs,
        "repaired (%)": cut.accuracy,
    }


def _macs(network: VGG, data: ImageData) -> float:
    return macs(network, data.input_shape) / 1e6


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--set", default="", help="settings that take the place of the profile's")
    parser.add_argument("--l1-lambda", type=float, help="default: the profile's second")
    parser.add_argument("--ratio", type=float, help="default: the profile's hardest")
    parser.add_argument("--ways", nargs="*", help="settings that each way changes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    given = parser.parse_args()
    try:  # before anything is trained
        profile = get_profile(given.profile, **settings(given.set))
        if given.ratio is not None:
            profile = replace(profile, pruning_ratios=(given.ratio,))
        chosen = ways(profile) if given.ways is None else given.ways
        for way in chosen:
            if unknown := settings(way).keys() - {*FIELDS, "same_macs", "l1_lambda"}:
                raise ValueError(f"{way!r}: {', '.join(unknown)} is no setting of a profile")
    except ValueError as error:
        parser.error(str(error))
    device = pick_device()
    recipe = re.sub(r"\W+", "_", f"{profile.name} {given.set}").strip("_")
    l1_lambda = profile.l1_lambdas[1] if given.l1_lambda is None else given.l1_lambda
    data = load_data(profile.data).to(device)
    held = data.hold_out(len(data.train_labels) // 5)
    rows = []
    for seed in given.seeds:
        of_seed = replace(profile, name=f"{recipe}_trials_seed_{seed}", seed=seed)
        rows += one_seed(of_seed, held, device, l1_lambda, chosen)
    ratio = max(profile.pruning_ratios)
    print(f"{recipe}, {ratio:.0%} of λ = {l1_lambda:g}, seeds {given.seeds}, {held.name}")
    print(compare(pd.DataFrame(rows)).round(2).to_string())
    report = {
        "machine": describe_machine(device), "profile": recipe, "data": held.name,
        "l1_lambda": l1_lambda, "pruning_ratio": ratio,
    }  # fmt: skip
    if given.out:
        write_json(given.out, report | {"runs": rows})


if __name__ == "__main__":
    main()
