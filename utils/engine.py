"""How a training step is computed on this machine: its precision, and on CUDA its graph.

None of it changes what is computed, beyond rounding: `TrainStep` in step.py says what.
"""

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.images.data import ImageData
from utils.profile import Profile
from utils.step import TrainStep


@dataclass(frozen=True)
class Engine:
    """The way of computing chosen for a device. The memory layout is channels_last everywhere."""

    device: str
    precision: str
    graph: bool = False

    def __str__(self) -> str:
        how = f"{self.precision} channels_last"
        if self.device == "cpu":
            threads = torch.get_num_threads()
            return f"{how} on {threads} CPU thread{'s' if threads > 1 else ''}"
        graph = ", one CUDA graph a step" if self.graph else ""
        return f"{how} on {torch.cuda.get_device_name()}{graph}"


def fast_precision(device: torch.device | str) -> str:
    """The precision that `device` computes fast, from a fixed table of hardware; never timed.

    CUDA, by compute capability: bfloat16 from 8 on, float16 for 7 (a T4 claims bfloat16, but
    emulates it), float32 below. A CPU: bfloat16 with AMX, or with the AVX512-BF16 of an AMD core or
    Cooper Lake. Intel's cores since Sapphire Rapids, known by their AVX512-FP16, compute bfloat16
    in AMX: where a virtual machine hides that, their AVX512-BF16 has 0.6 of float32's rate.
    """
    device = torch.device(device)
    if device.type == "cuda":
        generation = torch.cuda.get_device_capability(device)[0]
        return {7: "float16"}.get(generation, "bfloat16" if generation >= 8 else "float32")
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch can't tell
    has = {name for name, there in capabilities.items() if there}
    fast = "amx_bf16" in has or ("avx512_bf16" in has and "avx512_fp16" not in has)
    return "bfloat16" if device.type == "cpu" and fast else "float32"


def choose_engine(model: nn.Module, data: ImageData, profile: Profile) -> Engine:
    """How to train `model` on its device: the same answer every time on one machine.

    `profile.precision` decides, or if it is "auto" the hardware (`fast_precision`).
    """
    device = next(model.parameters()).device
    auto = profile.precision == "auto"
    precision = fast_precision(device) if auto else profile.precision
    # No graph for float16, which only older GPUs need (a T4, by estimate, 16 ms for a step): there
    # launches are no limit, and the scaler's state need not be part of a graph.
    graph = device.type == "cuda" and profile.cuda_graph and precision != "float16"
    return Engine(device.type, precision, graph)


def make_step(model: nn.Module, profile: Profile, engine: Engine, **options) -> TrainStep:
    """The training step of `model`, as `engine` computes it; `options` are those of TrainStep."""
    kind = GraphedStep if engine.graph else TrainStep
    return kind(model, profile, engine.precision, **options)


@contextmanager
def fits_in_memory(setting: str, value: int) -> Iterator[None]:
    """Raise MemoryError that names the setting if a GPU is too small for what runs inside."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(
            f"{setting} = {value}: too large for this GPU; lower it, or shut down what else holds "
            "its memory, such as other notebooks (nvidia-smi lists it)"
        ) from error


def seconds_per_epoch(model: nn.Module, data: ImageData, profile: Profile) -> float:
    """How long an epoch of training and testing takes, from a few steps on a copy.

    Raises MemoryError if a GPU is too small for the batch.
    """
    engine = choose_engine(model, data, profile)
    copied = copy.deepcopy(model)
    step = make_step(copied, profile, engine, l1_lambda=0.0)
    images, labels = next(data.plain_batches("train", profile.batch_size))
    with fits_in_memory("batch_size", profile.batch_size):
        _seconds(lambda: step(images, labels))  # warms up
        training = min(_seconds(lambda: step(images, labels)) for _ in range(2))
    images, _ = next(data.plain_batches("test", profile.test_batch_size))
    images = images.contiguous(memory_format=torch.channels_last)
    copied.eval()
    with torch.inference_mode(), fits_in_memory("test_batch_size", profile.test_batch_size):
        if engine.device == "cuda":
            _seconds(lambda: copied(images))  # a GPU's first call loads kernels
        testing = _seconds(lambda: copied(images))
    batches = len(data.train_labels) / profile.batch_size
    return training * batches + testing * len(data.test_labels) / len(images)


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class GraphedStep(TrainStep):
    """On CUDA the whole step is captured once as a graph and replayed, so that Python's time
    between two kernels does not count. If the capture is refused, each step is launched by itself.
    """

    graph: torch.cuda.CUDAGraph | None = None
    inputs: tuple[Tensor, Tensor]
    refused = False

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        if self.graph is None and not self.refused:
            with torch.cuda.device(images.device):
                self._try_to_capture(images, labels)
        if self.graph is None or len(images) != len(self.inputs[0]):  # the epoch's last batch
            super().__call__(images, labels)
            return
        self.inputs[0].copy_(images)
        self.inputs[1].copy_(labels)
        self.graph.replay()

    def _try_to_capture(self, images: Tensor, labels: Tensor) -> None:
        current = torch.cuda.current_stream()
        state = [*self._state()]
        before = [t.detach().clone() for t in state]
        try:
            self._capture(images.clone(), labels.clone())
        except RuntimeError as error:
            # What goes wrong in a capture makes ending it go wrong, too; the first one tells.
            cause = error.__context__ or error
            if not isinstance(cause, RuntimeError) or isinstance(
                cause, torch.cuda.OutOfMemoryError
            ):
                raise cause from None
            self.refused = True
            reason = f"{cause}".partition("\n")[0]
            print(
                f"no CUDA graph here ({reason}): each step is launched by itself, a little slower"
            )
        finally:  # warming up has changed the model; a failed capture may leave its stream current
            torch.cuda.set_stream(current)
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):  # torch and its libraries allocate what they need
                super().__call__(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        # thread_local: another thread may pin memory meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            super().__call__(images, labels)
        current.wait_stream(stream)
        self.graph, self.inputs = graph, (images, labels)

    def _state(self) -> Iterable[Tensor]:
        """All that a step changes."""
        yield from self.model.state_dict(keep_vars=True).values()
        for state in self.optimizer.state.values():
            yield state["momentum_buffer"]
        yield self.totals
