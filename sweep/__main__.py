"""Many runs: every λ at every pruning ratio with several seeds, resumed by its files.

make sweep PROFILE=quick, or python -m sweep --profile quick --lambdas 0 1e-3 --seeds 1 2.
LAB_CLUSTER=tcp://host:8786 sends the tasks to a Dask cluster, whose machines all work in this very
folder (a shared one) with as many workers as cores, of one thread each (with GPUs: one for each
GPU, told apart by CUDA_VISIBLE_DEVICES). What comes out lies in figures/<profile>_sweep/:
results.csv, its figures, README.md.
"""

import argparse
import math
import os
import sys
import time
from argparse import RawDescriptionHelpFormatter as RawDescription
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from models.vgg import VGG
from sweep.page import TABLE, write_page, write_table
from sweep.tasks import HandOut, Task, finished, missing_rows, planned
from sweep.workers import SweepError, hands
from utils.engine import seconds_per_epoch
from utils.images.data import ImageData
from utils.images.sources import load_data
from utils.profile import Profile, default_profile, get_profile
from utils.run.identity import Run, RunError, begin
from utils.run.machine import pick_device
from utils.run.results import markdown

GRIDS = {"quick": ((0.0, 2e-3, 5e-3, 1e-2, 5e-2), (0.3, 0.5, 0.7, 0.8, 0.9))}
"""λ's and ratios where a profile's own are too few for a map."""
SEEDS = (1, 2, 3)


def plan(
    profile: str | None,
    lambdas: Sequence[float] | None = None,
    ratios: Sequence[float] | None = None,
    seeds: Sequence[int] = SEEDS,
) -> list[Profile]:
    """A profile for each seed. Raises ValueError that names what is wrong, before any work."""
    name = profile or default_profile()
    base = get_profile(name)
    grid = GRIDS.get(name, (base.l1_lambdas, base.pruning_ratios))
    base = replace(
        base,
        l1_lambdas=sorted(grid[0] if lambdas is None else lambdas),
        pruning_ratios=sorted(grid[1] if ratios is None else ratios),
    )
    if 0 in base.pruning_ratios:
        raise ValueError("ratios: 0 is the trained network, in the table anyway; leave it out")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds = {list(seeds)}: must be one or more, all different")
    return [replace(base, seed=s, name=f"{base.name}_sweep_seed_{s}") for s in sorted(seeds)]


def planned_work(tasks: list[Task], data: ImageData, workers: int) -> str:
    """What is planned, what of it is done, and how long the rest takes."""
    profile = tasks[0].run.profile
    seeds = sorted({task.run.profile.seed for task in tasks})
    rows, epochs = [], 0
    for kind in ("train", "cut and fine-tune"):
        wanted = [task for task in tasks if bool(task.pruning_ratio) == (kind != "train")]
        missing = sum(finished(task) is None for task in wanted)
        rows.append(
            {"task": kind, "networks": len(wanted), "done": len(wanted) - missing}
            | {"epochs of each": _epochs(wanted[0])}
        )
        epochs += missing * _epochs(wanted[0])
    model = VGG(profile.cfg, num_classes=len(data.classes)).to(data.train_images.device)
    minutes = epochs * seconds_per_epoch(model, data, profile) / 60 / workers
    return (
        f"λ {_listed(profile.l1_lambdas)} · pruning ratios {_listed(profile.pruning_ratios)} · "
        f"seeds {_listed(seeds)}\n{markdown(pd.DataFrame(rows).set_index('task'))}\n"
        f"at most {math.ceil(minutes)} min with {workers} worker(s) (a slim network takes less)\n"
    )


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _epochs(task: Task) -> int:
    profile = task.run.profile
    return profile.finetune_epochs if task.pruning_ratio else profile.epochs


def collect(runs: list[Run], hand_out: HandOut, folder: Path) -> None:
    """Do what is missing; results.csv in `folder` grows as the rows come."""
    tasks = planned(runs)
    rows = [row for task in tasks if (row := finished(task))]
    epochs = {task.pruning_ratio: _epochs(task) for task in tasks}
    total = sum(epochs[task.pruning_ratio] for task in tasks)
    done = sum(epochs[row["pruning_ratio"]] for row in rows)
    written = time.monotonic()
    # smoothing: the time left from the mean speed
    with tqdm(total=total, initial=done, unit="epoch", smoothing=0) as bar:
        for row in missing_rows(runs, hand_out):
            rows.append(row)
            bar.set_description(f"{len(rows)} of {len(tasks)} networks")
            bar.update(epochs[row["pruning_ratio"]])
            if time.monotonic() - written > 1:
                write_table(rows, folder / TABLE)
                written = time.monotonic()
    write_table(rows, folder / TABLE)


def sweep(profiles: list[Profile], cluster: str = "") -> Path:
    """Do what is missing, write the table and the page; the folder where they are."""
    torch.set_num_threads(1)  # as in the workers: what is forecast here is true for them
    folder = Path("figures") / profiles[0].name.rsplit("_seed_", 1)[0]
    with hands(cluster) as (hand_out, workers):
        data = load_data(profiles[0].data).to(pick_device())
        device = data.train_images.device
        runs = [begin(profile, data, device, remember=False) for profile in profiles]
        print(planned_work(planned(runs), data, workers))
        collect(runs, hand_out, folder)
    write_page(folder, runs[0])
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescription)
    parser.add_argument("--profile", help="default: LAB_PROFILE, else quick, on a GPU cifar10")
    parser.add_argument("--lambdas", type=float, nargs="*", metavar="λ")
    parser.add_argument("--ratios", type=float, nargs="*", metavar="RATIO")
    parser.add_argument("--seeds", type=int, nargs="*", metavar="SEED", default=SEEDS)
    given = parser.parse_args(arguments)
    try:
        profiles = plan(given.profile, given.lambdas, given.ratios, given.seeds)
        folder = sweep(profiles, os.environ.get("LAB_CLUSTER", ""))
    except (ValueError, OSError, RunError, SweepError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped: run it again to go on")
    print(f"\nTable, figures and README.md: {folder}/")


if __name__ == "__main__":
    main()
