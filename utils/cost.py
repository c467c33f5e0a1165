"""What a network costs: parameters, MACs, file size, latency."""

import copy
import io
import logging
from collections.abc import Mapping

import torch
from torch import nn
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


def latency(model: VGG, batch_size: int, **options) -> float:
    """Seconds for one batch on the model's device, BN folded, float32: the median.

    (On a GPU of compute capability 8 or more torch computes float32 convolutions in TF32.)

    Options: `input_shape` (3, 32, 32), `num_threads` (torch's own), `min_run_time` (0.3 s).
    """
    return _measure(model, batch_size, **options).median


def compare_latency(
    models: Mapping[str, VGG], batch_size: int, *, rounds: int = 3, **options
) -> dict[str, Measurement]:
    """`latency` of several networks, taken in turns so that a busy moment hits them all.

    For each a Measurement, with `.median` and `.iqr`.
    """
    taken: dict[str, list[Measurement]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            taken[name].append(_measure(model, batch_size, **options))
    # Timer calls them the same task only if the label is the same; the lists are ours to merge.
    return {name: next(iter(Measurement.merge(m))) for name, m in taken.items()}


def _measure(
    model: VGG,
    batch_size: int,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    num_threads: int | None = None,
    min_run_time: float = 0.3,
) -> Measurement:
    device = next(model.parameters()).device
    model = fold_bn(model).to(memory_format=torch.channels_last)
    images = torch.randn(batch_size, *input_shape, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    timer = Timer(
        "model(images)",
        globals={"model": model, "images": images},
        num_threads=num_threads or torch.get_num_threads(),
    )
    with torch.inference_mode():
        model(images)  # a GPU's first call at a new size is slow, and Timer would measure that
        return timer.blocked_autorange(min_run_time=min_run_time)
