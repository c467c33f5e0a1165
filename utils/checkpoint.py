"""A checkpoint file that describes itself: saved whole or not at all, and trusted in nothing."""

import contextlib
import hashlib
import io
import math
import os
import tempfile
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from models.vgg import VGG, check_cfg

FORMAT = 1
WRITTEN_BY = {
    "trained": "sparsity_train.ipynb",
    "slim": "vggprune.ipynb",
    "finetuned": "train_prune_model.ipynb",
    "original lab": "the notebooks of the original lab",
}
"""The kinds of checkpoint, and the notebook that writes each."""
VARIES = {"trained": ("l1_lambda",), "slim": ("pruning_ratio", "realised_ratio")}
"""The settings in which the networks of one run may differ."""


class CheckpointError(Exception):
    """A checkpoint that can't be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A network and where it comes from."""

    kind: str
    """One of WRITTEN_BY."""
    cfg: list[int | str]
    state_dict: dict[str, Tensor]
    settings: dict = field(default_factory=dict)
    """What the network follows from: equal settings, equal network."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """A list per quantity, one entry per finished epoch."""
    optimizer: dict = field(default_factory=dict)
    """What `fit` needs to go on with the next epoch."""
    results: dict = field(default_factory=dict)
    """Numbers measured on this network, for the notebooks that follow."""
    made_on: dict = field(default_factory=dict)
    """Hardware and versions."""

    @property
    def num_classes(self) -> int:
        return len(self.state_dict["classifier.bias"])

    def model(self) -> VGG:
        """The network itself, on the CPU, in evaluation mode."""
        model = VGG(self.cfg, num_classes=self.num_classes)
        model.load_state_dict(self.state_dict, strict=True)
        return model.eval()


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, as `write_whole` does it."""
    buffer = io.BytesIO()
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    torch.save({"format": FORMAT, **content}, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all, in a folder that is made if need be: an interruption leaves
    the old file.

    Raises CheckpointError if the folder can't be written to or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two writers do not meet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror or error}). What was there before is "
            "unchanged; make room or choose a folder that can be written to, and run again."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, if all went well
            os.unlink(temporary)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name itself last; systems that can't sync a folder (Windows) do without."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_lock(path: str | Path, *, timeout: float = -1) -> FileLock:
    """A lock that one process at a time can hold for `path`; it is free again if that one dies.

    `timeout`: how many seconds to wait for it, −1 for as long as it takes; then filelock.Timeout.
    """
    # In the temporary folder: a mounted drive may know no locks.
    name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"network-slimming-{name}.lock", timeout=timeout)


def load(path: str | Path, *, kind: str | None = None) -> Checkpoint:
    """Read and check a checkpoint, this lab's or a `{'cfg', 'state_dict'}` of the original lab.

    `kind` is the one expected, if only one will do. Every tensor is on the CPU, finite, and of the
    shape that `cfg` asks for. Anything else raises CheckpointError. No code in the file is run.
    """
    path = Path(path)
    if not path.exists():
        writer = WRITTEN_BY.get(kind, "the notebook that writes it")
        raise CheckpointError(f"{path}: there is no such file; run {writer} first")
    try:
        checkpoint = _checked(_read(path))
        if kind and checkpoint.kind != kind:
            raise _Damaged(f"is of kind {checkpoint.kind!r}, expected {kind!r}")
        return checkpoint
    except (_Damaged, OSError) as error:
        raise CheckpointError(
            f"{path}: {error}. Delete or replace the file, and run the notebook that writes it."
        ) from error


def load_all(folder: str | Path, kind: str, *, data: str) -> list[Checkpoint]:
    """Every checkpoint of `kind` in `folder`, by file name; CheckpointError if there is none.

    `data` is the `fingerprint` of the images in use: networks made with others raise, too, and so
    do those whose training was not finished, or that differ in more than what this kind varies.
    """
    paths = sorted(Path(folder).glob(f"{kind}_*.pt"))
    if not paths:
        raise CheckpointError(f"{folder}: no {kind} network here; run {WRITTEN_BY[kind]} first")
    checkpoints = [load(path, kind=kind) for path in paths]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if checkpoint.settings.get("data") != data:
            raise CheckpointError(
                f"{path} was made with the data {checkpoint.settings.get('data')!r}, now {data!r}. "
                f"Set LAB_DATA back, or run {WRITTEN_BY[kind]} again."
            )
        done, wanted = len(checkpoint.history.get("lr", [])), checkpoint.settings.get("epochs", 0)
        if done < wanted:
            raise CheckpointError(
                f"{path}: {done} of {wanted} epochs are done; run {WRITTEN_BY[kind]} to the end"
            )
        for name, value in checkpoint.settings.items():
            if name not in VARIES.get(kind, ()) and value != checkpoints[0].settings.get(name):
                raise CheckpointError(
                    f"{path} was made with {name} = {value!r}, {paths[0].name} with "
                    f"{checkpoints[0].settings.get(name)!r}: not comparable. Delete the older one."
                )
    return checkpoints


class _Damaged(Exception):
    """What is wrong with a file, in a few words."""


def _read(path: Path) -> dict:
    """The content of a file that is a sound archive of plain values and tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch stores its entries as they are, from the first byte of the file on and without
            # attributes. Another archive could inflate, or be read differently by torch than here.
            if any(e.compress_type != zipfile.ZIP_STORED or e.external_attr for e in entries):
                raise _Damaged("is not a checkpoint (not an archive as torch writes it)")
            if min((e.header_offset for e in entries), default=1) != 0:
                raise _Damaged("is damaged or no checkpoint (more than one archive in it)")
            bad = archive.testzip()  # torch itself does not check the CRCs it writes
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _Damaged(f"is damaged or no checkpoint ({error})") from error
    if bad:
        raise _Damaged(f"is damaged (wrong checksum in {bad})")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for one reason: not a safe, whole file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _Damaged(f"can't be read safely ({reason})") from error
    if not isinstance(content, dict):
        raise _Damaged("is not a checkpoint (not a dictionary)")
    return content


def _checked(content: dict) -> Checkpoint:
    if "format" not in content:
        if not {"cfg", "state_dict"} <= content.keys():
            raise _Damaged("is not a checkpoint (no 'cfg' and 'state_dict')")
        content = {k: content[k] for k in ("cfg", "state_dict")} | {"kind": "original lab"}
    elif not isinstance(content["format"], int) or content["format"] != FORMAT:
        raise _Damaged(
            f"has format {content['format']!r}, this version of the lab reads {FORMAT} (to keep "
            "the file, use the version that wrote it)"
        )
    names = {f.name for f in fields(Checkpoint)}
    try:
        checkpoint = Checkpoint(**{k: v for k, v in content.items() if k in names})
    except TypeError as error:
        raise _Damaged(f"is not a checkpoint ({error})") from error
    if not isinstance(checkpoint.kind, str) or checkpoint.kind not in WRITTEN_BY:
        raise _Damaged(f"has kind {checkpoint.kind!r}, known are {', '.join(WRITTEN_BY)}")
    for name in ("settings", "history", "optimizer", "results", "made_on"):
        if not isinstance(getattr(checkpoint, name), dict):
            raise _Damaged(f"has no readable {name}")
    _check_history(checkpoint.history)
    _check_state(checkpoint)
    return checkpoint


def _check_history(history: dict) -> None:
    columns = list(history.values())
    if not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        raise _Damaged("has a history whose columns differ in length")
    if not all(isinstance(v, int | float) and math.isfinite(v) for c in columns for v in c):
        raise _Damaged("has a history with values that are not finite numbers")


def _check_momentum(checkpoint: Checkpoint, learned: list[Tensor]) -> None:
    momentum = checkpoint.optimizer.get("momentum")
    if not isinstance(momentum, list) or len(momentum) != len(learned):
        raise _Damaged("has no readable optimizer state")
    for value, weight in zip(momentum, learned, strict=True):
        _check_tensor("the optimizer state", value, weight)


def _check_tensor(name: str, value: object, expected: Tensor) -> None:
    """`value` is a plain, finite tensor of the shape and type of `expected`."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise _Damaged(f"has no readable tensor for {name}")
    if value.shape != expected.shape or value.dtype != expected.dtype:
        raise _Damaged(
            f"has {name} of shape {tuple(value.shape)} and {value.dtype}, its cfg asks for "
            f"{tuple(expected.shape)} and {expected.dtype}"
        )
    # Few numbers, repeated by their strides to look like many, would take memory to check.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise _Damaged(f"has {name} with fewer numbers than its shape says")
    if not value.isfinite().all():
        raise _Damaged(f"has values in {name} that are not finite")


def _check_state(checkpoint: Checkpoint) -> None:
    """The weights are those of `VGG(cfg)`, each of its shape, each finite."""
    state = checkpoint.state_dict
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise _Damaged("has no readable weights")
    try:
        check_cfg(checkpoint.cfg)
        with torch.device("meta"):  # shapes without memory, however wide the cfg says it is
            expected = VGG(checkpoint.cfg, num_classes=len(state["classifier.bias"])).state_dict()
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _Damaged(f"does not describe a VGG ({error})") from error
    # Files from before torch 0.4.1 lack this counter; nothing depends on its value.
    for name in expected.keys() - state.keys():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    if expected.keys() != state.keys():
        differ = sorted(map(str, expected.keys() ^ state.keys()))[:3]
        raise _Damaged(f"has other layers than its cfg says ({', '.join(differ)})")
    for name, value in expected.items():
        _check_tensor(name, state[name], value)
        if name.endswith("running_var") and (state[name] < 0).any():
            raise _Damaged(f"has a negative variance in {name}")
    if checkpoint.optimizer:
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        learned = [v for k, v in expected.items() if not k.endswith(buffers)]
        _check_momentum(checkpoint, learned)
