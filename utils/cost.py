"""What a network costs: parameters, MACs, file size, latency."""

import copy
import logging
from collections.abc import Callable, Hashable, Mapping
from functools import partial

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from models.vgg import VGG

# Importing Timer warns of a CUDA toolkit without a GPU, which nothing here uses.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda r: "No CUDA" not in r.getMessage())
from torch.utils.benchmark import Measurement, Timer, timer  # noqa: E402


def num_parameters(model: nn.Module) -> int:
    """Learned numbers: weights, γ and β; not the running statistics."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, input_shape: tuple[int, ...] = (3, 32, 32)) -> int:
    """Multiply-adds of convolutions and classifier (FLOPs = 2 × MACs) for one image (channels,
    height, width), or for a batch of them where its size stands before."""
    images = torch.empty(input_shape, device="meta").view(-1, *input_shape[-3:])  # only its shape
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta").eval()(images)
    return counter.get_total_flops() // 2


def file_size(model: nn.Module) -> int:
    """Bytes of the weights as a safetensors file."""
    return len(safetensors.torch.save({k: t.contiguous() for k, t in model.state_dict().items()}))


def fold_bn(model: VGG) -> VGG:
    """A copy for inference: each BN merged into the convolution before it."""
    folded = copy.deepcopy(model).eval()
    fused = {conv: fuse_conv_bn_eval(conv, bn) for conv, bn in folded.blocks()}
    layers = (fused.get(m, m) for m in folded.feature if not isinstance(m, nn.BatchNorm2d))
    folded.feature = nn.Sequential(*layers)
    return folded


def eager(model: VGG, images: Tensor) -> Callable[[], Tensor]:
    """A call that runs `model` on `images` as in use: BN folded, channels_last, no gradient."""
    folded = fold_bn(model).to(images.dtype, memory_format=torch.channels_last)
    return torch.inference_mode()(partial(folded, images.to(memory_format=torch.channels_last)))


def take_turns(
    steps: Mapping[Hashable, Callable], *, num_threads=None, rounds=3, min_run_time=0.3, timer=timer
) -> dict[Hashable, Measurement]:
    """Seconds of each step, with `.median` and `.iqr`; in turns, so a busy moment hits them all.
    `num_threads` are torch's (None: as they are); a turn takes about `min_run_time` seconds."""
    taken = {name: [] for name in steps}
    threads = num_threads or torch.get_num_threads()
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # until now the caches were another's; a GPU's first call loads kernels
            turn = Timer("step()", timer=timer, globals={"step": step}, num_threads=threads)
            taken[name].append(turn.blocked_autorange(min_run_time=min_run_time))
    return {name: next(iter(Measurement.merge(m))) for name, m in taken.items()}
