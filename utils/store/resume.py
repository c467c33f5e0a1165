"""One training's file: what it follows from, how far it came, and that one process writes it."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import Timeout
from torch import nn

from models.vgg import VGG
from utils.images.data import ImageData
from utils.profile import SETTINGS, Profile
from utils.sparsity import bn_layers
from utils.step import Penalty
from utils.store.checkpoint import CheckpointError, History, load
from utils.store.files import digest, file_lock


def training_settings(
    model: VGG,
    data: ImageData,
    profile: Profile,
    precision: str,
    *,
    l1_lambda: float,
    penalty: Penalty,
    teacher: VGG | None,
) -> dict:
    """All that the result of `fit` follows from. Equal settings, equal run."""
    settings = {name: getattr(profile, name) for name in SETTINGS}
    settings |= {
        "precision": precision,
        "l1_lambda": l1_lambda,
        "penalty": _fingerprint(penalty, l1_lambda),
        "cfg": list(model.cfg),
        "images": data.digest,
        "starting weights": weights_digest(model),
    }
    if teacher is not None:
        settings["distillation"] = profile.distillation
        settings["teacher weights"] = weights_digest(teacher)
    return settings


def weights_digest(model: nn.Module) -> str:
    """A short fingerprint of a network's weights and BN statistics: equal only for equal bits."""
    return digest(list(model.state_dict().values()))


def _fingerprint(penalty: Penalty, l1_lambda: float) -> str:
    """What `penalty` does to the gradients of a small network, whatever its source looks like."""
    with torch.random.fork_rng(devices=[]):
        probe = VGG([4, "M", 2], num_classes=2)
    for bn in bn_layers(probe):
        bn.weight.data = torch.tensor([0.5, -2.0, 0.0, 1e-6])[: bn.num_features]
    for p in probe.parameters():
        p.grad = torch.full_like(p, 0.25)
    penalty(probe, l1_lambda)
    return digest([p.grad for p in probe.parameters()])


def resume(
    path: str | Path | None, kind: str, settings: dict, model: VGG
) -> tuple[History, dict | None]:
    """The epochs that the file at `path` holds, and what the next step needs; sets the weights."""
    if not path or not Path(path).exists():
        return History(), None
    saved = load(path, kind=kind)
    differ = [
        f"{name} = {saved.settings.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted(settings.keys() | saved.settings.keys())
        if settings.get(name) != saved.settings.get(name)
    ]
    if differ:
        raise CheckpointError(
            f"{Path(path).resolve()} was made with {'; '.join(differ)}. Set that back to go on "
            "with it, move the file away to start anew, or set run_name: a run of its own."
        )
    history, wanted = History(**saved.history), settings["epochs"]
    if len(history) < wanted and not saved.optimizer:
        raise CheckpointError(
            f"{Path(path).resolve()}: no training can go on from this file (it lacks the "
            "momentum). Move it away."
        )
    model.load_state_dict(saved.state_dict)
    return history, saved.optimizer


@contextmanager
def only_writer(checkpoint: str | Path | None) -> Iterator[None]:
    """Hold a lock as long as a training writes `checkpoint`; the system frees it if that dies."""
    if not checkpoint:
        yield
        return
    try:
        held = file_lock(checkpoint, timeout=0).acquire()
    except Timeout:
        raise CheckpointError(
            f"{Path(checkpoint).resolve()}: another notebook is writing this file now. Stop that "
            "one or wait for it, or set run_name: a run of its own."
        ) from None
    with held:
        path = Path(checkpoint)
        for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            unfinished.unlink(missing_ok=True)  # of a run that was killed while saving
        yield
