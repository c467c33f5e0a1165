"""fit() and evaluate(): load, loop, save. One step of it is step.py's matter."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.vgg import VGG
from utils.engine import choose_engine, fits_in_memory, make_step
from utils.images.data import ImageData
from utils.profile import Profile
from utils.sparsity import add_l1_subgradient, sparsity
from utils.step import Penalty, TrainStep
from utils.store.checkpoint import Checkpoint, History, save
from utils.store.resume import only_writer, resume, training_settings

EXPLODED = 100.0
"""A mean loss this many times that of guessing means that the run has diverged."""


class DivergenceError(RuntimeError):
    """The loss or a weight is no longer a sensible number."""


class Stopped(KeyboardInterrupt):
    """The stop button: a notebook shows one line instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, accuracy in %, and how many of how many images were right."""

    loss: float
    accuracy: float
    correct: int
    images: int

    def __str__(self) -> str:
        return (
            f"Average loss: {self.loss:.4f}, Accuracy: {self.correct}/{self.images} "
            f"({self.accuracy:.2f} %)"
        )


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

    Leaves `model` in the mode it was in. Raises ValueError without a batch.
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
    return Evaluation(loss / count, 100 * correct / count, int(correct), int(count))


def fit(
    model: VGG,
    data: ImageData,
    profile: Profile,
    *,
    l1_lambda: float = 0.0,
    penalty: Penalty = add_l1_subgradient,
    checkpoint: str | Path | None = None,
    teacher: VGG | None = None,
    kind: str = "trained",
    label: str = "",
    on_epoch: Callable[[History], None] | None = None,
    quiet: bool = False,
    save_every: float = 60.0,
) -> History:
    """Train `model` in place, on its device: SGD on loss + λ·Σ|γ| (Liu et al. 2017, eq. 1).

    `penalty(model, l1_lambda)` adds the penalty's gradient to γ.grad; on a GPU it is recorded once
    and replayed, so it may depend on the model and λ only, not on a count of its own. `teacher`
    adds its predictions to the targets, weighted by `profile.distillation`. With `checkpoint`, the
    last finished epoch is saved there as a file of this `kind`: at the end, and before it at most
    every `save_every` seconds. Called again, the run goes on after it; a run that is finished just
    loads. `label` names the training on the progress bar; `on_epoch` is called after each epoch,
    and at once with the epochs of a run that goes on. `quiet`: one line for all epochs together.

    Raises ValueError for λ < 0 or data that do not fit the model; CheckpointError if the file was
    made with other settings, and which; DivergenceError if the run diverges: the file then holds
    the last sound epoch saved; MemoryError if a GPU is too small for the batch; Stopped at the stop
    button.
    """
    _require_fit(model, data, l1_lambda)
    device = next(model.parameters()).device
    data, teacher = data.to(device), teacher and teacher.to(device)
    engine = choose_engine(model, data, profile)
    settings = training_settings(
        model, data, profile, engine.precision,
        l1_lambda=l1_lambda, penalty=penalty, teacher=teacher,
    )  # fmt: skip
    with only_writer(checkpoint):
        history, state = resume(checkpoint, kind, settings, model)
        if history and not quiet:
            done = f"{len(history)} of {profile.epochs} epochs were done before"
            print(f"{label or kind}: {done} ({checkpoint})")
            print(history.line(profile.epochs))
        if history and on_epoch:
            on_epoch(history)
        if len(history) == profile.epochs:
            return history
        if not quiet:
            print(f"{label or kind}: {engine}")
        step = make_step(
            model, profile, engine, l1_lambda=l1_lambda, penalty=penalty, teacher=teacher
        )
        if state:
            step.load_state_dict(state)
        saved, saved_at = len(history), time.monotonic()
        with _progress(label, profile, data, history) as bar:
            try:
                for epoch in range(len(history), profile.epochs):
                    history.append(**_run_epoch(step, data, profile, epoch, bar))
                    last = len(history) == profile.epochs
                    if last or not quiet:
                        line = history.line(profile.epochs)
                        bar.write(f"{label}: {line}" if quiet else line, file=sys.stdout)
                    if checkpoint and (last or time.monotonic() - saved_at >= save_every):
                        weights, entries = model.state_dict(), asdict(history)
                        state = {} if last else step.state_dict()
                        done = Checkpoint(kind, model.cfg, weights, settings, entries, state)
                        save(checkpoint, done)
                        saved, saved_at = len(history), time.monotonic()
                    if on_epoch:
                        on_epoch(history)
            except KeyboardInterrupt:
                kept = f"{saved} of {profile.epochs} epochs are" if checkpoint else "nothing is"
                raise Stopped(f"stopped; {kept} saved; run this cell again to go on") from None
    model.zero_grad()  # as large as the network, and of no more use
    return history


def _progress(label: str, profile: Profile, data: ImageData, history: History) -> tqdm:
    """A bar over all steps of a training, those of the epochs in `history` done."""
    steps = len(data.train_batch_sizes(profile.batch_size))
    return tqdm(
        desc=label,
        total=profile.epochs * steps,
        initial=len(history) * steps,
        unit="step",
        smoothing=0,  # the time left from the mean speed, tests after each epoch included
        mininterval=0.5,
        leave=False,
        file=sys.stdout,
    )


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
    with fits_in_memory("batch_size", profile.batch_size):
        for images, labels in batches:
            step(images, labels)
            bar.update()
    loss, accuracy = step.read()
    with fits_in_memory("test_batch_size", profile.test_batch_size):
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


def _require_fit(model: VGG, data: ImageData, l1_lambda: float) -> None:
    number = isinstance(l1_lambda, int | float) and not isinstance(l1_lambda, bool)
    if not number or not (math.isfinite(l1_lambda) and l1_lambda >= 0):
        raise ValueError(f"l1_lambda = {l1_lambda!r}: must be a finite number of at least 0")
    outputs, classes = model.classifier.out_features, len(data.classes)
    if outputs != classes:
        way_out = f"build VGG(cfg, num_classes={classes})"
        raise ValueError(f"num_classes = {outputs}: the data have {classes} classes; {way_out}")


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
            f"at λ = {l1_lambda:g} and lr = {lr:g}. Lower one of them. (The checkpoint, if one "
            "was saved, holds a sound epoch.)"
        )
