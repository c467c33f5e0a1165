"""fit() and evaluate(): what training is. How a step is computed fast is engine.py's matter."""

import glob
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import Timeout
from torch import Tensor, nn
from tqdm import tqdm

from models.vgg import VGG
from utils.checkpoint import Checkpoint, CheckpointError, file_lock, load, save
from utils.config import Profile
from utils.data import ImageData, digest
from utils.engine import Engine, TrainStep, choose_engine, emulates_bfloat16
from utils.machine import describe_machine
from utils.sparsity import sparsity

EXPLODED = 100.0
"""A mean loss this many times that of guessing means that the run has diverged."""

SETTINGS = (
    "epochs",
    "lr",
    "schedule",
    "batch_size",
    "momentum",
    "nesterov",
    "weight_decay",
    "crop_padding",
    "flip",
    "seed",
)
"""The fields of a profile that decide what a training run computes."""


class DivergenceError(RuntimeError):
    """The loss or a weight is no longer a sensible number."""


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

    def line(self, epoch: int, epochs: int) -> str:
        """One epoch, which counts from 0, as a line to print."""
        return (
            f"epoch {epoch + 1:3d}/{epochs}   lr {self.lr[epoch]:.4f}   "
            f"loss {self.train_loss[epoch]:.3f}   train {self.train_accuracy[epoch]:5.2f} %   "
            f"test {self.test_accuracy[epoch]:5.2f} %   sparsity {self.sparsity[epoch]:.3f}"
        )


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, and accuracy in %."""

    loss: float
    accuracy: float


def learning_rate(profile: Profile, epoch: int) -> float:
    """The learning rate of `epoch`, which counts from 0. It is constant within an epoch."""
    if profile.schedule == "step":
        # Whole-number milestones: for 5 epochs, 5 · 0.5 = 2.5 would never be met.
        drops = (profile.epochs // 2 <= epoch) + (profile.epochs * 3 // 4 <= epoch)
        return profile.lr * 0.1**drops if profile.epochs >= 4 else profile.lr
    warmup = 1 if profile.epochs >= 4 else 0
    if epoch < warmup:
        return profile.lr / 2
    progress = (epoch - warmup + 0.5) / (profile.epochs - warmup)
    return profile.lr * (1 + math.cos(math.pi * progress)) / 2


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Loss and accuracy over (images, labels) batches, in float32, with the running BN statistics.

    Leaves `model` in the mode it was in. Raises ValueError without a batch. (On a GPU of compute
    capability 8 or more torch computes float32 convolutions in TF32.)
    """
    was_training = model.training
    model.eval()
    totals = 0.0
    with torch.inference_mode():
        for images, labels in batches:
            images = images.contiguous(memory_format=torch.channels_last)
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="sum").double()
            correct = (logits.argmax(1) == labels).sum()
            totals = totals + torch.stack([loss, correct, torch.full_like(loss, len(labels))])
    model.train(was_training)
    if not isinstance(totals, Tensor):
        raise ValueError("evaluate: no batches given; pass at least one batch of images")
    loss, correct, count = totals.tolist()
    return Evaluation(loss / count, 100 * correct / count)


def fit(
    model: VGG,
    data: ImageData,
    profile: Profile,
    *,
    l1_lambda: float = 0.0,
    checkpoint: str | Path | None = None,
    teacher: VGG | None = None,
    engine: Engine | None = None,
    kind: str = "trained",
) -> History:
    """Train `model` in place, on its device: SGD on loss + λ·Σ|γ| (Liu et al. 2017, eq. 1).

    With `checkpoint`, every finished epoch is saved there as a file of this `kind`. Called again,
    the run goes on after the last one, and a run that is finished just loads. `teacher` adds its
    predictions to the targets, weighted by `profile.distillation`.

    Raises ValueError for λ < 0 or data that do not fit the model; CheckpointError if the file was
    made with other settings, and which; DivergenceError if the run diverges: the file then holds
    the last sound epoch; MemoryError if a GPU is too small for the batch.
    """
    _require_fit(model, data, l1_lambda)
    device = next(model.parameters()).device
    data = data.to(device)
    if teacher is not None:
        teacher = teacher.to(device)
    settings = run_settings(model, data, profile, l1_lambda=l1_lambda, teacher=teacher)

    history, saved = History(), None
    with _only_writer(checkpoint):
        if checkpoint and Path(checkpoint).exists():
            saved = load(checkpoint, kind=kind)
            history, begun_with = _run_of(saved, checkpoint)
            _require_same(settings, saved.settings, checkpoint)
            if profile.precision != "auto":
                asked, made = ({"precision": e} for e in (profile.precision, begun_with.precision))
                _require_same(asked, made, checkpoint)
            model.load_state_dict(saved.state_dict)
            engine = _available(begun_with, device) or engine
            print(f"{checkpoint}: {len(history)} of {profile.epochs} epochs were done before")
            for epoch in range(len(history)):
                print(history.line(epoch, profile.epochs))
        if len(history) == profile.epochs:
            return history
        engine = engine or choose_engine(model, data, profile)
        print(engine)
        step = TrainStep(model, profile, engine, l1_lambda=l1_lambda, teacher=teacher)
        if saved:
            step.load_state_dict(saved.optimizer)
        with _progress_bar(data, profile, done=len(history)) as bar:
            for epoch in range(len(history), profile.epochs):
                history.append(**_run_epoch(step, data, profile, epoch, bar))
                bar.write(history.line(epoch, profile.epochs), file=sys.stdout)
                if checkpoint:
                    done = Checkpoint(
                        kind=kind,
                        cfg=model.cfg,
                        state_dict=model.state_dict(),
                        settings=settings,
                        history=asdict(history),
                        optimizer=step.state_dict(),
                        made_on=describe_machine(device),
                    )
                    save(checkpoint, done)
    return history


def _require_fit(model: VGG, data: ImageData, l1_lambda: float) -> None:
    if isinstance(l1_lambda, bool) or not (math.isfinite(l1_lambda) and l1_lambda >= 0):
        raise ValueError(f"l1_lambda = {l1_lambda!r}: must be a finite number of at least 0")
    outputs = model.classifier.out_features
    if outputs != len(data.classes):
        raise ValueError(f"num_classes = {outputs}: the data have {len(data.classes)} classes")


def _run_epoch(
    step: TrainStep, data: ImageData, profile: Profile, epoch: int, bar: tqdm
) -> dict[str, float]:
    """Train one epoch and test; the entries of History."""
    lr = learning_rate(profile, epoch)
    step.set_lr(lr)
    step.model.train()
    batches = data.train_batches(
        profile.batch_size,
        seed=profile.seed,
        epoch=epoch,
        crop_padding=profile.crop_padding,
        flip=profile.flip,
    )
    for images, labels in batches:
        step(images, labels)
        bar.update()
    loss, accuracy = step.read()
    test = evaluate(step.model, data.plain_batches("test", profile.test_batch_size))
    _require_sound(step.model, loss, test.loss, step.l1_lambda, lr, epoch)
    return {
        "lr": lr,
        "train_loss": loss,
        "train_accuracy": accuracy,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "sparsity": sparsity(step.model),
    }


def forecast(seconds: float, what: str) -> str:
    """A sentence: `what` takes `seconds` on this machine, and what to choose if that is long."""
    if seconds < 2 * 3600:
        return f"{what} take about {max(1, round(seconds / 60))} min here"
    return (
        f"{what} take about {seconds / 3600:.0f} hours here. Shorter: fewer epochs, a GPU, "
        "or a smaller profile (laptop is a sixteenth of the work of cifar10, quick takes minutes)"
    )


def run_settings(
    model: VGG,
    data: ImageData,
    profile: Profile,
    *,
    l1_lambda: float = 0.0,
    teacher: VGG | None = None,
) -> dict:
    """All that the result of `fit` follows from. Equal settings, equal run."""
    settings = {name: getattr(profile, name) for name in SETTINGS}
    settings |= {
        "l1_lambda": l1_lambda,
        "cfg": list(model.cfg),
        "data": data.fingerprint,
        "starting weights": weights_digest(model),
    }
    if teacher is not None:
        settings["distillation"] = profile.distillation
        settings["teacher weights"] = weights_digest(teacher)
    return settings


def weights_digest(model: nn.Module) -> str:
    """A short fingerprint of a network's weights and BN statistics: equal only for equal bits."""
    return digest(list(model.state_dict().values()))


def _require_same(wanted: dict, found: dict, path: str | Path) -> None:
    differ = [
        f"{name} = {found.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differ:
        raise CheckpointError(
            f"{path} was made with {'; '.join(differ)}. Set that back to go on with it, delete the "
            "file to start anew, or set run_name: a run of its own, with files of its own."
        )


def _run_of(saved: Checkpoint, path: str | Path) -> tuple[History, Engine]:
    """What a run needs to go on, but for weights and momentum, which `load` has checked."""
    try:
        return History(**saved.history), Engine(**saved.optimizer["engine"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no training can go on from this file ({error}). Delete or replace it."
        ) from error


def _available(engine: Engine, device: torch.device) -> Engine | None:
    """The engine that a run began with, if this device has it (on a CPU: to the last bit)."""
    if engine.device != device.type:
        return None
    return None if engine.precision == "bfloat16" and emulates_bfloat16(device) else engine


@contextmanager
def _only_writer(checkpoint: str | Path | None) -> Iterator[None]:
    """Hold a lock as long as this run writes `checkpoint`; the system frees it if the run dies."""
    if not checkpoint:
        yield
        return
    lock = file_lock(checkpoint, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"{checkpoint}: another notebook is writing this file now. Stop that one or wait for "
            "it, or set run_name: a run of its own."
        ) from None
    try:
        path = Path(checkpoint)
        for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            unfinished.unlink(missing_ok=True)  # of a run that was killed while saving
        yield
    finally:
        lock.release()


def _progress_bar(data: ImageData, profile: Profile, done: int) -> tqdm:
    steps = math.ceil(len(data.train_labels) / profile.batch_size)
    return tqdm(
        total=profile.epochs * steps,
        initial=done * steps,
        unit="step",
        smoothing=0,  # the time left from the mean speed, tests after each epoch included
        mininterval=0.5,
        leave=False,
        file=sys.stdout,
    )


def _require_sound(
    model: VGG, loss: float, test_loss: float, l1_lambda: float, lr: float, epoch: int
) -> None:
    guessing = math.log(model.classifier.out_features)
    finite = all(t.isfinite().all() for t in model.state_dict().values())
    # The test loss may be large for an epoch: the BN statistics lag behind the weights.
    if not (finite and loss < EXPLODED * guessing and math.isfinite(test_loss)):
        raise DivergenceError(
            f"diverged in epoch {epoch + 1}: mean loss {loss:.3g} (guessing has {guessing:.3g}), "
            f"on the test images {test_loss:.3g}, weights {'finite' if finite else 'not finite'}, "
            f"at λ = {l1_lambda:g} and lr = {lr:g}. Lower one of them; the checkpoint keeps the "
            "last sound epoch."
        )
