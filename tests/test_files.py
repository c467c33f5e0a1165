"""A file is written whole or not at all; one process writes it; a digest is of values."""

import encodings.ascii  # noqa: F401 (filelock's; nobody may not read the library to load it later)
import errno
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from faults import Moments
from filelock import FileLock
from processes import start

from utils.store import files
from utils.store.files import InUse, digest, one_at_a_time, write_whole

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
        with pytest.raises(OSError, match=r"deeper/x: .*No space left.*unchanged"):
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
    with pytest.raises(OSError, match=r"/x: could not be written \(Permission denied\)"):
        write_whole(folder / "x", NEW)
    assert (folder / "x").read_bytes() == OLD and list(folder.iterdir()) == [folder / "x"]


def test_a_name_too_long_is_told_as_that(tmp_path):
    name = "網" * 100  # 300 bytes
    with pytest.raises(
        OSError, match=rf"/{name}: could not be written \(File name too long\)"
    ) as e:
        write_whole(tmp_path / name, NEW)
    assert str(e.value).endswith("is unchanged.")  # another folder would not help
    with pytest.raises(OSError, match="too long"), one_at_a_time(tmp_path / name):
        write_whole(tmp_path / name, NEW)


def test_a_quota_leaves_the_file_before(tmp_path):
    write_whole(tmp_path / "x", OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"/x: could not be written \(File too large\).*ed\.$"):
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


# --- locks ---------------------------------------------------------------------------------------


def hold(path: Path, ready: Path, temporary_folder: Path) -> None:
    tempfile.tempdir = str(temporary_folder)  # of another machine that shares only the lab's folder
    with one_at_a_time(path):
        ready.touch()
        while ready.exists():
            time.sleep(0.01)


@pytest.fixture
def another(tmp_path):
    """Starts a process that holds the lock of a file, and has a temporary folder of its own."""
    children, ready = [], tmp_path / "ready"
    (tmp_path / "theirs").mkdir()

    def start_one(path: Path):
        children.append(start(hold, path, ready, tmp_path / "theirs"))
        while not ready.exists():
            assert children[-1].is_alive()
            time.sleep(0.01)
        return children[-1], ready

    yield start_one
    for child in children:
        child.kill()
        child.join()


def test_machines_that_share_a_folder_share_its_locks(tmp_path, another, monkeypatch):
    (tmp_path / "lab").mkdir()
    monkeypatch.chdir(tmp_path / "lab")
    child, _ = another(tmp_path / "lab" / "x")
    for same_file in ("x", Path("../lab/x"), str(tmp_path / "lab" / "x")):
        with pytest.raises(InUse), one_at_a_time(same_file, wait=False):
            pass
    with one_at_a_time("y", wait=False):  # another file is free
        pass
    child.kill()
    child.join()
    with one_at_a_time("x", wait=False):  # a lock dies with its process
        assert [f.name for f in Path().iterdir()] == [".locks"]


def test_who_waits_is_told_and_goes_on(tmp_path, another, monkeypatch):
    said, (_, ready) = [], another(tmp_path / "x")

    def say(text, **_):
        said.append(text)
        ready.unlink()  # the other one is done

    monkeypatch.setattr(files, "print", say, raising=False)
    with one_at_a_time(tmp_path / "x"):
        assert len(said) == 1 and f"{tmp_path}/x: another process" in said[0]


@pytest.mark.parametrize("error", [OSError(errno.ENOTSUP, "no"), NotImplementedError("no flock")])
def test_a_drive_that_knows_no_locks_has_them_in_the_temporary_folder(tmp_path, monkeypatch, error):
    drive, here = tmp_path / "drive", tmp_path / "here"
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    acquire = FileLock.acquire

    def only_here(lock, *args, **options):
        if str(lock.lock_file).startswith(str(drive)):
            raise error
        return acquire(lock, *args, **options)

    monkeypatch.setattr(FileLock, "acquire", only_here)
    with one_at_a_time(drive / "x"):
        assert len(list(here.iterdir())) == 1
        with pytest.raises(InUse), one_at_a_time(drive / "x", wait=False):
            pass
        with one_at_a_time(drive / "y", wait=False):
            pass


def test_the_lock_file_of_another_user_is_in_nobodys_way(folder, as_nobody, monkeypatch):
    temporary, lab = folder / "tmp", folder / "lab"
    temporary.mkdir()
    temporary.chmod(0o1777)
    lab.mkdir(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with one_at_a_time(lab / "x"):
        assert list(temporary.iterdir()) == []
    as_nobody()
    with one_at_a_time(lab / "x", wait=False), one_at_a_time(lab / "y", wait=False):
        assert len(list(temporary.iterdir())) == 2  # nobody can write to lab
    os.seteuid(0)
    os.seteuid(65533)
    with one_at_a_time(lab / "y", wait=False):  # and this one can't open what is nobody's
        pass


def test_who_holds_the_lock_removes_what_a_killed_writer_of_this_machine_left(tmp_path):
    left = tmp_path / f"[x].{platform.node()}.99999.tmp"
    others = [
        tmp_path / n for n in ("[x].other-host.1.tmp", f"x.{platform.node()}.1.tmp", "[x].bak")
    ]
    for file in [left, *others]:
        file.write_text("half a file")
    with one_at_a_time(tmp_path / "[x]"):
        assert {*tmp_path.iterdir()} == {*others, tmp_path / ".locks"}


# --- fingerprints --------------------------------------------------------------------------------


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
        [values.view(torch.int32)],
        [*values],
        [],
        [values] * 2,
    ]
    assert len({digest(t) for t in [[values], *others]}) == 9
    exotic = [
        torch.tensor(3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor(True),
    ]
    assert digest(exotic) != digest(exotic[:3])
