"""Jobs that fail, kill their worker or wait; without torch, so that workers start fast."""

import os
import signal
import time
from pathlib import Path


def work(job: tuple[Path, str]) -> tuple[int, str | None]:
    """Note in a file of the folder that a worker has begun with the job, then do as it says."""
    note, what = job
    times = _begin(note)
    if (what == "kill" and times < 20) or (what == "kill once" and times == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        time.sleep(30)
        _begin(note)  # nobody ended it
    if what == "fail":
        raise ValueError("no")
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def _begin(note: Path) -> int:
    with open(note, "a") as file:
        file.write(f"{os.getpid()}\n")
    return note.read_text().count("\n")


def jobs(folder: Path, **what: str) -> dict[str, tuple[Path, str]]:
    return {name: (folder / name, how) for name, how in what.items()}


def begun(folder: Path) -> dict[str, int]:
    """How often each job was begun."""
    return {note.name: note.read_text().count("\n") for note in folder.iterdir()}


def pids(folder: Path) -> set[int]:
    return {int(pid) for note in folder.iterdir() for pid in note.read_text().split()}
