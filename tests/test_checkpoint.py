"""What was saved comes back, and nothing in a file is trusted. (Writing: test_files.py.)"""

import contextlib
import dataclasses
import errno
import io
import math
import os
import pickle
import random
import resource
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import HTML, Trap
from tiny import TINY_CFG, same, tiny_checkpoint, tiny_model

from models.vgg import VGG
from utils.store.checkpoint import FORMAT, Checkpoint, CheckpointError, load, save

COLUMNS = ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "sparsity")


OLD, NEW = tiny_checkpoint(seed=1), tiny_checkpoint(seed=2)
STATE = OLD.state_dict


def as_dict(**changes) -> dict:
    """The content of a sound file, changed by hand."""
    fields = {f.name: getattr(OLD, f.name) for f in dataclasses.fields(OLD)}
    return {"format": FORMAT, **fields} | changes


def saved_bytes(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


WHOLE = saved_bytes(as_dict())


def assert_refused(path: Path, *said: str, kind: str | None = None, content: object = None) -> str:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else saved_bytes(content))
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        load(path, kind)
    message = str(caught.value)
    assert all(part in message for part in (str(path), *said)), message
    assert path.read_bytes() == before
    return message


# --- what was saved comes back -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["λ=1e-4.pt", "with space.pt", "новая папка/网络.pt"])
def test_what_was_saved_comes_back_to_the_last_bit(tmp_path, name):
    save(tmp_path / name, NEW)
    assert same(load(tmp_path / name), NEW)
    assert same(load(str(tmp_path / name), kind="trained"), NEW)
    assert [f.name for f in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_equal_content_gives_equal_bytes(tmp_path):
    for name, content in {"a": tiny_checkpoint(1), "b": OLD, "c": NEW}.items():
        save(tmp_path / name, content)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_the_model_of_a_checkpoint_computes_what_the_saved_one_did(tmp_path):
    model, images = VGG(TINY_CFG, num_classes=7), torch.randn(4, 3, 32, 32)
    model(images)  # moves the running statistics
    save(tmp_path / "x.pt", Checkpoint("slim", model.cfg, model.state_dict()))
    found = load(tmp_path / "x.pt")
    assert found.num_classes == 7 and not found.model().training
    assert torch.equal(found.model()(images), model.eval()(images))


def test_another_kind_than_expected_is_named(tmp_path):
    save(tmp_path / "x.pt", OLD)
    said = assert_refused(tmp_path / "x.pt", "'trained'", "'slim'", "vggprune.ipynb", kind="slim")
    assert "Delete" not in said  # it is a sound file


@pytest.mark.parametrize(("kind", "said"), [("slim", "vggprune.ipynb"), (None, "the path")])
def test_a_missing_file_is_named_in_full(tmp_path, monkeypatch, kind, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load("none.pt", kind)
    assert str(tmp_path / "none.pt") in str(caught.value) and said in str(caught.value)


# --- writing -------------------------------------------------------------------------------------


def test_single_numbers_of_numpy_and_torch_come_back_as_plain_ones(tmp_path):
    settings = {
        "l1_lambda": np.logspace(-3, -2, 2)[0],
        "ratios": [np.float32(0.5), (np.int64(3), torch.tensor(0.25)), {"flip": np.bool_(True)}],
        "name": np.str_("quick"),
        "best": np.array(7),
    }
    history = {name: list(np.ones(2)) for name in COLUMNS}
    cfg = [np.int64(v) if v != "M" else v for v in TINY_CFG]
    save(tmp_path / "x.pt", dataclasses.replace(OLD, cfg=cfg, settings=settings, history=history))
    found = load(tmp_path / "x.pt")
    plain = {"l1_lambda": 0.001, "ratios": [0.5, (3, 0.25), {"flip": True}]}
    assert same(found.settings, plain | {"name": "quick", "best": 7})
    assert same(found.cfg, TINY_CFG) and same(found.history, {name: [1.0, 1.0] for name in COLUMNS})


def endless() -> list:
    endless = []
    endless.append([endless])
    return endless


NOT_KEPT = {
    "an array": ({"settings": {"ratios": np.ones(3)}}, "settings of ndarray"),
    "a tensor": ({"results": {"γ": [torch.ones(3)]}}, "results of Tensor"),
    "a path": ({"settings": {"data": Path("images")}}, "settings of"),
    "a function": ({"settings": {"penalty": lambda model: None}}, "settings of function"),
    "a date": ({"results": {"at": np.datetime64("2026-01-01")}}, "results of date"),
    "NaN": ({"state_dict": STATE | {"classifier.bias": torch.full([3], math.nan)}}, "finite"),
    "another cfg": ({"cfg": [3, 4, "M", 6]}, "cfg"),
    "one column": ({"history": {"lr": [0.1]}}, "history"),
}  # fmt: skip


@pytest.mark.parametrize("value", NOT_KEPT)
def test_what_could_not_be_loaded_again_is_not_written(tmp_path, value):
    changes, said = NOT_KEPT[value]
    save(tmp_path / "x.pt", OLD)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "x.pt", dataclasses.replace(NEW, **changes))
    assert str(tmp_path / "x.pt") in str(caught.value) and said in str(caught.value)
    assert same(load(tmp_path / "x.pt"), OLD) and len(list(tmp_path.iterdir())) == 1


def test_bytes_that_came_out_wrong_do_not_replace_the_file(tmp_path, monkeypatch):
    save(tmp_path / "x.pt", OLD)
    whole_save = torch.save

    def flipped_save(content, file):
        whole_save(content, file)
        file.getbuffer()[weights_at(file.getvalue())[3]] ^= 1

    monkeypatch.setattr(torch, "save", flipped_save)
    with pytest.raises(CheckpointError, match="checksum"):
        save(tmp_path / "x.pt", NEW)
    assert same(load(tmp_path / "x.pt"), OLD)


def test_a_disk_that_fails_is_a_checkpoint_error(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"/x\.pt: could not be written \(No space left"):
        save(tmp_path / "x.pt", NEW)


# --- reading: damaged files ----------------------------------------------------------------------

NO_ARCHIVES = {
    "empty": b"",
    "zeros": b"\0" * 5000,
    "HTML": HTML,
    "zip magic": b"PK\x03\x04",
    "zip without entries": b"PK\x05\x06" + bytes(18),
    "half a pickle": pickle.dumps({"cfg": 1})[:-3],
}


@pytest.mark.parametrize("content", NO_ARCHIVES)
def test_what_is_no_archive_is_deleted_only_where_it_should_be_ours(tmp_path, content):
    path, content = tmp_path / "x.pt", NO_ARCHIVES[content]
    assert "Delete" not in assert_refused(path, content=content)
    assert "Delete" not in assert_refused(path, kind="original lab")
    if content is not NO_ARCHIVES["half a pickle"]:
        assert_refused(path, "Delete or replace the file, and run vggprune.ipynb", kind="slim")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    for end in range(0, len(WHOLE), 397):
        assert_refused(tmp_path / "x.pt", content=WHOLE[:end])


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "x.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.pt: Is a directory"):
        load(tmp_path / "x.pt")


def largest_entry(whole: bytes) -> zipfile.ZipInfo:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return max(archive.infolist(), key=lambda e: ("/data/" in e.filename, e.file_size))


def weights_at(whole: bytes) -> range:
    """Where the largest tensor lies in the file."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        raw = archive.read(largest_entry(whole).filename)
    return range(whole.index(raw), whole.index(raw) + len(raw))


def flip(whole: bytes, at: int, bit: int = 0) -> bytes:
    broken = bytearray(whole)
    broken[at] ^= 1 << bit
    return bytes(broken)


def test_a_bit_flipped_in_a_weight_is_refused_by_its_checksum(tmp_path):
    for at in random.Random(0).sample(weights_at(WHOLE), 20):
        assert_refused(tmp_path / "x.pt", "checksum", content=flip(WHOLE, at))


def test_no_byte_of_the_zip_directory_changes_a_weight_unseen(tmp_path):
    path, name = tmp_path / "x.pt", largest_entry(WHOLE).filename.encode()
    end = WHOLE.rindex(name) + len(name)
    for at in range(WHOLE.rindex(b"PK\x01\x02", 0, end), end):
        path.write_bytes(flip(WHOLE, at, bit=at % 8))
        with contextlib.suppress(CheckpointError):
            assert same(load(path), OLD), f"byte {at}"


def test_a_damaged_file_with_a_sound_one_behind_it_is_refused(tmp_path):
    assert_refused(tmp_path / "x.pt", content=flip(WHOLE, weights_at(WHOLE)[10], bit=6) + WHOLE)


# --- reading: whole files that lie ---------------------------------------------------------------

GAMMA, VAR, CONV = "feature.1.weight", "feature.1.running_var", "feature.0.weight"
BIAS = "classifier.bias"
MOMENTUM = OLD.optimizer["momentum"]
SCALER = torch.amp.GradScaler("cpu").state_dict()


def state(**changes) -> dict:
    return as_dict(state_dict={k: v for k, v in (STATE | changes).items() if v is not None})


def full(name: str, value: float) -> torch.Tensor:
    return torch.full_like(STATE[name], value)


def momentum(*values, **changes) -> dict:
    return as_dict(optimizer={"momentum": list(values), "scaler": {}} | changes)


def history(**changes) -> dict:
    return as_dict(history=OLD.history | changes)


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


LIES = {
    "newer format": (as_dict(format=FORMAT + 1), f"format {FORMAT + 1}"),
    "older format": (as_dict(format=1), "format 1"),
    "format None": (as_dict(format=None), "format None"),
    "format a tensor": (as_dict(format=torch.zeros(2)), "format"),
    "unknown architecture": (as_dict(architecture="ResNet"), "'ResNet', known are VGG"),
    "architecture a list": (as_dict(architecture=["VGG"]), "architecture"),
    "unknown kind": (as_dict(kind="best"), "'best', known are trained, slim"),
    "kind a list": (as_dict(kind=["trained"]), "kind"),
    "no kind": ({k: v for k, v in as_dict().items() if k != "kind"}, "kind"),
    "a list": ([1, 2], "not a dictionary"),
    "a tensor": (torch.zeros(3), "not a dictionary"),
    "other cfg": (as_dict(cfg=[3, 4, "M", 6]), "cfg"),
    "longer cfg": (as_dict(cfg=[*TINY_CFG, 7]), "cfg"),
    "shorter cfg": (as_dict(cfg=TINY_CFG[:-1]), "cfg"),
    "empty cfg": (as_dict(cfg=[]), "cfg"),
    "cfg of text": (as_dict(cfg="MMM"), "VGG"),
    "cfg with a zero": (as_dict(cfg=[3, 0, "M", 5]), "0"),
    "cfg with a share": (as_dict(cfg=[3, 0.5, "M", 5]), "0.5"),
    "cfg with a tensor": (as_dict(cfg=[3, torch.tensor(4), "M", 5]), "cfg"),
    "cfg None": (as_dict(cfg=None), "VGG"),
    "gigantic cfg": (as_dict(cfg=[3, 10**7, 10**7]), "cfg"),
    "cfg beyond 64 bits": (as_dict(cfg=[3, 10**30]), "VGG"),
    "cfg of lists of lists": (as_dict(cfg=nested(60)), "cfg"),
    "no classifier": (state(**{BIAS: None}), "VGG"),
    "one layer missing": (state(**{GAMMA: None}), GAMMA),
    "a layer too many": (state(extra=torch.zeros(1)), "extra"),
    "a layer named 7": (as_dict(state_dict=STATE | {7: full(GAMMA, 1)}), "weights"),
    "other shape": (state(**{GAMMA: torch.ones(4)}), GAMMA),
    "weights of text": (state(**{GAMMA: "0.5"}), GAMMA),
    "no weights": (as_dict(state_dict=None), "weights"),
    "NaN weight": (state(**{CONV: full(CONV, torch.nan)}), CONV),
    "infinite γ": (state(**{GAMMA: full(GAMMA, torch.inf)}), GAMMA),
    "negative variance": (state(**{VAR: full(VAR, -1e-3)}), VAR),
    "sparse weight": (state(**{GAMMA: STATE[GAMMA].to_sparse()}), GAMMA),
    "weight on no device": (state(**{GAMMA: torch.ones(3, device="meta")}), GAMMA),
    "weight in 8 bits": (state(**{GAMMA: torch.ones(3).to(torch.float8_e4m3fn)}), GAMMA),
    "weight of integers": (state(**{GAMMA: torch.ones(3, dtype=torch.int64)}), GAMMA),
    "complex weight": (state(**{GAMMA: torch.ones(3, dtype=torch.complex64)}), GAMMA),
    "settings a list": (as_dict(settings=[]), "settings"),
    "a tensor among the settings": (as_dict(settings={"lr": [torch.tensor(0.1)]}), "settings"),
    "a tensor among the results": (as_dict(results={"accuracy": torch.ones(2)}), "results"),
    "a tensor as a name": (as_dict(settings={torch.tensor(1): 0}), "settings"),
    "a set among the settings": (as_dict(settings={"ratios": {0.5}}), "settings of set"),
    "settings without an end": (as_dict(settings={"x": (endless(), torch.ones(1))}), "settings"),
    "settings beyond counting": (as_dict(settings={"x": (nested(60), 1j)}), "settings of complex"),
    "history a list": (as_dict(history=[1.0]), "history"),
    "history not finite": (history(lr=[0.1, math.nan]), "history"),
    "history beyond floats": (history(lr=[0.1, 10**400]), "history"),
    "uneven history": (history(test_loss=[]), "history"),
    "history of text": (history(lr=["0.1", "0.1"]), "history"),
    "history of tensors": (history(lr=torch.zeros(2)), "history"),
    "history of one column": (as_dict(history={"lr": [0.1, 0.1]}), "history of ['lr']"),
    "a column too many": (history(f1=[0.5, 0.5]), "history"),
    "more epochs than its settings say": (as_dict(settings={"epochs": 1}), "2 epochs"),
    "epochs of text": (as_dict(settings={"epochs": "3"}), "epochs = '3'"),
    "a run cut off without a way to go on": (as_dict(optimizer={}), "optimizer"),
    "optimizer a list": (as_dict(optimizer=[1]), "optimizer"),
    "optimizer without a scaler": (as_dict(optimizer={"momentum": MOMENTUM}), "optimizer"),
    "optimizer without momentum": (as_dict(optimizer={"scaler": {}}), "optimizer"),
    "scaler of nothing known": (momentum(*MOMENTUM, scaler={"x": 1.0}), "scaler"),
    "scaler of text": (momentum(*MOMENTUM, scaler=SCALER | {"scale": "65536"}), "scaler"),
    "scaler a number": (momentum(*MOMENTUM, scaler=1.0), "scaler"),
    "momentum missing": (momentum(*MOMENTUM[:-1]), "momentum"),
    "momentum not finite": (momentum(*MOMENTUM[:-1], full(BIAS, math.nan)), "not finite"),
    "momentum of another": (momentum(*MOMENTUM[::-1]), "momentum"),
    "momentum a number": (momentum(momentum=0.9), "momentum"),
    "sparse momentum": (momentum(MOMENTUM[0].to_sparse(), *MOMENTUM[1:]), "momentum"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_whole_file_that_does_not_fit_is_refused(tmp_path, lie):
    content, said = LIES[lie]
    assert_refused(tmp_path / "x.pt", said, content=content)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_without_a_shape_is_refused(tmp_path):
    odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])
    for content in (state(**{GAMMA: odd}), {"state_dict": STATE | {CONV: odd}}, {"x": odd}):
        assert_refused(tmp_path / "x.pt", content=content)


def test_a_run_in_float16_and_a_finished_one_come_back(tmp_path):
    float16 = dataclasses.replace(OLD, optimizer={"momentum": MOMENTUM, "scaler": SCALER})
    finished = dataclasses.replace(OLD, settings={"epochs": 2}, optimizer={})
    for content in (float16, finished):
        save(tmp_path / "x.pt", content)
        assert same(load(tmp_path / "x.pt"), content)


# --- reading: files of others --------------------------------------------------------------------

POOLED = [4, "M", 5, 6, "M", "M", 7]
THEIRS = tiny_model(3, cfg=POOLED).state_dict()


def renamed(front: str) -> dict:
    return {front + name: value for name, value in THEIRS.items()}


def of(number: type) -> list:
    """The cfg, its widths as another type of number."""
    return [v if v == "M" else number(v) for v in POOLED]


READ = {
    "original lab": {"cfg": POOLED, "state_dict": THEIRS},
    "before torch 0.4.1": {
        "cfg": POOLED,
        "state_dict": {k: v for k, v in THEIRS.items() if "num_batches" not in k},
    },
    "DataParallel": {"cfg": POOLED, "state_dict": renamed("module.")},
    "DataParallel and compiled": {"cfg": POOLED, "state_dict": renamed("module._orig_mod.")},
    "training of the original lab": {
        "epoch": 160,
        "state_dict": OrderedDict(THEIRS),
        "best_prec1": torch.tensor(93.5),
        "optimizer": {"param_groups": [{"lr": 0.1}]},
    },
    "bare weights": THEIRS,
    "bare weights of DataParallel": renamed("module."),
    "cfg of whole floats": {"cfg": of(float), "state_dict": THEIRS},
    "cfg of tensors": {"cfg": tuple(of(torch.tensor)), "state_dict": THEIRS},
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_files_of_others_are_read(tmp_path, name):
    torch.save(READ[name], tmp_path / "x.pt")
    found = load(tmp_path / "x.pt", kind="original lab")
    assert same(found.cfg, POOLED)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.model()(images), tiny_model(3, cfg=POOLED).eval()(images))


RENAMED = {k.replace("feature", "features"): v for k, v in THEIRS.items()}
TOLD = {
    "torch before 1.6": (
        saved_bytes(READ["original lab"], _use_new_zipfile_serialization=False),
        ("before 1.6", "weights_only=True"),
    ),
    "a whole model": (saved_bytes(tiny_model()), ("models.vgg.VGG", "state_dict()")),
    "a whole model before 1.6": (
        saved_bytes(tiny_model(), _use_new_zipfile_serialization=False),
        ("models.vgg.VGG", "state_dict()"),
    ),
    "a whole model, pickled": (pickle.dumps(tiny_model()), ("models.vgg.VGG", "state_dict()")),
    "weights, pickled": (pickle.dumps(READ["original lab"], 2), ("pickle", "torch.save(")),
    "cfg of numpy": (saved_bytes({"cfg": of(np.int64), "state_dict": THEIRS}), ("numpy", "int(v)")),
    "cfg of shares": (saved_bytes({"cfg": [0.5, 1.0], "state_dict": THEIRS}), ("0.5",)),
    "another network": (saved_bytes(RENAMED), ("features.0.weight", "feature.0.weight")),
    "another dictionary": (saved_bytes({"net": THEIRS, "acc": 1}), ("'net', 'acc'", "state_dict")),
    "weights that are none": (saved_bytes({"cfg": POOLED, "state_dict": [1]}), ("state_dict",)),
    "in half precision": (
        saved_bytes({k: v.half() if v.is_floating_point() else v for k, v in THEIRS.items()}),
        ("float16", "float32"),
    ),
    "pools without end": (saved_bytes({"feature.999.weight": torch.ones(4, 3, 3, 3)}), ("VGG",)),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_files_that_can_not_be_read_say_what_they_are(tmp_path, name):
    content, said = TOLD[name]
    message = assert_refused(tmp_path / "x.pt", *said, content=content)
    assert "Delete" not in message and "weights_only=False" not in message


def test_the_advice_for_files_before_torch_1_6_works(tmp_path):
    path, new_path = tmp_path / "old.pt", tmp_path / "new.pt"
    path.write_bytes(TOLD["torch before 1.6"][0])
    torch.save(torch.load(path, map_location="cpu", weights_only=True), new_path)
    assert load(new_path).cfg == POOLED


# --- reading: files that attack ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["whole", "settings", "state_dict", "cfg", "results", "pickle"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path, place, zipped):
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    trap = Trap(canary)
    content = trap if place in ("whole", "pickle") else as_dict(**{place: {"x": trap}})
    whole = saved_bytes(content, _use_new_zipfile_serialization=zipped)
    assert_refused(path, "mkdir", content=pickle.dumps(trap) if place == "pickle" else whole)
    assert not canary.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert canary.exists(), "the trap was none"


def test_a_zip_bomb_is_refused_before_it_inflates(tmp_path, monkeypatch):
    path, plain = tmp_path / "x.pt", saved_bytes({"x": torch.zeros(2**18)})
    with (
        zipfile.ZipFile(io.BytesIO(plain)) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
            bomb.infolist()[-1].external_attr = 0  # in nothing else unlike what torch writes
    assert path.stat().st_size < len(plain) / 100
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("it inflates"))
    assert_refused(path, "not an archive as torch writes it")


def test_a_small_tensor_that_claims_to_be_huge_is_refused_in_little_memory(tmp_path):
    # One number, repeated by a stride of 0: 14 GB of weights in a file of a few kB.
    width = 20_000
    huge = {
        name: torch.zeros((), dtype=v.dtype).expand([width if n == 5 else n for n in v.shape])
        for name, v in tiny_model(cfg=[5, 5]).state_dict().items()
    }
    whole = saved_bytes({"cfg": [width, width], "state_dict": huge})
    assert len(whole) < 20_000
    (tmp_path / "x.pt").write_bytes(whole)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, before[1]))
    try:
        assert_refused(tmp_path / "x.pt", "fewer numbers than its shape says")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
