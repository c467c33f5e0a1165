"""One SGD step with the L1 penalty on γ, in plain sight. What a GPU does to it: engine.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.profile import Profile
from utils.sparsity import add_l1_subgradient

Penalty = Callable[[nn.Module, float], None]
"""Adds the gradient of λ·Σ|γ| to γ.grad: called with the model and λ after `backward()`."""

DISTILLATION_TEMPERATURE = 4.0
"""Softens the teacher's logits, so that its view of wrong classes counts (Hinton et al. 2015)."""


def layout(device: torch.device) -> torch.memory_format:
    """How images and weights lie in memory on `device`: channels_last, but not on Apple's GPU,
    where torch computes wrong gradients of BN in it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class TrainStep:
    """Forward, loss, backward, λ·sign(γ), update: it gives `model` and `teacher` their `layout` in
    place. Nothing in it waits for the device; the scores stay there until `read` asks for them."""

    def __init__(
        self,
        model: nn.Module,
        profile: Profile,
        precision: str,
        *,
        l1_lambda: float,
        penalty: Penalty = add_l1_subgradient,
        teacher: nn.Module | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.layout = layout(device)
        self.model = model.to(memory_format=self.layout).train()
        self.teacher = teacher and teacher.to(memory_format=self.layout).eval()
        self.l1_lambda, self.penalty = l1_lambda, penalty
        self.distillation = profile.distillation if teacher is not None else 0.0
        # On CUDA it lies on the device, so that a captured graph reads it anew at every step.
        lr = torch.tensor(profile.lr, device=device) if device.type == "cuda" else profile.lr
        how = {name: getattr(profile, name) for name in ("momentum", "weight_decay", "nesterov")}
        self.optimizer = torch.optim.SGD(model.parameters(), lr, fused=True, **how)
        for p in model.parameters():  # exists from the first step on: a graph can't make it later
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # No cache of cast weights: it would outlive the capture of a CUDA graph.
        lower = None if precision == "float32" else getattr(torch, precision)
        self.autocast = torch.autocast(device.type, lower, enabled=bool(lower), cache_enabled=False)
        # float16 alone has too small a range for gradients; they are scaled up and back.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self.scores: list[tuple[Tensor, int]] = []

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.scores.append((self.compute(images, labels), len(labels)))

    def compute(self, images: Tensor, labels: Tensor) -> Tensor:
        """The step itself; returns the `score` of the batch."""
        self.optimizer.zero_grad(set_to_none=True)
        images = images.contiguous(memory_format=self.layout)
        with self.autocast:
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels)
            if self.distillation:
                with torch.no_grad():
                    wanted = self.teacher(images).float()
                loss = torch.lerp(loss, softened_distance(logits, wanted), self.distillation)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)  # before the penalty: on scaled gradients it vanishes
        self.penalty(self.model, self.l1_lambda)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return score(loss, logits, labels)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        (group,) = self.optimizer.param_groups
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in % since the last call: the one moment that waits."""
        loss, correct, images = add_up(self.scores)
        self.scores.clear()
        return loss, 100 * correct / images

    def state_dict(self) -> dict:
        """What the next step needs beyond the weights."""
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]
        return {"momentum": momentum, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for p, saved in zip(self.model.parameters(), state["momentum"], strict=True):
            self.optimizer.state[p]["momentum_buffer"].copy_(saved)
        if state["scaler"]:  # empty unless the run is float16
            self.scaler.load_state_dict(state["scaler"])


@torch.no_grad()
def score(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a batch and how many of it are right, as one tensor on its device."""
    return torch.stack([loss, (logits.argmax(1) == labels).sum().to(loss.dtype)])


def add_up(scores: list[tuple[Tensor, int]]) -> tuple[float, int, int]:
    """Mean loss, right ones and images of batches given as (`score`, images), in Python's numbers:
    a sum wants double precision, which Apple's GPU lacks."""
    batches = torch.stack([score for score, _ in scores]).tolist()
    counts = [count for _, count in scores]
    loss = sum(loss * count for (loss, _), count in zip(batches, counts, strict=True))
    return loss / sum(counts), int(sum(correct for _, correct in batches)), sum(counts)


def softened_distance(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback–Leibler divergence of softened predictions; T² keeps its gradient's size."""
    t = DISTILLATION_TEMPERATURE
    ours, theirs = F.log_softmax(logits / t, 1), F.log_softmax(wanted / t, 1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * t**2
