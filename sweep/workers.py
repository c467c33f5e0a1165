"""Where the tasks of a sweep are done: on this machine through joblib, or on a Dask cluster."""

import contextlib
import functools
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import joblib
import torch

from sweep.tasks import CELL, HandOut, Task, do
from utils.store.files import write_whole

KILLED = "its worker was killed again and again: is memory short?"
GIVE_UP = 3
"""Times in a row that a worker may be killed, with nothing done in between."""

PATIENCE = 10.0
"""Seconds in which a scheduler must answer."""


class SweepError(Exception):
    """A sweep that can't begin or go on; says why, and the way out."""


@contextlib.contextmanager
def hands(cluster: str) -> Iterator[tuple[HandOut, int]]:
    """Who does the tasks, and how many workers that are: this machine's cores, or a cluster's.

    `cluster`: the address of a Dask scheduler, or "". Raises SweepError if that can't be used.
    """
    if not cluster:
        # A GPU is busy with one.
        workers = 1 if torch.cuda.is_available() else joblib.cpu_count()
        yield functools.partial(on_this_machine, workers=workers), workers
        return
    with connect(cluster) as client:
        workers = check_workers(client, cluster)
        yield functools.partial(on_cluster, client), workers


def on_this_machine(
    tasks: list[Task], *, workers: int, call: Callable[[Task], dict] = do
) -> Iterator[dict]:
    """The rows of `tasks`, as they come, from processes of joblib's.

    If a worker is killed, what was under way is done again. After GIVE_UP times in a row the tasks
    go one by one, and the one whose worker is killed then is given up: its row says so.
    """
    waiting, killed = {task.cell: task for task in tasks}, 0
    while waiting:
        pool = joblib.Parallel(workers, batch_size=1, return_as="generator_unordered")
        chosen = list(waiting.values())[: 1 if killed == GIVE_UP else None]
        try:
            for row in pool(joblib.delayed(call)(task) for task in chosen):
                del waiting[tuple(row[name] for name in CELL)]
                killed = 0
                yield row
        except BrokenProcessPool:
            if killed == GIVE_UP:
                killed = 0
                del waiting[chosen[0].cell]
                yield chosen[0].row(reason=KILLED)
            else:
                killed += 1
                print("\na worker was killed: its task is done again", file=sys.stderr)


def connect(address: str):
    """The client of the Dask scheduler at `address`. Raises SweepError if none answers there."""
    try:
        from distributed import Client  # only a cluster needs it
    except ImportError:
        raise SweepError(
            f"LAB_CLUSTER = {address!r}: needs the package distributed; "
            "python -m pip install -r requirements-cluster.txt"
        ) from None
    try:
        return Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise SweepError(
            f"LAB_CLUSTER = {address!r}: no scheduler answers there ({error}). "
            "Start `python -m dask scheduler`, which says its address"
        ) from None


def check_workers(client, address: str) -> int:
    """How many workers there are. Raises SweepError if there is none, or one that has several
    threads or does not work in this folder: it can't import the lab, or misses a new file."""
    note, text = Path("checkpoints/shared_folder.txt"), uuid.uuid4().hex
    write_whole(note, text.encode())
    found = client.run(_read, note, on_error="return")
    note.unlink()
    threads = client.nthreads()
    wrong = [
        f"{worker} does not work in this folder ({t})" for worker, t in found.items() if t != text
    ]
    wrong += [f"{worker} has {n} threads" for worker, n in threads.items() if n > 1]
    if wrong or not threads:
        raise SweepError(
            f"LAB_CLUSTER = {address!r}: {'; '.join(wrong) or 'no worker yet'}. All machines work "
            "in one shared folder, this one. In it, start on each of them "
            f"`python -m dask worker {address} --nthreads 1 --nworkers <cores>`"
        )
    return len(threads)


def _read(note: Path) -> str:
    return note.read_text("utf-8")


def on_cluster(client, tasks: list[Task], call: Callable[[Task], dict] = do) -> Iterator[dict]:
    """The rows of `tasks`, as they come, from the workers of the cluster.

    Dask does the task of a worker that dies again; if that happens over and over, the row says so.
    """
    from distributed import as_completed

    of = {task.name: task for task in tasks}  # two sweeps with the same task share it
    # Batches: the first task is under way before the last is known.
    futures = client.map(call, tasks, key=list(of), batch_size=100)
    done = as_completed(futures, loop=client.loop, with_results=True, raise_errors=False)
    for future, row in done:
        if future.status == "error":
            kind, error, _ = row
            row = of[future.key].row(reason=f"{kind.__name__}: {error}")
        yield row
