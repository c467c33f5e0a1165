"""How this machine computes the step of step.py: device, precision, CUDA graph. Rounding alone
depends on it."""

import copy
import ctypes
import itertools
import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.images.data import ImageData
from utils.profile import Profile
from utils.step import TrainStep


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`: "cpu", "cuda" (the first that works), "cuda:1", "mps". Without one
    that of LAB_DEVICE; without that CUDA where it works, else the CPU, and a line says why.
    A CUDA device becomes the current one, and convolves in float32, not in TF32. Raises ValueError
    for a device that torch can't use here, and says which it can."""
    field = "device_name" if name else "LAB_DEVICE"
    name = (name or os.environ.get("LAB_DEVICE", "")).strip().lower()
    gpus, without = _cuda_devices()
    here = ["cpu", *gpus] + ["mps"] * torch.backends.mps.is_available()
    chosen = gpus[0] if gpus and name in ("", "cuda") else name or "cpu"
    if chosen not in here:
        raise ValueError(f"{field} = {name!r}: {without}; choose one of {', '.join(here)}")
    device = torch.device(chosen)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    elif device.type == "mps":
        print("Running on Apple's GPU, in float32. (We have not run the lab on a Mac ourselves.)")
    elif platform.system() == "Linux":
        # glibc is to keep the blocks that a step frees: fetching them anew is a sixth of its time.
        for setting, value in ((-1, 2**31 - 1), (-4, 0)):  # M_TRIM_THRESHOLD, M_MMAP_MAX
            ctypes.CDLL(None).mallopt(setting, value)
    if device.type == "cpu" and not name:
        print(f"{without} — running on the CPU; quick (minutes), laptop (hours) are made for it.")
        print("In Colab: Runtime → Change runtime type → GPU. On a Mac: LAB_DEVICE=mps.")
    return device


def _cuda_devices() -> tuple[list[str], str]:
    """The CUDA devices that this torch computes on, and why no other GPU is used. (Kernels built
    for sm_XY run on X.Y up to X.9, for compute_XY on all from X.Y on; AMD's have other names.)"""
    if not torch.cuda.is_available():
        no_use = f"torch {torch.__version__} has no CUDA (see pytorch.org) or its driver is too old"
        return [], no_use if shutil.which("nvidia-smi") else "No CUDA GPU found"
    usable, unusable = [], []
    archs = " ".join(torch.cuda.get_arch_list())
    built = [(kind, int(xy)) for kind, xy in re.findall(r"\b(sm|compute)_(\d+)", archs)]
    for k in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(k)
        older = [(kind, xy) for kind, xy in built if xy <= 10 * major + minor]
        if not built or any(kind == "compute" or xy // 10 == major for kind, xy in older):
            usable.append(f"cuda:{k}")
        else:
            unusable.append(f"cuda:{k}, {torch.cuda.get_device_name(k)} (sm_{major}{minor})")
    no_kernels = f"torch {torch.__version__} has no kernels for {'; '.join(unusable)}"
    return usable, no_kernels if unusable else "not here"


class Engine(NamedTuple):
    """The way of computing chosen for a device."""

    device: str
    precision: str
    graph: bool = False

    def __str__(self) -> str:
        device, threads = torch.device(self.device), torch.get_num_threads()
        places = {"mps": "Apple's GPU", "cpu": f"{threads} CPU thread" + "s" * (threads > 1)}
        place = places.get(device.type) or torch.cuda.get_device_name(device)
        return f"{self.precision} on {place}" + ", one CUDA graph a step" * self.graph


def fast_precision(device: torch.device | str) -> str:
    """The precision that `device` computes fast, from a fixed table of hardware; never timed.

    CUDA, by compute capability: bfloat16 from 8 on, float16 for 7 (a T4 emulates bfloat16), float32
    below. A CPU: bfloat16 with AMX, or with AVX512-BF16 alone (beside AVX512-FP16, on Intel's cores
    whose AMX a virtual machine hides, it is slower than float32)."""
    device = torch.device(device)
    if device.type == "cuda":
        generation = torch.cuda.get_device_capability(device)[0]
        return {7: "float16"}.get(generation, "bfloat16" if generation >= 8 else "float32")
    has = getattr(torch.cpu, "get_capabilities", dict)().get  # an older torch can't tell
    fast = has("amx_bf16") or (has("avx512_bf16") and not has("avx512_fp16"))
    return "bfloat16" if device.type == "cpu" and fast else "float32"


def choose_engine(model: nn.Module, data: ImageData, profile: Profile) -> Engine:
    """How to train `model` on its device, the same every time on one machine: `profile.precision`
    decides, or if it is "auto" `fast_precision`. ValueError for others than float32 on a Mac's GPU.
    """
    device = next(model.parameters()).device
    precision = fast_precision(device) if profile.precision == "auto" else profile.precision
    if device.type == "mps" and precision != "float32":
        way_out = "set precision = 'auto' or 'float32', or LAB_DEVICE=cpu"
        raise ValueError(f"precision = {precision!r}: Apple's GPU computes in float32; {way_out}")
    # No graph for float16 and its scaler: on the older GPUs that need it launches are no limit.
    graph = device.type == "cuda" and profile.cuda_graph and precision != "float16"
    return Engine(str(device), precision, graph)


def make_step(model: nn.Module, profile: Profile, engine: Engine, **options) -> TrainStep:
    """The training step of `model`, as `engine` computes it; `options` are those of TrainStep."""
    kind = GraphedStep if engine.graph else TrainStep
    return kind(model, profile, engine.precision, **options)


@contextmanager
def fits_in_memory(setting: str, value: int) -> Iterator[None]:
    """Raise MemoryError that names the setting if a GPU is too small for what runs inside."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):  # Apple's GPU has no error of its own for it
            raise
        way_out = "lower it, or shut down other notebooks that hold its memory (see nvidia-smi)"
        raise MemoryError(f"{setting} = {value}: too large for this GPU; {way_out}") from error


def seconds_per_epoch(model: nn.Module, data: ImageData, profile: Profile) -> float:
    """How long an epoch of training and testing takes: a few of its batches, made and computed as
    in `fit`, on a copy. Raises MemoryError if a GPU is too small for the batch."""
    device, copied = next(model.parameters()).device, copy.deepcopy(model)
    step = make_step(copied, profile, choose_engine(model, data, profile), l1_lambda=0.0)
    how = {"seed": profile.seed, "crop_padding": profile.crop_padding, "flip": profile.flip}

    def per_image(batches: list[Iterable], compute: Callable, most: int) -> float:
        took, start = [], time.perf_counter()
        for images, labels in itertools.islice(itertools.chain(*batches), most):
            compute(images.contiguous(memory_format=step.layout), labels)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            now = time.perf_counter()
            took.append((now - start) / len(images))
            start = now
        return statistics.mean(took[1:])  # the first one warms up

    # Two epochs, for one may have a single batch.
    train = [data.train_batches(profile.batch_size, epoch=e, **how) for e in (0, 1)]
    test = [data.plain_batches("test", profile.test_batch_size) for _ in (0, 1)]
    with fits_in_memory("batch_size", profile.batch_size):
        training = per_image(train, step, most=12)
    copied.eval()
    with torch.inference_mode(), fits_in_memory("test_batch_size", profile.test_batch_size):
        testing = per_image(test, lambda images, _: copied(images), most=2)
    return training * len(data.train_labels) + testing * len(data.test_labels)


class GraphedStep(TrainStep):
    """On CUDA the whole step is captured once as a graph and replayed, so that Python's time
    between two kernels does not count. Raises RuntimeError if the capture is refused."""

    graph: torch.cuda.CUDAGraph | None = None

    def compute(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.graph is None:
            with torch.cuda.device(images.device):
                self._capture(images.clone(), labels.clone())
        if len(images) != len(self.inputs[0]):  # the epoch's last batch
            return super().compute(images, labels)
        self.inputs[0].copy_(images)
        self.inputs[1].copy_(labels)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it

    def _capture(self, *inputs: Tensor) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        current = torch.cuda.current_stream()
        before = copy.deepcopy([self.model.state_dict(), self.state_dict()])
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):  # torch and its libraries allocate what they need
                    super().compute(*inputs)
            current.wait_stream(stream)
            self.optimizer.zero_grad(set_to_none=True)
            # thread_local: another thread may pin memory meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.output = super().compute(*inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a broken capture goes wrong, too
            raise RuntimeError(f"{cause}; set the profile's cuda_graph = False") from error
        finally:  # warming up has changed both
            self.model.load_state_dict(before[0])
            self.load_state_dict(before[1])
        self.graph, self.inputs = graph, inputs
