"""A checkpoint file, saved whole or not at all and trusted in nothing: safetensors, whose header
holds plain facts as JSON and a seal, a digest of all of it."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from models.vgg import VGG
from utils.store.files import digest, write_whole
from utils.store.foreign import ANOTHER_VERSION, Unreadable, cfg_and_weights, read_torch
from utils.store.identity import fingerprint

FORMAT = 3
LAB = "network slimming"
"""The name of the one entry in the header that is this lab's. It stands in the entry, too: with a
damaged name it must not pass for somebody else's file."""
MOMENTUM = "optimizer.momentum."
FACTS = ("kind", "cfg", "settings", "history", "results")
WRITTEN_BY = {
    "trained": "sparsity_train.ipynb",
    "slim": "vggprune.ipynb",
    "finetuned": "train_prune_model.ipynb",
    "pass": "train_prune_model.ipynb",
    "cut": "train_prune_model.ipynb or the sweep",
}
"""The kinds of this lab: `pass` is trained between two cuts, `cut` is not fine-tuned yet."""


@dataclass
class History:
    """One entry per finished epoch; accuracies in %, sparsity from 0 to 1."""

    lr: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)

    def append(self, **values: float) -> None:
        for name, value in values.items():
            getattr(self, name).append(value)

    def __len__(self) -> int:
        return len(self.lr)

    def line(self, epochs: int) -> str:
        """The last epoch as a line to print."""
        return (
            f"epoch {len(self):3d}/{epochs}   lr {self.lr[-1]:.4f}   "
            f"loss {self.train_loss[-1]:.3f}   train {self.train_accuracy[-1]:5.2f} %   "
            f"test {self.test_accuracy[-1]:5.2f} %   sparsity {self.sparsity[-1]:.3f}"
        )


COLUMNS = tuple(f.name for f in fields(History))


class CheckpointError(Exception):
    """A checkpoint that can't be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A network and where it comes from.

    `kind`: one of WRITTEN_BY, or "original lab". `settings`: what the network follows from; equal
    settings, equal network. `history`: a list for each of COLUMNS, or empty. `optimizer`: what
    `fit` goes on with, {"momentum": a tensor per parameter, "scaler"}, or empty.
    """

    kind: str
    cfg: list[int | str]
    state_dict: dict[str, Tensor]
    settings: dict = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.state_dict["classifier.bias"])

    def model(self) -> VGG:
        """The network itself, on the CPU, in evaluation mode."""
        model = VGG(self.cfg, num_classes=self.num_classes)
        model.load_state_dict(self.state_dict, strict=True)
        return model.eval()


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, as `write_whole` does it, so that `load` gives it back, plain
    values as JSON has them: tuples as lists, keys as text, single numbers of numpy and torch as
    Python's, each float to the last bit.

    Raises CheckpointError, and leaves the old file, for what `load` would refuse.
    """
    facts = {"lab": LAB, "format": FORMAT, "scaler": checkpoint.optimizer.get("scaler")}
    facts |= {name: getattr(checkpoint, name) for name in FACTS}
    momentum = {f"{MOMENTUM}{k}": t for k, t in enumerate(checkpoint.optimizer.get("momentum", ()))}
    tensors = {  # no two of which may share memory
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in (checkpoint.state_dict | momentum).items()
    }
    try:
        facts = {name: _plain(name, value) for name, value in facts.items()}
        facts["seal"] = _seal(facts, tensors)
        # One entry: the library writes several in an order that differs from file to file.
        content = safetensors.torch.save(tensors, {LAB: json.dumps(facts)})
        _checked(content)
    except Exception as error:
        raise CheckpointError(
            f"{os.path.abspath(path)}: not saved, for it could not be loaded again ({error}). What "
            "was there before is unchanged; mend the value, and run again."
        ) from error
    write_whole(path, content)


def load(path: str | Path, kind: str | None = None) -> Checkpoint:
    """Read and check a checkpoint, this lab's or one that `foreign` understands.

    `kind` is the one expected, if only one will do. Every tensor is on the CPU, finite, and of the
    shape that `cfg` asks for. Anything else raises CheckpointError. No code in the file is run.
    """
    path, run = os.path.abspath(path), f"run {WRITTEN_BY.get(kind, 'the notebook that writes it')}"
    try:
        checkpoint = _checked(Path(path).read_bytes())
        if kind and checkpoint.kind != kind:
            raise Unreadable(f"is of kind {checkpoint.kind!r}, expected {kind!r}")
        return checkpoint
    except OSError as error:
        way_out = f"Is the path right? If it is this lab's own, {run}"
        raise CheckpointError(f"{path}: {error.strerror or error}. {way_out}.") from error
    except Exception as error:  # a file that is crafted or damaged can fail in any way at all
        what = f"is damaged or no checkpoint ({type(error).__name__}: {str(error)[:200]})"
        told = error.args if isinstance(error, Unreadable) else (what,)
        what, way_out = (*told, f"Get a sound copy, or move it away and {run}")[:2]
        raise CheckpointError(f"{path}: {what}. {way_out}.") from error


def _plain(name: str, value: object) -> object:
    try:
        return json.loads(json.dumps(value, default=lambda v: v.item(), allow_nan=False))
    except Exception as error:
        raise Unreadable(f"has {name} of other than plain, finite values ({error})") from error


def _seal(facts: dict, tensors: dict[str, Tensor]) -> str:
    return fingerprint([facts, digest(tensors[name] for name in sorted(tensors))])


def _unpacked(content: bytes) -> tuple[dict | None, dict[str, Tensor]]:
    """The facts and tensors in a file, its own or somebody else's."""
    if content[8:9] == b"{":  # where the header of a safetensors file begins
        tensors = safetensors.torch.load(content)  # checks names, types, shapes and offsets
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
        if LAB in str(metadata):
            facts = json.loads(metadata[LAB])
            if facts["format"] != FORMAT:
                what = f"has format {facts['format']!r}, this version of the lab reads {FORMAT}"
                raise Unreadable(what, ANOTHER_VERSION)
            if facts.pop("seal") != _seal(facts, tensors):
                raise Unreadable("is damaged (its checksum is another)")
            return facts, tensors
    else:
        tensors = read_torch(content)
    cfg, weights = cfg_and_weights(tensors)
    return asdict(Checkpoint("original lab", cfg, {})) | {"scaler": None}, weights


def _checked(content: bytes) -> Checkpoint:
    """The checkpoint in the content of a file; raises an Exception unless all of it is sound."""
    facts, tensors = _unpacked(content)
    len(History(**facts["history"]))  # TypeError for columns that it doesn't know
    with torch.device("meta"):
        model = VGG(facts["cfg"], num_classes=len(tensors.get("classifier.bias", "?")))
    weights, momentum, optimizer = model.state_dict(), {}, {}
    if facts["scaler"] is not None:
        momentum = {f"{MOMENTUM}{k}": p for k, p in enumerate(model.parameters())}
        optimizer = {"momentum": [tensors.get(n) for n in momentum], "scaler": facts["scaler"]}
    expected = {name: (t.shape, t.dtype) for name, t in (weights | momentum).items()}
    found = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    for name in expected | found:
        if found.get(name) != expected.get(name):
            what = f"has {name} as {found.get(name)}, its cfg asks for {expected.get(name)}"
            raise Unreadable(what)
        numbers = tensors[name]
        if not numbers.isfinite().all() or (name.endswith("running_var") and numbers.min() < 0):
            raise Unreadable(f"has numbers in {name} that are not finite, or a negative variance")
    facts = {name: facts[name] for name in FACTS}
    return Checkpoint(state_dict={n: tensors[n] for n in weights}, optimizer=optimizer, **facts)
