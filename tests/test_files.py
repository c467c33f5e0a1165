"""A file is written whole or not at all; a lock is one user's; a digest is of values."""

import errno
import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from faults import Moments
from filelock import Timeout

from utils.store.files import digest, file_lock, write_whole

OLD, NEW = b"old " * 3000, b"new " * 3000


def raising(error: BaseException):
    def action():
        raise error

    return action


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("before", [OLD, None])
def test_stopped_at_any_moment_the_file_is_the_old_or_the_new(tmp_path, monkeypatch, error, before):
    path, found = tmp_path / "x", []
    for at in range(1, 50):
        path.write_bytes(before) if before else path.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            moments = Moments(patch, raising(error), at)
            try:
                write_whole(path, NEW)
            except (KeyboardInterrupt, OSError) as caught:
                if isinstance(caught, OSError):
                    assert str(path) in str(caught) and "No space left" in str(caught)
        found.append(path.read_bytes() if path.exists() else None)
        assert found[-1] in (before, NEW), moments.met[-1]
        assert [f for f in tmp_path.iterdir() if f != path] == [], "a temporary file is left"
        if moments.left > 0:
            break
    assert {"half written", "before fsync", "before replace", "after replace"} <= set(moments.met)
    assert found == sorted(found, key=[before, NEW].index) and set(found) == {before, NEW}


@pytest.mark.parametrize("refusals", [2, 100])
def test_a_file_that_a_scanner_holds_is_replaced_a_moment_later(tmp_path, monkeypatch, refusals):
    path, replace, tries = tmp_path / "x", os.replace, []
    path.write_bytes(OLD)

    def held(*args):
        tries.append(args)
        if len(tries) <= refusals:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(*args)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    if refusals == 2:
        write_whole(path, NEW)
        assert path.read_bytes() == NEW
    else:  # it is held for good
        with pytest.raises(OSError, match=r"Access is denied.*unchanged"):
            write_whole(path, NEW)
        assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        path = disk / "deeper" / "x"
        write_whole(path, OLD)
        (disk / "filler").write_bytes(bytes(44 * 1024))
        with pytest.raises(OSError, match=r"deeper/x: .*No space left.*unchanged; make room"):
            write_whole(path, NEW)
        assert path.read_bytes() == OLD and list(path.parent.iterdir()) == [path]
        (disk / "filler").unlink()
        write_whole(path, NEW)
        assert path.read_bytes() == NEW
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def folder():
    """A folder that another user may enter and not write to; we are that user, if we were root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


@pytest.fixture
def as_nobody():
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


def test_a_read_only_folder_leaves_the_file_before(folder, as_nobody):
    write_whole(folder / "x", OLD)
    as_nobody()
    with pytest.raises(OSError, match=r"/x: could not be written \(Permission denied\).*choose"):
        write_whole(folder / "x", NEW)
    assert (folder / "x").read_bytes() == OLD and list(folder.iterdir()) == [folder / "x"]


def test_a_quota_leaves_the_file_before(tmp_path):
    write_whole(tmp_path / "x", OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"/x: could not be written \(File too large\)"):
            write_whole(tmp_path / "x", NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "x").read_bytes() == OLD and list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_folder_that_is_a_file_or_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(OSError) as caught:
        write_whole("file/x", OLD)
    assert f"{tmp_path}/file/x: could not be written" in str(caught.value)
    write_whole("new/folder/x", OLD)
    assert (tmp_path / "new" / "folder" / "x").read_bytes() == OLD


def test_one_holds_the_lock_of_a_file_however_its_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with file_lock(tmp_path / "x"):
        with pytest.raises(Timeout):
            file_lock("./x", timeout=0).acquire()
        with file_lock(tmp_path / "y", timeout=0):
            pass
    with file_lock("x", timeout=0):
        assert list(tmp_path.iterdir()) == []


def test_the_lock_file_of_another_user_is_in_nobodys_way(folder, as_nobody, monkeypatch):
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with file_lock("x"):
        pass
    assert len(list(folder.iterdir())) == 1  # root's, which nobody else may open
    as_nobody()
    with file_lock("x", timeout=0):
        pass


def test_a_digest_is_of_types_shapes_and_values():
    values = torch.arange(6.0).view(2, 3)
    strided = torch.stack([values, values], dim=2)[..., 0]
    assert not strided.is_contiguous()
    assert digest([values]) == digest((strided,)) == digest(iter([values.clone()]))
    assert len(digest([values])) == 16 and int(digest([values]), 16) >= 0
    changed = values.clone()
    changed[1, 2] += 1e-6
    others = [
        [changed],
        [values.T],
        [values.flatten()],
        [values.double()],
        [*values],
        [],
        [values] * 2,
    ]
    assert len({digest(t) for t in [[values], *others]}) == 8
    exotic = [
        torch.tensor(3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor(True),
    ]
    assert digest(exotic) != digest(exotic[:3])
