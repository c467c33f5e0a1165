"""A checkpoint file that describes itself: saved whole or not at all, and trusted in nothing."""

import io
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as short

import torch
from torch import Tensor

from models.vgg import VGG, shapes_only
from utils.store.archive import Unreadable, check_tensor, is_finite, odd_types_in, plain, read
from utils.store.files import write_whole
from utils.store.foreign import as_checkpoint

FORMAT = 2
ARCHITECTURES: dict[str, type[VGG]] = {"VGG": VGG}
WRITTEN_BY = {
    "trained": "sparsity_train.ipynb",
    "slim": "vggprune.ipynb",
    "finetuned": "train_prune_model.ipynb",
}
"""The kinds of checkpoint of this lab, and the notebook that writes each."""
KINDS = (*WRITTEN_BY, "original lab")
GRAD_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


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
    """A network and where it comes from."""

    kind: str
    """One of KINDS."""
    cfg: list[int | str]
    state_dict: dict[str, Tensor]
    settings: dict = field(default_factory=dict)
    """What the network follows from: equal settings, equal network."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """A list for each of COLUMNS, one entry per finished epoch; empty without training."""
    optimizer: dict = field(default_factory=dict)
    """What `fit` needs to go on: {"momentum": a tensor per parameter, "scaler"}; else empty."""
    results: dict = field(default_factory=dict)
    """Numbers measured on this network, for the notebooks that follow."""
    architecture: str = "VGG"
    """One of ARCHITECTURES."""

    @property
    def num_classes(self) -> int:
        return len(self.state_dict["classifier.bias"])

    def model(self) -> VGG:
        """The network itself, on the CPU, in evaluation mode."""
        model = ARCHITECTURES[self.architecture](self.cfg, num_classes=self.num_classes)
        model.load_state_dict(self.state_dict, strict=True)
        return model.eval()


NAMES = [f.name for f in fields(Checkpoint)]


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, as `write_whole` does it, so that `load` gives it back.

    Single numbers of numpy and torch become Python's. Raises CheckpointError, and leaves the old
    file, for what `load` would refuse and for a file that can't be written.
    """
    values = {n: plain(getattr(checkpoint, n)) for n in ("cfg", "settings", "history", "results")}
    checkpoint = replace(checkpoint, **values)
    buffer = io.BytesIO()
    try:
        _check_values(checkpoint)
        torch.save({"format": FORMAT} | {n: getattr(checkpoint, n) for n in NAMES}, buffer)
        _checked(read(buffer))
        write_whole(path, buffer.getbuffer())
    except Unreadable as error:
        raise CheckpointError(
            f"{os.path.abspath(path)}: not saved, for the file {error} and could not be loaded "
            "again. What was there before is unchanged; mend the value, and run again."
        ) from error
    except OSError as error:
        raise CheckpointError(str(error)) from error


def load(path: str | Path, kind: str | None = None) -> Checkpoint:
    """Read and check a checkpoint, this lab's or one that `as_checkpoint` understands.

    `kind` is the one expected, if only one will do. Every tensor is on the CPU, finite, and of the
    shape that `cfg` asks for. Anything else raises CheckpointError. No code in the file is run.
    """
    path, writer = os.path.abspath(path), WRITTEN_BY.get(kind, "the notebook that writes it")
    advice = "Delete or replace the file, and" if kind in WRITTEN_BY else "Get a sound copy, or"
    try:
        with open(path, "rb") as file:
            checkpoint = _checked(read(file))
        if kind and checkpoint.kind != kind:
            what = f"is of kind {checkpoint.kind!r}, expected {kind!r}"
            raise Unreadable(what, f"Move it elsewhere, and run {writer}")
        return checkpoint
    except OSError as error:
        way_out = f"Is the path right? If it is this lab's own, run {writer}"
        raise CheckpointError(f"{path}: {error.strerror or error}. {way_out}.") from error
    # RuntimeError: what torch raises for tensors too odd to look at, Python for endless nesting.
    except (Unreadable, RuntimeError) as error:
        way_out = getattr(error, "way_out", "") or f"{advice} run {writer}"
        raise CheckpointError(f"{path}: {error}. {way_out}.") from error


def _checked(content: dict) -> Checkpoint:
    if "format" not in content:
        content = as_checkpoint(content)
    elif type(content["format"]) is not int or content["format"] != FORMAT:
        raise Unreadable(
            f"has format {short(content['format'])}, this version of the lab reads {FORMAT}",
            "Use the version that wrote it, or move it elsewhere and run the notebook again",
        )
    content = {"kind": None, "cfg": None, "state_dict": None} | content
    checkpoint = Checkpoint(**{n: content[n] for n in NAMES if n in content})
    _check_values(checkpoint)
    _check_tensors(checkpoint)
    return checkpoint


def _check_values(checkpoint: Checkpoint) -> None:
    """Known names, plain values, and a history as `fit` writes it."""
    for name, known in (("kind", KINDS), ("architecture", ARCHITECTURES)):
        value = getattr(checkpoint, name)
        if not isinstance(value, str) or value not in known:
            raise Unreadable(f"has {name} {short(value)}, known are {', '.join(known)}")
    for name in ("settings", "history", "results"):
        value = getattr(checkpoint, name)
        if (odd := odd_types_in(value)) or not isinstance(value, dict):
            names = ", ".join(sorted(t.__name__ for t in odd or {type(value)}))
            raise Unreadable(f"has {name} of {names}, must be a dictionary of plain values")
    history, columns = checkpoint.history, checkpoint.history.values()
    if history and set(history) != set(COLUMNS):
        raise Unreadable(f"has a history of {short(list(history))}, not of {', '.join(COLUMNS)}")
    finite = all(type(c) is list and all(map(is_finite, c)) for c in columns)
    if not finite or len({len(c) for c in columns}) > 1:
        raise Unreadable("has a history that is not finite numbers, one per column and epoch")
    done = len(history.get("lr", ()))
    epochs = checkpoint.settings.get("epochs", done)
    if type(epochs) is not int or done > epochs:
        raise Unreadable(f"has {done} epochs of history, its settings say epochs = {short(epochs)}")
    if 0 < done < epochs and checkpoint.optimizer == {}:
        raise Unreadable(f"has {done} of {epochs} epochs, but no optimizer state to go on with")


def _check_tensors(checkpoint: Checkpoint) -> None:
    """The weights are those of the architecture with this cfg, each of its shape, each finite."""
    cfg, state = checkpoint.cfg, checkpoint.state_dict
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise Unreadable("has no readable weights")
    try:
        if not isinstance(cfg, list) or not all(type(v) in (int, float, str) for v in cfg):
            raise ValueError(f"cfg = {short(cfg)}: must be a list of channel counts and 'M'")
        with shapes_only():
            model = ARCHITECTURES[checkpoint.architecture](cfg, num_classes=checkpoint.num_classes)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Unreadable(f"does not describe a {checkpoint.architecture} ({error})") from error
    expected = model.state_dict()
    if expected.keys() != state.keys():
        differ = ", ".join(sorted(expected.keys() ^ state.keys())[:3])
        raise Unreadable(f"has other layers than its cfg says ({differ})")
    for name, value in expected.items():
        check_tensor(name, state[name], value)
        if name.endswith("running_var") and (state[name] < 0).any():
            raise Unreadable(f"has a negative variance in {name}")
    if checkpoint.optimizer != {}:
        _check_optimizer(checkpoint.optimizer, list(model.parameters()))


def _check_optimizer(optimizer: dict, parameters: list[Tensor]) -> None:
    if not isinstance(optimizer, dict) or optimizer.keys() != {"momentum", "scaler"}:
        raise Unreadable("has an optimizer state that is not one of momentum and scaler")
    momentum, scaler = optimizer["momentum"], optimizer["scaler"]
    if not isinstance(momentum, list) or len(momentum) != len(parameters):
        raise Unreadable("has an optimizer state without a momentum for each parameter")
    for value, weight in zip(momentum, parameters, strict=True):
        check_tensor("the optimizer's momentum", value, weight)
    known = isinstance(scaler, dict) and set(scaler) in (set(), GRAD_SCALER)
    if not known or not all(map(is_finite, scaler.values())):
        raise Unreadable("has an optimizer state whose scaler is not one of torch")
