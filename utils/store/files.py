"""Files written whole or not at all, locks, and fingerprints. Knows no network."""

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

PAUSES = (0.1, 0.3, 1.0)
"""Seconds to wait before a refused replacement is tried again."""


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, in a folder that is made if need be: an interruption leaves
    the old file.

    Raises OSError if the folder can't be written to or the disk is full; the message names the
    absolute file and the way out.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two writers do not meet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        _replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path}: could not be written ({error.strerror or error}). What was there before is "
            "unchanged; make room or choose a folder that can be written to, and run again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, if all went well
            os.unlink(temporary)
    _sync_folder(path.parent)


def _replace(temporary: Path, path: Path) -> None:
    """os.replace; on Windows it is refused for as long as a virus scanner reads the old file."""
    for pause in PAUSES:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(pause)
    return os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself last; systems that can't sync a folder (Windows) do without."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def typed_path(typed: str, typed_in: str = "") -> Path:
    """The absolute path of a file or folder as people type it, perhaps with ~ or quotes around it;
    `typed_in` is the folder they typed it in, by default the current one."""
    unquoted = re.sub(r"""^(["'])(.+)\1$""", r"\2", typed.strip())
    unquoted = unquoted.rstrip('"')  # what is left of "C:\my images\" when Windows has read it
    return Path(os.path.abspath(os.path.join(typed_in, os.path.expanduser(unquoted))))


def write_json(path: str | Path, content: object) -> None:
    """`write_whole` for plain values, as JSON that reads well."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8"))


def json_digest(content: object) -> str:
    """A fingerprint of 16 hex digits of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_lock(path: str | Path, timeout: float = -1) -> FileLock:
    """A lock that one process of this user can hold for `path`; it is free again if that one dies.

    `timeout`: how many seconds to wait for it, −1 for as long as it takes; then filelock.Timeout.
    """
    # In the temporary folder: a mounted drive may know no locks. That folder may be shared, and the
    # lock file of another user can't be opened; Windows has one for each user.
    user = os.geteuid() if hasattr(os, "geteuid") else ""
    name = hashlib.sha256(f"{user} {Path(path).resolve()}".encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"network-slimming-{name}.lock", timeout=timeout)


@contextlib.contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Hold the lock for `path`; while another process holds it, wait, with a word."""
    lock = file_lock(path)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        where = Path(path).resolve()
        print(f"\n{where}: another process is still at this; waiting for it", file=sys.stderr)
        held = lock.acquire()
    with held:
        yield


def digest(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of 16 hex digits: equal for tensors of equal types, shapes and values, however
    they lie in memory and on whatever device."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(f"{t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
