"""The workers of a Dask cluster, once it is sure that they can do the tasks of a sweep."""

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from utils.store.files import write_whole

PATIENCE = 10.0
"""Seconds in which a scheduler must have answered."""


@contextlib.contextmanager
def cluster(address: str) -> Iterator[tuple[Executor, int]]:
    """The workers of the Dask scheduler at `address`, and how many they are. Raises ValueError if
    none answers there, or its workers can't do the tasks."""
    named = f"LAB_CLUSTER = {address!r}"
    try:
        from distributed import Client, rpc  # only a cluster needs it
    except ImportError:
        get = "python -m pip install -r requirements-cluster.txt"
        raise ValueError(f"{named}: needs the package distributed; {get}") from None

    async def meet() -> None:  # Dask itself shakes hands without a limit
        async with rpc(address, timeout=PATIENCE / 2) as scheduler:
            if (kind := (await scheduler.identity())["type"]) != "Scheduler":
                raise ValueError(f"it is the address of a {kind}")

    try:
        asyncio.run(asyncio.wait_for(meet(), PATIENCE))
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except Exception as error:  # whatever answers there, and however it does
        why = " ".join(f"{error}".split()) or f"no answer in {PATIENCE:g} s"
        why += "; 8787 is its dashboard's port, its own is 8786" if ":8787" in address else ""
        start = "Start `python -m dask scheduler`, which says its address (tcp://host:8786)"
        raise ValueError(f"{named}: no scheduler to work with ({why}). {start}") from None
    with client:
        if wrong := _wrong(client):
            raise ValueError(
                f"{named}: {wrong}. All machines work in one shared folder, this one. In it, start "
                f"on each of them `python -m dask worker {address} --nthreads 1 --nworkers <cores>`"
            )
        yield client.get_executor(), len(client.nthreads())


def _wrong(client) -> str:
    """Which workers have several threads, or are not in this folder and so miss new files."""
    note, text = Path("checkpoints/shared_folder.txt"), uuid.uuid4().hex
    write_whole(note, text.encode())
    found, threads = client.run(Path.read_text, note, on_error="return"), client.nthreads()
    note.unlink()
    wrong = [f"{k} does not work in this folder ({t})" for k, t in found.items() if t != text]
    wrong += [f"{k} has {n} threads" for k, n in threads.items() if n > 1]
    return "; ".join(wrong) if threads else "no worker yet"
