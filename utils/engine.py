"""How a training step is computed on this machine: precision, memory layout, CUDA graph.

None of it changes what is computed, beyond rounding: `fit` in training.py says what.
"""

import copy
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config import Profile
from utils.data import ImageData
from utils.sparsity import add_l1_subgradient

DISTILLATION_TEMPERATURE = 4.0
"""Softens the teacher's logits, so that its view of wrong classes counts (Hinton et al. 2015)."""

PROBE_BATCH = 32
PROBE_GAIN = 1.1
"""A lower precision must be at least this much faster, or float32 stays."""


@dataclass(frozen=True)
class Engine:
    """The way of computing chosen for a device. The memory layout is channels_last everywhere."""

    device: str
    precision: str

    def __str__(self) -> str:
        how = f"{self.precision} channels_last"
        if self.device == "cpu":
            return f"{how} on {torch.get_num_threads()} CPU threads"
        graph = "" if self.precision == "float16" else ", one CUDA graph a step"
        return f"{how} on {torch.cuda.get_device_name()}{graph}"

    def autocast(self) -> torch.autocast:
        # No cache of cast weights: it would outlive the capture of a CUDA graph, and within one
        # step each weight is cast just once anyway.
        return torch.autocast(
            self.device,
            dtype=getattr(torch, self.precision),
            enabled=self.precision != "float32",
            cache_enabled=False,
        )


def choose_engine(model: nn.Module, data: ImageData, profile: Profile) -> Engine:
    """The fastest way to train `model` on its device, unless `profile.precision` says which.

    On CUDA the hardware's generation decides. A CPU with AVX2 alone would emulate bfloat16 and be
    many times slower; on others a timed step of each decides.
    """
    device = next(model.parameters()).device
    if profile.precision != "auto":
        return Engine(device.type, profile.precision)
    if emulates_bfloat16(device):
        # The tensor cores of a T4 (7.5) take float16.
        float16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 7
        return Engine(device.type, "float16" if float16 else "float32")
    if device.type == "cuda":
        return Engine("cuda", "bfloat16")
    exact, lower = Engine(device.type, "float32"), Engine(device.type, "bfloat16")
    seconds = {e: _time_steps(model, data, profile, e, PROBE_BATCH) for e in (exact, lower)}
    return lower if seconds[lower] * PROBE_GAIN < seconds[exact] else exact


def emulates_bfloat16(device: torch.device) -> bool:
    """True where bfloat16 is known to be far slower than float32. (A T4 claims to support it.)"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] < 8
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def seconds_per_epoch(
    model: nn.Module,
    data: ImageData,
    profile: Profile,
    engine: Engine,
    teacher: nn.Module | None = None,
) -> float:
    """How long an epoch of training and testing takes, from a few steps on a copy."""
    step = _time_steps(model, data, profile, engine, profile.batch_size, teacher)
    images, _ = next(data.plain_batches("test", profile.test_batch_size))
    images = images.contiguous(memory_format=torch.channels_last)
    tester = copy.deepcopy(model).eval()
    with torch.inference_mode():
        for _ in range(2 if engine.device == "cuda" else 1):  # a GPU's first call loads kernels
            start = time.perf_counter()
            tester(images)
            _wait(engine.device)
            test = (time.perf_counter() - start) / len(images) * len(data.test_labels)
    return step * len(data.train_labels) / profile.batch_size + test


def _time_steps(
    model: nn.Module,
    data: ImageData,
    profile: Profile,
    engine: Engine,
    batch_size: int,
    teacher: nn.Module | None = None,
) -> float:
    """Seconds of one training step: the faster of two, after one that warms up."""
    step = TrainStep(copy.deepcopy(model), profile, engine, l1_lambda=0.0, teacher=teacher)
    images, labels = next(data.plain_batches("train", batch_size))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        step(images, labels)
        _wait(engine.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class TrainStep:
    """One SGD step: forward, loss, backward, λ·sign(γ), update. Nothing in it waits for the device.

    On CUDA the whole step is captured once as a graph and replayed, so that Python's time between
    two kernels does not count. Loss and accuracy add up on the device until `read` asks for them.
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile,
        engine: Engine,
        *,
        l1_lambda: float,
        teacher: nn.Module | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.model = model.to(memory_format=torch.channels_last).train()
        if teacher is not None:
            teacher = teacher.to(memory_format=torch.channels_last).eval()
        self.teacher = teacher
        self.engine = engine
        self.l1_lambda = l1_lambda
        self.distillation = profile.distillation if teacher is not None else 0.0
        on_cuda = engine.device == "cuda"
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
        self.scaler = torch.amp.GradScaler(engine.device, enabled=engine.precision == "float16")
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
        # A T4 is estimated to need 16 ms for a float16 step: its launches are no limit, so the
        # scaler's state need not be part of a graph.
        self.capture = on_cuda and engine.precision != "float16"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        try:
            self._run(images, labels)
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryError(
                f"batch_size = {len(images)}: too large for the memory of this GPU; lower it"
            ) from error

    def _run(self, images: Tensor, labels: Tensor) -> None:
        if self.capture and self.graph is None:
            self._capture(images, labels)
        if self.graph is None or len(images) != len(self.inputs[0]):  # a last, smaller batch
            self._step(images, labels)
            return
        self.inputs[0].copy_(images)
        self.inputs[1].copy_(labels)
        self.graph.replay()

    def set_lr(self, lr: float) -> None:
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
        return {
            "momentum": momentum,
            "scaler": self.scaler.state_dict(),
            "engine": asdict(self.engine),
        }

    def load_state_dict(self, state: dict) -> None:
        with torch.no_grad():
            for p, saved in zip(self.model.parameters(), state["momentum"], strict=True):
                self.optimizer.state[p]["momentum_buffer"].copy_(saved)
        if state["scaler"]:  # empty unless the run was float16
            self.scaler.load_state_dict(state["scaler"])

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        images = images.contiguous(memory_format=torch.channels_last)
        with self.engine.autocast():
            logits = self.model(images).float()
            loss = F.cross_entropy(logits, labels)
            if self.distillation:
                with torch.no_grad():
                    wanted = self.teacher(images).float()
                loss = torch.lerp(loss, _distance(logits, wanted), self.distillation)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)  # before the penalty: on scaled gradients it vanishes
        add_l1_subgradient(self.model, self.l1_lambda)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            batch = torch.stack([loss.detach() * len(labels), correct, torch.ones_like(loss)])
            batch[2] *= len(labels)
            self.totals += batch

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.inputs = (images.clone(), labels.clone())
        state = [*self._state()]
        before = [t.detach().clone() for t in state]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # cuDNN chooses its algorithms, torch allocates
                    self._step(*self.inputs)
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step(*self.inputs)  # thread_local: a loader's thread may pin memory
        finally:  # after a failure, too, the model is as it was: nothing on the stream may follow
            torch.cuda.current_stream().wait_stream(stream)
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        self.graph = graph

    def _state(self) -> Iterable[Tensor]:
        """All that a step changes."""
        yield from self.model.state_dict(keep_vars=True).values()
        for state in self.optimizer.state.values():
            yield state["momentum_buffer"]
        yield self.totals


def _distance(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback–Leibler divergence of softened predictions; T² keeps its gradient's size."""
    t = DISTILLATION_TEMPERATURE
    divergence = F.kl_div(
        F.log_softmax(logits / t, 1), F.log_softmax(wanted / t, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    return divergence * t**2
