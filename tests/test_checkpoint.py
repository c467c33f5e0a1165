"""What was saved comes back, and nothing in a file is trusted. (Writing and locks: test_files.py.)

The library itself reads the files here, or the bytes are changed by hand: not the lab's own code.
"""

import contextlib
import dataclasses
import io
import json
import math
import pickle
import random
import resource
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from faults import HTML, Trap
from tiny import TINY_CFG, same, tiny_checkpoint, tiny_model

from models.vgg import VGG
from utils.store import checkpoint
from utils.store.checkpoint import Checkpoint, CheckpointError, load, save

OLD, NEW = tiny_checkpoint(seed=1), tiny_checkpoint(seed=2)
GAMMA, VAR, BIAS = "feature.1.weight", "feature.1.running_var", "classifier.bias"
SCALER = {"scale": 1024.0, "growth_factor": 2.5, "growth_interval": 99, "_growth_tracker": 7}


def changed(content: Checkpoint = OLD, **changes) -> Checkpoint:
    return dataclasses.replace(content, **changes)


def written(folder: Path, content: Checkpoint = OLD) -> bytes:
    save(folder / "written", content)
    return (folder / "written").read_bytes()


def torch_bytes(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def refused(path: Path, content: bytes | None = None, kind: str | None = None) -> str:
    """What is said of a file that is refused and stays as it is; its absolute name is in it."""
    if content is not None:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        load(path, kind)
    assert str(caught.value).startswith(f"{path.resolve()}: ") and path.read_bytes() == before
    return str(caught.value)


def test_what_was_saved_comes_back_to_the_last_bit(tmp_path):
    name = "новая папка/λ with space.safetensors"
    float16 = changed(NEW, optimizer=NEW.optimizer | {"scaler": SCALER})
    finished = changed(NEW, settings={"epochs": 2}, optimizer={})
    for content in (NEW, float16, finished):
        save(tmp_path / name, content)
        assert same(load(tmp_path / name), content)
        assert same(load(str(tmp_path / name), kind="trained"), content)
        assert [f.name for f in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_any_reader_of_safetensors_finds_weights_momentum_and_facts(tmp_path):
    save(tmp_path / "x.safetensors", OLD)
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        (facts,) = map(json.loads, file.metadata().values())
    momentum = {f"optimizer.momentum.{k}": t for k, t in enumerate(OLD.optimizer["momentum"])}
    wanted = OLD.state_dict | momentum
    assert found.keys() == wanted.keys() and len(momentum) == 11  # .10 is not between .1 and .2
    assert all(np.array_equal(found[name], t.detach().numpy()) for name, t in wanted.items())
    assert facts["kind"] == "trained" and facts["cfg"] == TINY_CFG
    assert facts["history"] == OLD.history and facts["settings"] == OLD.settings
    assert facts["results"] == {"accuracy": 93.5}


def test_equal_content_gives_equal_bytes_however_it_lies_in_memory(tmp_path):
    strided = tiny_checkpoint(1).model().to(memory_format=torch.channels_last).state_dict()
    assert not strided["feature.3.weight"].is_contiguous()
    shared = {
        n: torch.cat([t.flatten()] * 2)[: t.numel()].view(t.shape) for n, t in strided.items()
    }
    whole = written(tmp_path)
    assert whole != written(tmp_path, NEW)
    for weights in (strided, shared, {n: torch.nn.Parameter(t, False) for n, t in strided.items()}):
        assert written(tmp_path, changed(state_dict=weights)) == whole


def test_the_model_of_a_checkpoint_computes_what_the_saved_one_did(tmp_path):
    model, images = VGG(TINY_CFG, num_classes=7), torch.randn(4, 3, 32, 32)
    model(images)  # moves the running statistics
    save(tmp_path / "x", Checkpoint("slim", model.cfg, model.state_dict()))
    found = load(tmp_path / "x")
    assert found.num_classes == 7 and torch.equal(found.model()(images), model.eval()(images))


def test_plain_values_come_back_as_json_has_them(tmp_path):
    floats = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, 2**53 + 1, 10**30]
    settings = {
        "l1_lambda": np.logspace(-3, -2, 2)[0],
        "ratios": (np.float32(0.1), (np.int64(3), torch.tensor(0.25)), {0.5: np.bool_(True)}),
        "name": np.str_("schnell λ"),
        "best": np.array(7),
        "floats": floats,
    }
    cfg = tuple(np.int64(v) if v != "M" else v for v in TINY_CFG)
    save(tmp_path / "x", changed(settings=settings, cfg=cfg))
    found = load(tmp_path / "x")
    tenth = float(np.float32(0.1))
    plain = {"l1_lambda": 0.001, "ratios": [tenth, [3, 0.25], {"0.5": True}]}
    wanted = plain | {"name": "schnell λ", "best": 7, "floats": floats}
    assert same(found.settings, wanted) and same(found.cfg, TINY_CFG)
    bits = [struct.pack("d", v) for v in found.settings["floats"][:4]]
    assert bits == [struct.pack("d", v) for v in floats[:4]]


@pytest.mark.parametrize(
    ("kind", "writer"),
    [("trained", "sparsity_train.ipynb"), ("cut", "train_prune_model.ipynb or the sweep")],
)
def test_each_kind_names_who_writes_it(tmp_path, monkeypatch, kind, writer):
    path = tmp_path / "x"
    assert f"move it away and run {writer}." in refused(path, HTML, kind=kind)
    save(path, changed(kind="slim"))
    said = refused(path, kind=kind)  # a sound file
    assert f"is of kind 'slim', expected '{kind}'" in said and f"and run {writer}." in said
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/none: No such file.*run {writer}\.$"):
        load("none", kind)


def endless() -> list:
    endless = []
    endless.append([endless])
    return endless


def weights(name: str, value: torch.Tensor | None) -> dict:
    changed = OLD.state_dict | {name: value}
    return {"state_dict": {n: t for n, t in changed.items() if t is not None}}


def optimizer(momentum: list = OLD.optimizer["momentum"], **scaler: float) -> dict:
    return {"optimizer": {"momentum": momentum, "scaler": scaler}}


MOMENTUM, HISTORY = OLD.optimizer["momentum"], OLD.history
NOT_KEPT = {
    "an array": ({"settings": {"ratios": np.ones(2)}}, "settings"),
    "a list without an end": ({"results": {"x": endless()}}, "results"),
    "a result that is NaN": ({"results": {"accuracy": math.nan}}, "results"),
    "an epoch that is NaN": ({"history": HISTORY | {"train_loss": [1.0, math.nan]}}, "history"),
    "a scale that is infinite": (optimizer(scale=math.inf), "scaler"),
    "an unknown column": ({"history": HISTORY | {"f1": [0.5, 0.5]}}, "f1"),
    "another cfg": ({"cfg": [3, 4, "M", 6]}, "its cfg asks for"),
    "a cfg with a zero": ({"cfg": [3, 0, "M", 5]}, "channel counts"),
    "a negative variance": (weights(VAR, torch.full([3], -1e-9)), VAR),
    "γ in float64": (weights(GAMMA, torch.ones(3).double()), GAMMA),
    "a layer too many": (weights("extra", torch.ones(1)), "extra"),
    "a layer too few": (weights(GAMMA, None), GAMMA),
    "momentum of another layer": (optimizer(MOMENTUM[::-1]), "momentum.0"),
    "momentum that is NaN": (optimizer([*MOMENTUM[:-1], torch.full([3], math.nan)]), "momentum.10"),
}  # fmt: skip


@pytest.mark.parametrize("value", NOT_KEPT)
def test_what_could_not_be_loaded_again_is_not_written(tmp_path, value):
    changes, said = NOT_KEPT[value]
    save(tmp_path / "x", NEW)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "x", changed(**changes))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/x: not saved") and said in message, message
    assert same(load(tmp_path / "x"), NEW) and len(list(tmp_path.iterdir())) == 1


def test_bytes_that_came_out_wrong_do_not_replace_the_file(tmp_path, monkeypatch):
    save(tmp_path / "x", OLD)
    whole_save = safetensors.torch.save
    monkeypatch.setattr(safetensors.torch, "save", lambda *a: flip(whole_save(*a), -9))
    with pytest.raises(CheckpointError, match="checksum"):
        save(tmp_path / "x", NEW)
    assert same(load(tmp_path / "x"), OLD)


def flip(whole: bytes, at: int, bit: int = 0) -> bytes:
    broken = bytearray(whole)
    broken[at] ^= 1 << bit
    return bytes(broken)


def test_a_file_cut_anywhere_or_with_something_behind_it_is_refused(tmp_path):
    for content in (b"\0" * 5000, HTML, b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x04N."):
        refused(tmp_path / "x", content)
    whole = written(tmp_path)
    for end in range(0, len(whole), 97):
        refused(tmp_path / "x", whole[:end])
    for more in (b"\0", whole):
        refused(tmp_path / "x", whole + more)


def test_every_bit_of_tensors_and_facts_is_under_the_seal(tmp_path):
    # Finished: no momentum, so that without its facts it would be a sound file of somebody else.
    finished = changed(settings={"epochs": 2}, optimizer={})
    whole, path = written(tmp_path, finished), tmp_path / "x"
    facts_end, draw = whole.index(b'"}', 20), random.Random(0)
    in_tensors = draw.sample(range(len(whole) - 900, len(whole)), 60)
    for at in [*range(8, facts_end), *in_tensors]:
        path.write_bytes(flip(whole, at, bit=draw.randrange(8)))
        try:
            assert same(load(path), finished), at  # the case of a hexadecimal digit in \u03bb, say
        except CheckpointError:
            continue
        assert at < facts_end, "a bit of a tensor is not checked"


def test_facts_and_tensors_of_two_files_do_not_go_together(tmp_path):
    save(tmp_path / "x", OLD)
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load(written(tmp_path))
    gammas = {GAMMA: tensors["feature.1.bias"], "feature.1.bias": tensors[GAMMA]}
    assert same(load_of(tmp_path, tensors, metadata), OLD)
    for other in (tensors | gammas, safetensors.torch.load(written(tmp_path, NEW))):
        with pytest.raises(CheckpointError, match="checksum"):
            load_of(tmp_path, other, metadata)


def load_of(folder: Path, tensors: dict, metadata: dict | None = None) -> Checkpoint:
    safetensors.torch.save_file(tensors, folder / "other", metadata)
    return load(folder / "other")


def crafted(**facts) -> bytes:
    """A file whose seal is right and whose facts are not."""
    sound = {name: getattr(OLD, name) for name in ("kind", "cfg", "settings", "history", "results")}
    momentum = {f"optimizer.momentum.{k}": t for k, t in enumerate(OLD.optimizer["momentum"])}
    facts = {"lab": checkpoint.LAB, "format": 3, "scaler": {}} | sound | facts
    tensors = {name: t.detach() for name, t in (OLD.state_dict | momentum).items()}
    seal = {"seal": checkpoint._seal(facts, tensors)}
    return safetensors.torch.save(tensors, {checkpoint.LAB: json.dumps(facts | seal)})


def claiming(*tensors: tuple, content: bytes = bytes(8)) -> bytes:
    """A safetensors file with a header written by hand: name, dtype, shape, begin, end of each."""
    entries = [
        f'"{name}":' + json.dumps({"dtype": dtype, "shape": [size], "data_offsets": [begin, end]})
        for name, dtype, size, begin, end in tensors
    ]
    text = ("{" + ",".join(entries) + "}").encode()
    return struct.pack("<Q", len(text)) + text + content


LIES = {
    "a newer format": crafted(format=4),
    "cfg of text": crafted(cfg="MMM"),
    "history of numbers": crafted(history=dict.fromkeys(OLD.history, 1.0)),
    "scaler nothing, momentum there": crafted(scaler=None),
    "facts a list": safetensors.torch.save(OLD.state_dict, {checkpoint.LAB: "[1]"}),
    "facts without an end": safetensors.torch.save({}, {checkpoint.LAB: "[" * 100_000}),
    "facts too few": safetensors.torch.save(OLD.state_dict, {checkpoint.LAB: '{"format": 3}'}),
    "a hole": claiming(("a", "F32", 1, 4, 8)),
    "one tensor over another": claiming(("a", "F32", 2, 0, 8), ("b", "F32", 2, 0, 8)),
    "more than memory": claiming(("a", "F32", 2**40, 0, 2**42)),
    "a type unknown to torch": claiming(("a", "F4", 16, 0, 8)),
    "a header beyond the file": b"\xff" * 7 + b"\x7f{}",
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_whole_file_that_does_not_fit_is_refused(tmp_path, lie):
    refused(tmp_path / "x", LIES[lie])


def test_another_format_of_this_lab_is_named(tmp_path):
    said = refused(tmp_path / "x", LIES["a newer format"])
    assert "has format 4, this version of the lab reads 3" in said and "damaged" not in said
    assert "run the notebook that wrote it again" in said
    before = {"format": 2, "kind": "slim", "cfg": TINY_CFG, "state_dict": OLD.state_dict}
    said = refused(tmp_path / "x", torch_bytes(before))
    assert "older version of this lab (format 2)" in said and "run the notebook" in said


POOLED = [4, "M", 5, 6, "M", "M", 7]
THEIRS = {name: t.detach() for name, t in tiny_model(3, cfg=POOLED).state_dict().items()}


def renamed(front: str) -> dict:
    return {front + name: value for name, value in THEIRS.items()}


def cfg_of(number: type) -> list:
    """The cfg, its widths as another type of number."""
    return [v if v == "M" else number(v) for v in POOLED]


def halved(kind: torch.dtype) -> dict:
    """The weights, and the counters too, in another precision; each value has a bfloat16."""
    return {n: t.to(torch.bfloat16).to(kind) for n, t in THEIRS.items()}


READ = {
    "original lab": {"cfg": POOLED, "state_dict": THEIRS},
    "before torch 0.4.1": {
        "cfg": POOLED,
        "state_dict": {k: v for k, v in THEIRS.items() if "num_batches" not in k},
    },
    "DataParallel and compiled": {"cfg": POOLED, "state_dict": renamed("module._orig_mod.")},
    "training of the original lab": {
        "epoch": 160,
        "state_dict": OrderedDict(THEIRS),
        "best_prec1": torch.tensor(93.5),
        "optimizer": {"param_groups": [{"lr": 0.1}]},
    },
    "bare weights": THEIRS,
    "cfg of whole floats": {"cfg": cfg_of(float), "state_dict": THEIRS},
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_files_of_others_are_read(tmp_path, name):
    torch.save(READ[name], tmp_path / "x.pt")
    found = load(tmp_path / "x.pt", kind="original lab")
    assert same(found.cfg, POOLED)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.model()(images), tiny_model(3, cfg=POOLED).eval()(images))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"author": "me", "cfg": "[64]"}])
def test_safetensors_of_others_are_read(tmp_path, metadata):
    for weights in (THEIRS, renamed("module.")):
        found = load_of(tmp_path, weights, metadata)
        assert found.kind == "original lab" and same(found.cfg, POOLED)
        assert same(found.state_dict, THEIRS)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, kind):
    wanted = {n: t.to(torch.bfloat16).to(t.dtype) for n, t in THEIRS.items()}
    torch.save({"cfg": POOLED, "state_dict": halved(kind)}, tmp_path / "x.pt")
    assert same(load(tmp_path / "x.pt").state_dict, wanted)
    assert same(load_of(tmp_path, halved(kind)).state_dict, wanted)


def theirs(**changes) -> bytes:
    return torch_bytes({"cfg": POOLED, "state_dict": THEIRS} | changes)


def bad(value: object, name: str = GAMMA) -> bytes:
    return theirs(state_dict=THEIRS | {name: value})


ALONE = "torch.save({'cfg': [v if v == 'M' else int(v) for v in cfg], 'state_dict': model.state_d"
TOLD = {
    "a whole model": (torch_bytes(tiny_model()), ("models.vgg.VGG", ALONE)),
    "cfg of numpy": (theirs(cfg=cfg_of(np.int64)), ("numpy", ALONE)),
    "torch before 1.6": (
        torch_bytes(READ["original lab"], _use_new_zipfile_serialization=False),
        ("older than torch 1.6", ALONE),
    ),
    "cfg of shares": (theirs(cfg=[0.5, 1.0]), ("channel counts",)),
    "another network": (
        torch_bytes({k.replace("feature", "features"): v for k, v in THEIRS.items()}),
        ("features.0.weight", "feature.0.weight", "Rename its weights"),
    ),
    "another dictionary": (torch_bytes({"net": THEIRS, "acc": 1}), ("'net', 'acc'", ALONE)),
    "a list": (torch_bytes([1, 2]), ("[1, 2]", ALONE)),
    "a layer of text": (bad("0.5"), ("weights by name",)),
    "a sparse weight": (bad(THEIRS[GAMMA].to_sparse()), ()),
    "a weight on no device": (bad(torch.ones(4, device="meta")), ()),
    "weights of 8 bits": (bad(torch.ones(4, dtype=torch.int8)), (GAMMA, "int8")),
    "a weight beyond float32": (bad(THEIRS[GAMMA].double() + 1e300), (GAMMA, "finite")),
    "pools without end": (torch_bytes({"feature.999.weight": torch.ones(4, 3, 3, 3)}), ("cfg",)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("name", TOLD)
def test_files_that_can_not_be_read_say_what_they_are(tmp_path, name):
    content, said = TOLD[name]
    message = refused(tmp_path / "x.pt", content)
    assert all(part in message for part in said), message


def largest_entry(whole: bytes) -> tuple[str, range]:
    """The name of the largest tensor in an archive, and where its bytes lie."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = max(archive.infolist(), key=lambda e: ("/data/" in e.filename, e.file_size))
        raw = archive.read(entry)
    return entry.filename, range(whole.index(raw), whole.index(raw) + len(raw))


def test_damage_to_a_file_of_torch_is_seen_by_its_checksums(tmp_path):
    whole, path = theirs(), tmp_path / "x.pt"
    name, weights = largest_entry(whole)
    for at in random.Random(0).sample(weights, 20):
        assert "checksum" in refused(path, flip(whole, at))
    refused(path, flip(whole, weights[10], bit=6) + whole)  # a sound one behind it
    for end in range(0, len(whole), 997):
        refused(path, whole[:end])
    end = whole.rindex(name.encode()) + len(name)
    for at in range(whole.rindex(b"PK\x01\x02", 0, end), end):  # the entry in the directory
        path.write_bytes(flip(whole, at, bit=at % 8))
        with contextlib.suppress(CheckpointError):
            assert same(load(path).state_dict, THEIRS), f"byte {at}"


@pytest.mark.parametrize("place", ["whole", "state_dict", "cfg", "more", "pickle", "legacy"])
def test_code_in_a_file_is_never_run(tmp_path, place):
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    trap = Trap(canary)
    whole = torch_bytes(trap, _use_new_zipfile_serialization=place != "legacy")
    if place in ("state_dict", "cfg", "more"):
        whole = theirs(**{place: [trap]})
    said = refused(path, pickle.dumps(trap) if place == "pickle" else whole)
    assert "mkdir" in said or place in ("pickle", "legacy")
    assert not canary.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert canary.exists(), "the trap was none"


def test_a_zip_bomb_is_refused_before_it_inflates(tmp_path, monkeypatch):
    path, plain = tmp_path / "x", torch_bytes({"x": torch.zeros(2**18)})
    with (
        zipfile.ZipFile(io.BytesIO(plain)) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
            bomb.infolist()[-1].external_attr = 0  # in nothing else unlike what torch writes
    assert path.stat().st_size < len(plain) / 100
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("it inflates"))
    assert "not an archive as torch writes it" in refused(path)


def test_a_small_tensor_that_claims_to_be_huge_is_refused_in_little_memory(tmp_path):
    # One number, repeated by a stride of 0: 14 GB of weights in a file of a few kB.
    width = 20_000
    huge = {
        name: torch.zeros((), dtype=v.dtype).expand([width if n == 5 else n for n in v.shape])
        for name, v in tiny_model(cfg=[5, 5]).half().state_dict().items()
    }
    whole = torch_bytes({"cfg": [width, width], "state_dict": huge})
    assert len(whole) < 20_000
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, before[1]))
    try:
        assert "no plain tensor for feature" in refused(tmp_path / "x", whole)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
