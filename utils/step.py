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


class TrainStep:
    """Forward, loss, backward, λ·sign(γ), update. Nothing in it waits for the device.

    `model` and `teacher` are laid out channels_last in place, the teacher set to evaluate. Loss and
    accuracy add up on the device until `read` asks for them.
    """

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
        self.model = model.to(memory_format=torch.channels_last).train()
        self.teacher = teacher and teacher.to(memory_format=torch.channels_last).eval()
        self.precision, self.l1_lambda, self.penalty = precision, l1_lambda, penalty
        self.distillation = profile.distillation if teacher is not None else 0.0
        on_cuda = device.type == "cuda"
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            # On the device, so that a captured graph reads it anew at every step.
            lr=torch.tensor(float(profile.lr), device=device) if on_cuda else profile.lr,
            momentum=profile.momentum,
            weight_decay=profile.weight_decay,
            nesterov=profile.nesterov,
            fused=True,
        )
        for p in model.parameters():  # exists from the first step on: a graph can't make it later
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # float16 alone has too small a range for gradients; they are scaled up and back.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast(images.device.type):
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
        self._count(loss.detach(), logits, labels)

    def _autocast(self, device: str) -> torch.autocast:
        # No cache of cast weights: it would outlive the capture of a CUDA graph, and within one
        # step each weight is cast just once anyway.
        dtype, lower = getattr(torch, self.precision), self.precision != "float32"
        return torch.autocast(device, dtype=dtype, enabled=lower, cache_enabled=False)

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            count = torch.full_like(loss, len(labels))
            self.totals += torch.stack([loss * count, correct, count])

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy in % since the last call: the one moment that waits."""
        loss, correct, count = self.totals.tolist()
        self.totals.zero_()
        return loss / count, 100 * correct / count

    def state_dict(self) -> dict:
        """What the next step needs beyond the weights."""
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]
        return {"momentum": momentum, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            for p, saved in zip(self.model.parameters(), state["momentum"], strict=True):
                self.optimizer.state[p]["momentum_buffer"].copy_(saved)
        if state["scaler"]:  # empty unless the run is float16
            self.scaler.load_state_dict(state["scaler"])


def softened_distance(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback–Leibler divergence of softened predictions; T² keeps its gradient's size."""
    t = DISTILLATION_TEMPERATURE
    divergence = F.kl_div(
        F.log_softmax(logits / t, 1), F.log_softmax(wanted / t, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    return divergence * t**2
