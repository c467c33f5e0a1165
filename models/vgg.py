"""The one network of the lab: VGG with batch norm for small images, dense or slim."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VGG_CFGS: dict[int, list[int | str]] = {
    11: [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512],
    13: [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512],
    16: [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3],
    19: [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4],
}
"""Output channels of each 3×3 convolution in forward order; 'M' is a 2×2 max-pool."""


def scale_cfg(cfg: list[int | str], width: float) -> list[int | str]:
    """The same network with `width` times as many channels in every layer (at least 1)."""
    return [v if v == "M" else max(1, round(v * width)) for v in cfg]


def widths(cfg: list[int | str]) -> list[int]:
    """The output channels of each convolution, in forward order."""
    return [v for v in cfg if v != "M"]


def num_pruned(cfg: list[int | str], pruning_ratio: float) -> int:
    """How many of its n channels a cut by `pruning_ratio` takes: round(n·pruning_ratio)."""
    return round(sum(widths(cfg)) * pruning_ratio)


def most_prunable(cfg: list[int | str], min_channels: int) -> int:
    """How many channels can go where each layer keeps `min_channels` (one with fewer all)."""
    return sum(max(0, v - min_channels) for v in widths(cfg))


def check_cfg(cfg: list[int | str]) -> None:
    """Raise ValueError unless `cfg` is a list of channel counts ≥ 1 and 'M'."""
    if not isinstance(cfg, list | tuple) or not widths(cfg):
        raise ValueError(f"cfg = {cfg!r}: must be a list of channel counts and 'M'")
    for v in cfg:
        if v != "M" and (not isinstance(v, int) or isinstance(v, bool) or v < 1):
            raise ValueError(f"cfg has the entry {v!r}: each must be a whole number ≥ 1, or 'M'")


class _Undrawn(TorchFunctionMode):
    """Draws no first weights: on the meta device that would only import a compiler, for seconds."""

    def __torch_function__(self, function, _, args=(), options=None):
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return None
        return function(*args, **(options or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """A network built inside has shapes but no memory, however wide, and draws no random number."""
    with torch.device("meta"), _Undrawn():
        yield


class VGG(nn.Module):
    """VGG with batch norm (Simonyan & Zisserman 2015) as Network Slimming uses it on CIFAR-10.

    `cfg` gives the widths of a slim network; without it the dense VGG-19 is built.
    Input: (batch, 3, height, width), 32×32 in this lab. Output: logits (batch, num_classes).
    Raises ValueError for a malformed cfg or num_classes < 1.

    `feature` and `classifier` are the names of the original lab, so its checkpoints load.
    """

    def __init__(self, cfg: list[int | str] | None = None, *, num_classes: int = 10) -> None:
        super().__init__()
        cfg = VGG_CFGS[19] if cfg is None else cfg
        check_cfg(cfg)
        if num_classes < 1:
            raise ValueError(f"num_classes = {num_classes!r}: must be at least 1")
        self.cfg = list(cfg)

        layers: list[nn.Module] = []
        channels = 3
        for v in self.cfg:
            if v == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            # No bias: the batch norm that follows has its own shift, β.
            layers.append(nn.Conv2d(channels, v, kernel_size=3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(v))
            layers.append(nn.ReLU(inplace=True))
            channels = v
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialize()

    def blocks(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Each convolution with its batch norm, in forward order: they share their channels."""
        return [(m, bn) for m, bn in pairwise(self.feature) if isinstance(bn, nn.BatchNorm2d)]

    def _initialize(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                nn.init.normal_(m.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(m, nn.BatchNorm2d):
                # From 0.5, not 1, lr·λ can take an unneeded γ to 0 before the lr drops.
                nn.init.constant_(m.weight, 0.5)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.feature(images)  # (batch, channels, 2, 2) for 32×32 images
        return self.classifier(torch.mean(maps, dim=(2, 3)))
