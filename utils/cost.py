"""What a network costs: parameters, MACs, file size, latency."""

import copy
import io
import logging
from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from models.vgg import VGG

# On a machine with a CUDA toolkit but no GPU, importing Timer warns of what nothing here uses.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime is found" not in record.getMessage()
)
from torch.utils.benchmark import Measurement, Timer  # noqa: E402


def num_parameters(model: nn.Module) -> int:
    """Learned numbers: weights, γ and β; not the running statistics."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, input_shape: tuple[int, ...] = (3, 32, 32)) -> int:
    """Multiply-adds of the convolutions and the classifier for one image (FLOPs = 2 × MACs).

    `input_shape` is (channels, height, width), or has the batch size before it for a whole batch.
    """
    if len(input_shape) == 3:
        input_shape = (1, *input_shape)
    with FlopCounterMode(display=False) as counter:
        # On the meta device: shapes only, nothing is computed.
        copy.deepcopy(model).to("meta").eval()(torch.empty(input_shape, device="meta"))
    return counter.get_total_flops() // 2


def file_size(model: nn.Module) -> int:
    """Bytes of the saved `state_dict`."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def fold_bn(model: VGG) -> VGG:
    """A copy for inference: each BN merged into the convolution before it."""
    folded = copy.deepcopy(model).eval()
    fused = {conv: fuse_conv_bn_eval(conv, bn) for conv, bn in folded.blocks()}
    layers = (fused.get(m, m) for m in folded.feature if not isinstance(m, nn.BatchNorm2d))
    folded.feature = nn.Sequential(*layers)
    return folded


def eager(model: VGG, images: Tensor) -> Callable[[], Tensor]:
    """A call that runs `model` on `images`, in their precision, as in use: BN folded,
    channels_last, no gradient."""
    folded = fold_bn(model).to(images.dtype, memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.inference_mode()(partial(folded, images))


def latency(
    model: VGG, batch_size: int, *, input_shape: tuple[int, int, int] = (3, 32, 32), **options
) -> float:
    """Seconds for one batch on the model's device, `eager`, float32: the median.

    `options` are those of `take_turns`.
    """
    images = torch.randn(batch_size, *input_shape, device=next(model.parameters()).device)
    step = {"": eager(model, images)}
    return take_turns(step, **{"rounds": 1} | options)[""].median


def take_turns(
    steps: Mapping[Hashable, Callable[[], object]],
    *,
    num_threads: int | None = None,
    rounds: int = 3,
    min_run_time: float = 0.3,
    timer: Callable[[], float] | None = None,
) -> dict[Hashable, Measurement]:
    """Seconds of each step, with `.median` and `.iqr`; in turns, so a busy moment hits them all.

    `num_threads` are torch's (None: as they are); a turn takes about `min_run_time` seconds.
    `timer` is the clock, by default one that waits for a GPU; time.thread_time counts one thread's
    own work alone.
    """
    options = {"num_threads": num_threads or torch.get_num_threads()}
    options |= {"timer": timer} if timer else {}
    taken: dict[Hashable, list[Measurement]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # until now the caches were another's; a GPU's first call loads kernels
            turn = Timer("step()", globals={"step": step}, **options)
            taken[name].append(turn.blocked_autorange(min_run_time=min_run_time))
    return {name: next(iter(Measurement.merge(m))) for name, m in taken.items()}
