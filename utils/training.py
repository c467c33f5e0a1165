"""fit() and evaluate(): load, loop, save. One step of it is step.py's matter."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.vgg import VGG
from utils.engine import choose_engine, fits_in_memory, make_step
from utils.images.data import ImageData
from utils.profile import SETTINGS, Profile
from utils.sparsity import add_l1_subgradient, bn_layers, require_trainable, sparsity
from utils.step import Penalty, TrainStep, add_up, layout, score
from utils.store.checkpoint import COLUMNS, Checkpoint, History, save
from utils.store.files import digest, one_at_a_time
from utils.store.identity import follows_from, weights_digest
from utils.store.resume import resume


class DivergenceError(RuntimeError):
    """The loss or a weight is no longer a sensible number."""


class Stopped(KeyboardInterrupt):
    """The stop button: a notebook shows one line instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Evaluation(NamedTuple):
    """Mean cross-entropy, accuracy in %, and how many of how many images were right."""

    loss: float
    accuracy: float
    correct: int
    images: int

    def __str__(self) -> str:
        right = f"{self.correct}/{self.images} ({self.accuracy:.2f} %)"
        return f"Average loss: {self.loss:.4f}, Accuracy: {right}"


def learning_rate(profile: Profile, epoch: int) -> float:
    """The learning rate of `epoch`, which counts from 0. It is constant within an epoch."""
    if profile.schedule == "step":
        # Whole-number milestones: for 5 epochs, 5 · 0.5 = 2.5 would never be met.
        drops = (profile.epochs // 2 <= epoch) + (profile.epochs * 3 // 4 <= epoch)
        return profile.lr * 0.1**drops if profile.epochs >= 4 else profile.lr
    if epoch < (warmup := int(profile.epochs >= 4)):
        return profile.lr / 2
    progress = (epoch - warmup + 0.5) / (profile.epochs - warmup)
    return profile.lr * (1 + math.cos(math.pi * progress)) / 2


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Loss and accuracy over (images, labels) batches, in float32, with the running BN statistics.
    Leaves `model` in the mode it was in. Raises ValueError without a batch."""
    was_training = model.training
    model.eval()
    scores = []
    with torch.inference_mode():
        for images, labels in batches:
            logits = model(images.contiguous(memory_format=layout(images.device)))
            scores.append((score(F.cross_entropy(logits, labels), logits, labels), len(labels)))
    model.train(was_training)
    if not scores:
        raise ValueError("evaluate: no batches given; pass at least one batch of images")
    loss, correct, count = add_up(scores)
    return Evaluation(loss, 100 * correct / count, correct, count)


def training_facts(
    model: VGG, data: ImageData, profile: Profile, *, l1_lambda: float = 0.0,
    penalty: Penalty = add_l1_subgradient, teacher: VGG | None = None,
) -> dict:  # fmt: skip
    """All that the result of `fit` follows from, `model` being what it starts with."""
    more = {"precision": choose_engine(model, data, profile).precision, "images": data.digest}
    more |= {"l1_lambda": l1_lambda, "penalty": _effect(penalty, l1_lambda)}
    if teacher is not None:
        more |= {"distillation": profile.distillation, "teacher": weights_digest(teacher)}
    start = {"cfg": model.cfg, "starts_from": weights_digest(model)}
    return follows_from(profile, SETTINGS, **more, **start)


def _effect(penalty: Penalty, l1_lambda: float) -> str:
    """What `penalty` does to the gradients of a small network, whatever its source looks like."""
    with torch.random.fork_rng(devices=[]):
        probe = VGG([4, "M", 2], num_classes=2)
    for bn in bn_layers(probe):
        bn.weight.data = torch.tensor([0.5, -2.0, 0.0, 1e-6])[: bn.num_features]
    for p in probe.parameters():
        p.grad = torch.full_like(p, 0.25)
    penalty(probe, l1_lambda)
    return digest([p.grad for p in probe.parameters()])


def fit(
    model: VGG, data: ImageData, profile: Profile, *, l1_lambda: float = 0.0,
    penalty: Penalty = add_l1_subgradient, checkpoint: str | Path | None = None,
    teacher: VGG | None = None, kind: str = "trained", label: str = "training",
    on_epoch: Callable[[History], None] | None = None, save_every: float = 60.0,
) -> History:  # fmt: skip
    """Train `model` in place, on its device: SGD on loss + λ·Σ|γ| (Liu et al. 2017, eq. 1).

    `penalty(model, l1_lambda)` adds the penalty's gradient to γ.grad, from nothing else than these
    two: on a GPU it is recorded once and replayed. `teacher` adds its predictions to the targets,
    weighted by `profile.distillation`. The last epoch is saved at `checkpoint` as a file of this
    `kind`: at the end, and before it at most every `save_every` seconds. Called again, the training
    goes on after it, or just loads. `on_epoch` shows the epochs; then only the last is printed.

    Raises ValueError for λ < 0 or data that do not fit the model; CheckpointError if the file was
    made with other settings; DivergenceError (the file then holds a sound epoch); MemoryError if a
    GPU is too small for the batch; Stopped at the stop button."""
    _require_fit(model, data, l1_lambda)
    device, epochs = next(model.parameters()).device, profile.epochs
    data, teacher = data.to(device), teacher and teacher.to(device)
    how = {"l1_lambda": l1_lambda, "penalty": penalty, "teacher": teacher}
    facts = training_facts(model, data, profile, **how)
    with one_at_a_time(checkpoint, wait=False) if checkpoint else nullcontext():
        history, state = resume(checkpoint, kind, facts, model)
        if history and on_epoch:
            on_epoch(history)
        if len(history) == epochs:
            print(f"{label}: {history.line(epochs)} (done before)")
            return history
        if history:
            print(f"{label}: goes on after epoch {len(history)} of {epochs}")
        step = make_step(model, profile, choose_engine(model, data, profile), **how)
        if state:
            step.load_state_dict(state)
        saved, saved_at = len(history), time.monotonic()
        steps = len(data.train_batch_sizes(profile.batch_size))
        how = {"desc": label, "initial": saved * steps, "unit": "step", "leave": False}
        with tqdm(total=epochs * steps, smoothing=0, file=sys.stdout, **how) as bar:
            try:
                while len(history) < epochs:
                    history.append(**_run_epoch(step, data, profile, len(history), bar))
                    last = len(history) == epochs
                    if checkpoint and (last or time.monotonic() - saved_at >= save_every):
                        values = model.state_dict(), facts, asdict(history)
                        going_on = {} if last else step.state_dict()
                        save(checkpoint, Checkpoint(kind, model.cfg, *values, going_on))
                        saved, saved_at = len(history), time.monotonic()
                    if on_epoch:
                        on_epoch(history)
                    if last or not on_epoch:
                        bar.write(f"{label}: {history.line(epochs)}", file=sys.stdout)
            except KeyboardInterrupt:
                kept = f"{saved} of {epochs} epochs are" if checkpoint else "nothing is"
                raise Stopped(f"stopped; {kept} saved; run this cell again to go on") from None
    return history


def _run_epoch(step: TrainStep, data: ImageData, profile: Profile, epoch: int, bar: tqdm) -> dict:
    """Train one epoch and test; an entry for each column of History."""
    lr = learning_rate(profile, epoch)
    step.set_lr(lr)
    step.model.train()
    how = {"seed": profile.seed, "crop_padding": profile.crop_padding, "flip": profile.flip}
    with fits_in_memory("batch_size", profile.batch_size):
        for images, labels in data.train_batches(profile.batch_size, epoch=epoch, **how):
            step(images, labels)
            bar.update()
    loss, accuracy = step.read()
    with fits_in_memory("test_batch_size", profile.test_batch_size):
        test = evaluate(step.model, data.plain_batches("test", profile.test_batch_size))
    _require_sound(step, loss, test.loss, f"epoch {epoch + 1}", lr)
    numbers = lr, loss, accuracy, test.loss, test.accuracy, sparsity(step.model)
    return dict(zip(COLUMNS, numbers, strict=True))


def _require_fit(model: VGG, data: ImageData, l1_lambda: float) -> None:
    if not (math.isfinite(l1_lambda) and l1_lambda >= 0):
        raise ValueError(f"l1_lambda = {l1_lambda!r}: must be a finite number of at least 0")
    require_trainable(model, l1_lambda)
    if (outputs := model.classifier.out_features) != (classes := len(data.classes)):
        raise ValueError(f"num_classes = {outputs}: the data have {classes} classes")


def _require_sound(step: TrainStep, loss: float, test_loss: float, epoch: str, lr: float) -> None:
    guessing = math.log(step.model.classifier.out_features)
    finite = all(t.isfinite().all() for t in step.model.state_dict().values())
    # The test loss may be large for an epoch: the BN statistics lag behind the weights.
    if not (finite and loss < 100 * guessing and math.isfinite(test_loss)):
        losses = f"mean loss {loss:.3g} (guessing has {guessing:.3g}), in the test {test_loss:.3g}"
        cause = f"at λ = {step.l1_lambda:g} and lr = {lr:g}. Lower one of them"
        raise DivergenceError(f"diverged in {epoch}: {losses}, {cause}; a checkpoint is sound.")
