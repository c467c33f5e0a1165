"""A checkpoint is written whole or not at all, and nothing in a file is trusted."""

import contextlib
import dataclasses
import errno
import io
import os
import pickle
import random
import resource
import shutil
import subprocess
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import HTML, TINY_CFG, Trap, damage, interrupt_save, run, same, tiny_checkpoint

from models.vgg import VGG
from utils import checkpoint
from utils.checkpoint import FORMAT, Checkpoint, CheckpointError, load, load_all, save

OLD, NEW = tiny_checkpoint(seed=1), tiny_checkpoint(seed=2)


def saved_bytes(content: Checkpoint) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "x.pt"), content)
        return Path(folder, "x.pt").read_bytes()


def as_dict(**changes) -> dict:
    """The content of a sound file, changed by hand."""
    fields = {f.name: getattr(OLD, f.name) for f in dataclasses.fields(OLD)}
    return {"format": FORMAT, **fields} | changes


def assert_refused(path: Path, *said: str) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert all(part in str(caught.value) for part in (str(path), *said))
    assert path.read_bytes() == before


# --- what was saved comes back -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["λ=1e-4.pt", "with space.pt", "новая папка/网络.pt"])
def test_what_was_saved_comes_back_to_the_last_bit(tmp_path, name):
    save(tmp_path / name, NEW)
    assert same(load(tmp_path / name), NEW)
    assert same(load(str(tmp_path / name), kind="trained"), NEW)
    assert [f.name for f in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_equal_content_gives_equal_bytes():
    assert saved_bytes(tiny_checkpoint(seed=1)) == saved_bytes(OLD) != saved_bytes(NEW)


def test_the_model_of_a_checkpoint_computes_what_the_saved_one_did(tmp_path):
    model = VGG(TINY_CFG, num_classes=7)
    images = torch.randn(4, 3, 32, 32)
    model(images)  # moves the running statistics
    save(tmp_path / "x.pt", Checkpoint("slim", model.cfg, model.state_dict()))
    found = load(tmp_path / "x.pt")
    assert found.num_classes == 7 and not found.model().training
    assert torch.equal(found.model()(images), model.eval()(images))


def test_a_file_of_the_original_lab_loads(tmp_path):
    model = VGG(TINY_CFG)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    for name, content in {"new": model.state_dict(), "before torch 0.4.1": state}.items():
        torch.save({"cfg": TINY_CFG, "state_dict": content}, tmp_path / name)
        found = load(tmp_path / name, kind="original lab")
        assert found.cfg == TINY_CFG and same(
            found.state_dict["classifier.weight"], model.classifier.weight.data
        )


def test_another_kind_than_expected_is_named(tmp_path):
    save(tmp_path / "x.pt", OLD)
    with pytest.raises(CheckpointError, match=r"x\.pt.*'trained'.*'slim'"):
        load(tmp_path / "x.pt", kind="slim")


def test_a_missing_file_says_which_notebook_to_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pt.*vggprune\.ipynb"):
        load(tmp_path / "none.pt", kind="slim")
    with pytest.raises(CheckpointError, match=r"none\.pt"):
        load(tmp_path / "none.pt")


def test_load_all_takes_one_kind_made_with_these_data(tmp_path):
    with pytest.raises(CheckpointError, match=r"no trained network.*sparsity_train\.ipynb"):
        load_all(tmp_path, "trained", data="digits 12")
    for name in ("trained_b", "trained_a", "slim_a"):
        kind = name.split("_")[0]
        settings = {"data": "digits 12", "l1_lambda": name}
        save(tmp_path / f"{name}.pt", dataclasses.replace(OLD, kind=kind, settings=settings))
    found = load_all(tmp_path, "trained", data="digits 12")
    assert [c.settings["l1_lambda"] for c in found] == ["trained_a", "trained_b"]
    with pytest.raises(CheckpointError, match=r"trained_a\.pt.*'digits 12'.*'digits 34'"):
        load_all(tmp_path, "trained", data="digits 34")


def test_networks_that_differ_in_more_than_lambda_are_not_compared(tmp_path):
    for l1_lambda, lr in ((0.0, 0.1), (0.001, 0.2)):
        settings = {"data": "digits 12", "l1_lambda": l1_lambda, "lr": lr}
        content = dataclasses.replace(OLD, settings=settings)
        save(tmp_path / f"trained_lambda_{l1_lambda:g}.pt", content)
    with pytest.raises(
        CheckpointError, match=r"_0\.pt.* lr = 0\.1, trained_lambda_0\.001\.pt.*0\.2"
    ):
        load_all(tmp_path, "trained", data="digits 12")


# --- writing: whole or not at all ----------------------------------------------------------------


def assert_old_or_new(path: Path, old: bytes | None, new: bytes) -> None:
    found = path.read_bytes() if path.exists() else None
    assert found in (old, new), "neither the old file nor the new one"
    if found is not None:
        load(path)


def _full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _stop_button() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize(
    ("action", "expected"), [(_stop_button, KeyboardInterrupt), (_full_disk, CheckpointError)]
)
def test_interrupted_at_any_line_the_file_is_the_old_or_the_new(
    tmp_path, there_before, action, expected
):
    path, old, new = tmp_path / "x.pt", saved_bytes(OLD), saved_bytes(NEW)
    reached, left = set(), []
    for line in range(1, 200):
        path.write_bytes(old) if there_before else path.unlink(missing_ok=True)
        # In a thread: an exception out of a tracer leaves traces in the state of its thread.
        with contextlib.suppress(expected, OSError), ThreadPoolExecutor(1) as thread:
            if not thread.submit(interrupt_save, path, NEW, line, action).result():
                break
        assert_old_or_new(path, old if there_before else None, new)
        reached.add(path.exists() and path.read_bytes() == new)
        left += [line for file in tmp_path.iterdir() if file != path]
    assert line > 15 and reached == {True, False}
    assert len(left) <= 4  # only the lines that are about to remove it


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_call_that_fails_is_named_and_leaves_the_file_before(tmp_path, monkeypatch, call):
    path = tmp_path / "x.pt"
    save(path, OLD)
    before = path.read_bytes()

    def fail(*_, **__):
        _full_disk()

    if call in ("open", "write"):
        opened = fail if call == "open" else lambda *_: _Full()
        monkeypatch.setattr(checkpoint, "open", opened, raising=False)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=r"x\.pt.*No space left"):
        save(path, NEW)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class _Full(io.BytesIO):
    def write(self, _):
        _full_disk()


@pytest.mark.parametrize("room", [None, "mkdir"])
def test_a_disk_that_is_really_full(tmp_path, room):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        path = disk / ("deeper" if room else "") / "x.pt"
        save(path, OLD)
        before = path.read_bytes()
        (disk / "filler").write_bytes(bytes(64 * 1024 - 4096 * (2 + len(before) // 4096)))
        with pytest.raises(CheckpointError, match=r"x\.pt.*No space left.*unchanged"):
            save(path, NEW)
        assert path.read_bytes() == before
        assert list(path.parent.glob("*.tmp")) == []
        (disk / "filler").unlink()
        save(path, NEW)
        assert same(load(path), NEW)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _save_with_quota(path: Path, said: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    _save_and_say(path, said)


def _save_as_nobody(path: Path, said: Path) -> None:
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)  # root may write anywhere
    try:
        _save_and_say(path, None)
    except CheckpointError as error:
        if os.getuid() == 0:
            os.seteuid(0)
        said.write_text(str(error))


def _save_and_say(path: Path, said: Path | None) -> None:
    try:
        save(path, NEW)
    except CheckpointError as error:
        if said is None:
            raise
        said.write_text(str(error))


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [(_save_with_quota, "File too large"), (_save_as_nobody, "Permission denied")],
)
def test_a_quota_and_a_read_only_folder_leave_the_file_before(attempt, reason):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        folder.mkdir()
        path, said = folder / "x.pt", Path(name) / "said"
        save(path, OLD)
        before = path.read_bytes()
        Path(name).chmod(0o755)
        if attempt is _save_as_nobody:
            folder.chmod(0o555)
        assert run(attempt, path, said) == 0
        assert str(path) in said.read_text() and reason in said.read_text()
        assert path.read_bytes() == before
        assert list(folder.iterdir()) == [path]
        folder.chmod(0o755)


def test_a_folder_that_is_a_file_or_gone(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/x\.pt: could not be written"):
        save(tmp_path / "file" / "x.pt", OLD)
    save(tmp_path / "new" / "folder" / "x.pt", OLD)  # a folder that vanished is made again
    assert same(load(tmp_path / "new" / "folder" / "x.pt"), OLD)


# --- reading: damaged files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 5000, HTML, b"PK\x03\x04", b"PK\x05\x06" + bytes(18), pickle.dumps({"cfg": 1})],
    ids=["empty", "zeros", "HTML", "zip magic", "zip without entries", "pickle"],
)
def test_what_is_no_archive_of_torch_is_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert_refused(path, "Delete or replace")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole, path = saved_bytes(OLD), tmp_path / "x.pt"
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        assert_refused(path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load(tmp_path / "x.pt")


def weights_at(whole: bytes) -> range:
    """Where the largest tensor lies in the file."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = max(archive.infolist(), key=lambda e: ("/data/" in e.filename, e.file_size))
        raw = archive.read(entry)
    return range(whole.index(raw), whole.index(raw) + len(raw))


def flip(whole: bytes, at: int, bit: int = 0) -> bytes:
    broken = bytearray(whole)
    broken[at] ^= 1 << bit
    return bytes(broken)


def test_a_bit_flipped_in_a_weight_is_refused_by_its_checksum(tmp_path):
    whole, path = saved_bytes(OLD), tmp_path / "x.pt"
    for at in random.Random(0).sample(weights_at(whole), 20):
        path.write_bytes(flip(whole, at))
        assert_refused(path, "checksum")


def test_no_bit_of_the_zip_directory_changes_a_weight_unseen(tmp_path):
    whole, path = saved_bytes(OLD), tmp_path / "x.pt"
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = max(archive.infolist(), key=lambda e: ("/data/" in e.filename, e.file_size))
    end = whole.rindex(entry.filename.encode()) + len(entry.filename)
    for at in range(whole.rindex(b"PK\x01\x02", 0, end), end):
        for bit in range(8):
            path.write_bytes(flip(whole, at, bit))
            with contextlib.suppress(CheckpointError):
                assert same(load(path), OLD), f"bit {bit} of byte {at}"


def test_a_damaged_file_with_a_sound_one_behind_it_gives_no_damaged_weights(tmp_path):
    whole, path = saved_bytes(OLD), tmp_path / "x.pt"
    path.write_bytes(flip(whole, weights_at(whole)[10], bit=6) + whole)
    with contextlib.suppress(CheckpointError):
        assert same(load(path), OLD)


def test_two_files_spliced_give_an_error_or_one_of_the_two(tmp_path):
    a, b, path = saved_bytes(OLD), saved_bytes(NEW), tmp_path / "x.pt"
    draw = random.Random(0)
    for _ in range(50):
        at = draw.randrange(len(a))
        path.write_bytes(a[:at] + b[at:])
        with contextlib.suppress(CheckpointError):
            found = load(path)
            assert same(found, OLD) or same(found, NEW)


def test_the_damage_of_the_long_run_is_damage():
    a, b, draw = saved_bytes(OLD), saved_bytes(NEW), random.Random(0)
    results = [damage(a, b, draw) for _ in range(200)]
    assert all(content not in (a, b) for _, content in results)
    assert len({what.split()[0] for what, _ in results}) >= 6


# --- reading: whole files that lie ---------------------------------------------------------------

STATE = OLD.state_dict
GAMMA, VAR, CONV = "feature.1.weight", "feature.1.running_var", "feature.0.weight"
MOMENTUM = OLD.optimizer["momentum"]


def state(**changes) -> dict:
    return {"state_dict": STATE | changes}


def full(name: str, value: float) -> torch.Tensor:
    return torch.full_like(STATE[name], value)


LIES = {
    "newer format": (as_dict(format=FORMAT + 1), f"format {FORMAT + 1}"),
    "format None": (as_dict(format=None), "format None"),
    "unknown kind": (as_dict(kind="best"), "'best'"),
    "kind a list": (as_dict(kind=["trained"]), "kind"),
    "no kind": ({k: v for k, v in as_dict().items() if k != "kind"}, "kind"),
    "a list": ([1, 2], "not a dictionary"),
    "a tensor": (torch.zeros(3), "not a dictionary"),
    "a bare state": (STATE, "'cfg'"),
    "other cfg": (as_dict(cfg=[3, 4, "M", 6]), "cfg"),
    "longer cfg": (as_dict(cfg=[*TINY_CFG, 7]), "cfg"),
    "shorter cfg": (as_dict(cfg=TINY_CFG[:-1]), "cfg"),
    "empty cfg": (as_dict(cfg=[]), "cfg"),
    "cfg of text": (as_dict(cfg="MMM"), "VGG"),
    "cfg with a zero": (as_dict(cfg=[3, 0, "M", 5]), "0"),
    "cfg with a share": (as_dict(cfg=[3, 0.5, "M", 5]), "0.5"),
    "cfg None": (as_dict(cfg=None), "VGG"),
    "gigantic cfg": (as_dict(cfg=[3, 10**7, 10**7]), "cfg"),
    "cfg beyond 64 bits": (as_dict(cfg=[3, 10**30]), "VGG"),
    "no classifier": (
        as_dict(state_dict={k: v for k, v in STATE.items() if "classifier" not in k}),
        "VGG",
    ),
    "one layer missing": (
        as_dict(state_dict={k: v for k, v in STATE.items() if k != GAMMA}),
        GAMMA,
    ),
    "a layer too many": (as_dict(**state(extra=torch.zeros(1))), "extra"),
    "other shape": (as_dict(**state(**{GAMMA: torch.ones(4)})), GAMMA),
    "weights of text": (as_dict(**state(**{GAMMA: "0.5"})), "weights"),
    "no weights": (as_dict(state_dict=None), "weights"),
    "NaN weight": (as_dict(**state(**{CONV: full(CONV, torch.nan)})), CONV),
    "infinite γ": (as_dict(**state(**{GAMMA: full(GAMMA, torch.inf)})), GAMMA),
    "negative variance": (as_dict(**state(**{VAR: full(VAR, -1e-3)})), VAR),
    "sparse weight": (as_dict(**state(**{GAMMA: STATE[GAMMA].to_sparse()})), GAMMA),
    "settings a list": (as_dict(settings=[]), "settings"),
    "history a list": (as_dict(history=[1.0]), "history"),
    "history not finite": (as_dict(history={"lr": [0.1, float("nan")]}), "history"),
    "uneven history": (as_dict(history={"lr": [0.1], "test_loss": []}), "history"),
    "history of text": (as_dict(history={"lr": ["0.1"]}), "history"),
    "momentum missing": (as_dict(optimizer={"momentum": MOMENTUM[:-1]}), "optimizer"),
    "momentum not finite": (
        as_dict(optimizer={"momentum": [*MOMENTUM[:-1], full("classifier.bias", torch.nan)]}),
        "optimizer",
    ),
    "momentum of another": (as_dict(optimizer={"momentum": MOMENTUM[::-1]}), "optimizer"),
    "momentum a number": (as_dict(optimizer={"momentum": 0.9}), "optimizer"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_whole_file_that_does_not_fit_is_refused(tmp_path, lie):
    content, said = LIES[lie]
    torch.save(content, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", said)


EXOTIC = {
    "weight on no device": as_dict(**state(**{GAMMA: torch.ones(3, device="meta")})),
    "weight in 8 bits": as_dict(**state(**{GAMMA: torch.ones(3).to(torch.float8_e4m3fn)})),
    "weight of integers": as_dict(**state(**{GAMMA: torch.ones(3, dtype=torch.int64)})),
    "complex weight": as_dict(**state(**{GAMMA: torch.ones(3, dtype=torch.complex64)})),
    "sparse momentum": as_dict(optimizer={"momentum": [MOMENTUM[0].to_sparse(), *MOMENTUM[1:]]}),
    "format a tensor": as_dict(format=torch.zeros(2)),
    "history of tensors": as_dict(history={"lr": torch.zeros(2)}),
}


@pytest.mark.parametrize("lie", EXOTIC)
def test_a_tensor_of_an_exotic_type_is_refused(tmp_path, lie):
    torch.save(EXOTIC[lie], tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt")


# --- reading: files that attack ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["whole", "settings", "state_dict", "cfg", "results"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path, place, zipped):
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    trap = Trap(canary)
    content = trap if place == "whole" else as_dict(**{place: {"x": trap}})
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_refused(path)
    assert not canary.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert canary.exists(), "the trap was none"


def test_a_bare_pickle_with_code_is_never_run(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "canary")))
    assert_refused(path)
    assert not (tmp_path / "canary").exists()


def test_a_zip_bomb_is_refused_before_it_inflates(tmp_path):
    path, plain = tmp_path / "x.pt", io.BytesIO()
    torch.save({"cfg": TINY_CFG, "state_dict": {"x": torch.zeros(40 * 2**20)}}, plain)
    with (
        zipfile.ZipFile(plain) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
            bomb.infolist()[-1].external_attr = 0  # in nothing else unlike what torch writes
    assert path.stat().st_size < 2**18
    assert run(_load_in_little_memory, path) == 0


def _load_in_little_memory(path: Path) -> None:
    """Ends well if load() refuses the file and needs next to no memory for that."""

    def most_used() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = most_used()
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))  # spare the machine
    with pytest.raises(CheckpointError):
        load(path)
    assert most_used() - before < 64 * 2**20


def test_a_small_tensor_that_claims_to_be_huge_is_refused_in_little_memory(tmp_path):
    width = 20_000
    with torch.device("meta"):
        claimed = VGG([width, width], num_classes=3).state_dict()
    # One number, repeated by a stride of 0: 14 GB of weights in a file of a few kB.
    huge = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in claimed.items()}
    content = {"cfg": [width, width], "state_dict": huge}
    torch.save(content, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 20_000
    assert run(_load_in_little_memory, tmp_path / "x.pt") == 0
