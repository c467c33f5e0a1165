"""Many runs: every λ at every pruning ratio with several seeds, resumed by its files.

make sweep PROFILE=quick, or python -m sweep --profile quick --lambdas 0 1e-3 --seeds 1 2.
LAB_CLUSTER=tcp://host:8786 sends the tasks to a Dask cluster, whose machines all work in this very
folder (a shared one) with as many workers as cores, of one thread each (with GPUs: one for each
GPU, told apart by CUDA_VISIBLE_DEVICES). What comes out lies in figures/<profile>_sweep/.
"""

import argparse
import math
import os
import sys
from argparse import RawDescriptionHelpFormatter as RawDescription
from collections.abc import Sequence
from concurrent.futures import CancelledError, Executor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from models.vgg import VGG
from sweep.cluster import cluster
from sweep.page import TABLE, write_page, write_table
from sweep.tasks import Task, do, finished, planned
from utils.engine import pick_device, seconds_per_epoch
from utils.images.data import ImageData
from utils.images.sources import load_data
from utils.profile import Profile, default_profile, get_profile
from utils.run.identity import RunError, begin
from utils.run.workers import in_workers, workers_for

GRIDS = {"quick": ((0.0, 2e-3, 5e-3, 1e-2, 5e-2), (0.3, 0.5, 0.7, 0.8, 0.9))}
"""λ's and ratios where a profile's own are too few for a map."""


def plan(
    profile: str | None, lambdas: list[float] | None, ratios: list[float] | None, seeds: list[int]
) -> list[Profile]:
    """A profile for each seed; None: the profile's own. Raises ValueError before any work."""
    base = get_profile(profile)
    own = GRIDS.get(profile or default_profile(), (base.l1_lambdas, base.pruning_ratios))
    ratios = {*(ratios or own[1])} - {0}  # 0 is the trained network, in the table anyway
    base = replace(base, l1_lambdas=sorted({*(lambdas or own[0])}), pruning_ratios=sorted(ratios))
    return [replace(base, seed=s, name=f"{base.name}_sweep_seed_{s}") for s in sorted({*seeds})]


def forecast(tasks: list[Task], data: ImageData, workers: int) -> str:
    """What is planned, what of it is done, and how long the rest takes."""
    profile = tasks[0].run.profile
    said, epochs = [f"λ {profile.l1_lambdas}, pruning ratio {profile.pruning_ratios}"], 0
    for what, each in (("train", profile.epochs), ("cut", profile.finetune_epochs)):
        chosen = [task for task in tasks if bool(task.pruning_ratio) == (what == "cut")]
        done = sum(map(bool, map(finished, chosen)))
        epochs += math.ceil((len(chosen) - done) / workers) * each
        said.append(f"{len(chosen)} to {what} ({done} done), {each} epochs each")
    model = VGG(profile.cfg, num_classes=len(data.classes)).to(data.train_images.device)
    minutes = math.ceil(epochs * seconds_per_epoch(model, data, profile) / 60)
    said.append(f"at most {minutes} min with {workers} worker(s) (a slim network takes less)")
    return "\n".join(said)


def collect(tasks: list[Task], workers: int | Executor, folder: Path) -> None:
    """Do what is missing: the trainings, then the cuts of what could be trained."""
    rows = {task.cell: row for task in tasks if (row := finished(task))}
    write_table(rows.values(), folder / TABLE)
    with tqdm(total=len(tasks), initial=len(rows), unit="network", smoothing=0) as bar:
        for cut in (False, True):
            failed = {cell[::2] for cell, row in rows.items() if row["macs"] is None}  # (λ, seed)
            chosen = [t for t in tasks if t.cell not in rows and t.cell[::2] not in failed]
            missing = {t.cell: t for t in chosen if bool(t.pruning_ratio) == cut}
            for cell, row in in_workers(do, missing, workers=workers):
                if isinstance(row, BaseException):  # not kept: tried again next time
                    row = missing[cell].row(reason=f"{type(row).__name__}: {row}")
                rows[cell] = row
                write_table(rows.values(), folder / TABLE)
                bar.update()


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is missing of the sweep that `arguments` ask for; write the table and the page."""
    sys.stdout.reconfigure(encoding="utf-8")  # λ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawDescription)
    parser.add_argument("--profile", help="default: LAB_PROFILE, else quick, on a GPU cifar10")
    parser.add_argument("--lambdas", type=float, nargs="+", metavar="λ")
    parser.add_argument("--ratios", type=float, nargs="+", metavar="RATIO")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", default=(1, 2, 3))
    given, address = parser.parse_args(arguments), os.environ.get("LAB_CLUSTER")
    torch.set_num_threads(1)  # as in the workers: what is forecast here is true for them
    try:
        profiles, device = plan(**vars(given)), pick_device()
        own = workers_for(device)
        with cluster(address) if address else nullcontext((own, own)) as (workers, count):
            data = load_data(profiles[0].data).to(device)
            runs = [begin(profile, data, device, remember=False) for profile in profiles]
            tasks = planned(runs)
            print(forecast(tasks, data, count))
            folder = Path("figures") / runs[0].name.rsplit("_seed_", 1)[0]
            collect(tasks, workers, folder)
        write_page(folder, runs[0])
    except (ValueError, OSError, RunError) as error:
        sys.exit(str(error))
    except (CancelledError, KeyboardInterrupt):  # the former: a cluster's scheduler has gone
        sys.exit("\nstopped: run it again to go on")
    print(f"\nTable, figures and README.md: {folder}/")


if __name__ == "__main__":
    main()
