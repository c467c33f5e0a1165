"""Files: locks between processes, and a digest of tensors. A stand-in."""

import hashlib
import tempfile
from pathlib import Path

from filelock import FileLock
from torch import Tensor


def file_lock(path: str | Path, *, timeout: float = -1) -> FileLock:
    """A lock that one process at a time can hold for `path`; it is free again if that one dies.

    `timeout`: how many seconds to wait for it, −1 for as long as it takes; then filelock.Timeout.
    """
    # In the temporary folder: a mounted drive may know no locks.
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"network-slimming-{name}.lock", timeout=timeout)


def digest(tensors: tuple[Tensor, ...] | list[Tensor]) -> str:
    """A short fingerprint of tensors: their values, not where or how they lie in memory."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().cpu().contiguous().numpy())
    return sha.hexdigest()[:16]
