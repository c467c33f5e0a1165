"""Files written whole or not at all, one writer at a time, and fingerprints. Knows no network."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor


class InUse(Exception):
    """Another process writes this file; the message names it and the way out."""


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, in a folder that is made if need be.

    Raises OSError if the disk refuses, naming the absolute file; the old file is then as it was.
    """
    path = Path(os.path.abspath(path))
    # Two writers do not meet: two machines that share the folder may have processes of one number.
    temporary = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        for pause in (0.1, 0.3, 1.0):  # on Windows a virus scanner may still read the old file
            with contextlib.suppress(PermissionError):
                os.replace(temporary, path)
                break
            time.sleep(pause)
        else:
            os.replace(temporary, path)
    except OSError as error:
        what = f"{path}: could not be written ({error.strerror or error})"
        raise OSError(f"{what}. What was there before is unchanged.") from error
    finally:
        with contextlib.suppress(OSError):  # gone already, if all went well
            os.unlink(temporary)
    with contextlib.suppress(OSError):  # the new name itself; Windows can't sync a folder
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def one_at_a_time(path: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `path`: one process is inside, of all machines that share its folder. It is
    free again when that process ends, however it ends, and what it left half written is removed.

    While another is inside, wait, with a word; without `wait` raise InUse.
    """
    path = Path(path).resolve()
    try:  # beside the file, so that machines that share the folder share the lock
        held = _lock(path.parent / ".locks" / path.name, path, wait)
    except (OSError, NotImplementedError):
        # A folder that can't be written to, or a mounted drive that knows no locks: one for this
        # machine, and for this user, for nobody can open the lock file of another.
        user = getattr(os, "geteuid", int)()  # Windows has a temporary folder for each user
        name = hashlib.sha256(f"{user} {path}".encode()).hexdigest()[:16]
        held = _lock(Path(tempfile.gettempdir(), f"network-slimming-{name}.lock"), path, wait)
    with held:
        for left in path.parent.glob(f"{glob.escape(f'{path.name}.{platform.node()}')}.*.tmp"):
            with contextlib.suppress(OSError):
                left.unlink()
        yield


def _lock(place: Path, path: Path, wait: bool) -> AcquireReturnProxy:
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Timeout):
        return FileLock(place).acquire(timeout=0)
    busy = f"{path}: another process is writing this file now (it holds {place})"
    if not wait:
        raise InUse(f"{busy}. Stop that one or wait for it, or set run_name: a run of its own.")
    print(f"\n{busy}; waiting for it", file=sys.stderr)
    return FileLock(place).acquire()


def write_json(path: str | Path, content: object) -> None:
    """`write_whole` for plain values, as JSON that reads well."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def digest(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of 16 hex digits: equal for tensors of equal types, shapes and values, however
    they lie in memory and on whatever device."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(f"{t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
