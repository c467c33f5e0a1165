"""The one network of the lab: VGG with batch norm for small images, dense or slim."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

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


def smallest_image(cfg: list[int | str]) -> int:
    """The fewest pixels along an edge of an image that leave one after the max-pools of `cfg`."""
    return 2 ** sum(v == "M" for v in cfg)


def check_cfg(cfg: list[int | str]) -> None:
    """Raise ValueError unless `cfg` is a list of channel counts ≥ 1 and 'M'."""
    counts = widths(cfg) if isinstance(cfg, list | tuple) else []
    if not counts or any(type(v) is not int or v < 1 for v in counts):
        raise ValueError(f"cfg = {cfg!r}: must be a list of channel counts ≥ 1 and 'M'")


class VGG(nn.Module):
    """VGG with batch norm (Simonyan & Zisserman 2015) as Network Slimming uses it on CIFAR-10.

    `cfg` gives the widths of a slim network; without it the dense VGG-19 is built.
    Input: (batch, 3, height, width). Output: logits (batch, num_classes). Raises ValueError for a
    malformed cfg or num_classes < 1; called, for images below `smallest_image(cfg)`.
    `feature` and `classifier` are the names of the original lab, so its checkpoints load."""

    def __init__(self, cfg: list[int | str] | None = None, *, num_classes: int = 10) -> None:
        super().__init__()
        cfg = VGG_CFGS[19] if cfg is None else cfg
        check_cfg(cfg)
        if num_classes < 1:
            raise ValueError(f"num_classes = {num_classes!r}: must be at least 1")
        self.cfg = list(cfg)
        layers, channels = [], 3
        for v in self.cfg:
            if v == "M":
                layers.append(nn.MaxPool2d(2))
            else:  # no bias: the batch norm that follows has its own shift, β
                conv = nn.Conv2d(channels, v, kernel_size=3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                channels = v
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        if not self.classifier.weight.is_meta:  # there, drawing imports a compiler, for seconds
            self._initialize()

    def blocks(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """Each convolution with its batch norm, in forward order: they share their channels."""
        return [(m, bn) for m, bn in pairwise(self.feature) if isinstance(bn, nn.BatchNorm2d)]

    def _initialize(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (9 * m.out_channels)))
            elif isinstance(m, nn.BatchNorm2d):
                # From 0.5, not 1, lr·λ can take an unneeded γ to 0 before the lr drops.
                nn.init.constant_(m.weight, 0.5)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < (least := smallest_image(self.cfg)):
            needs = f"of an image of {height}×{width}; it needs at least {least}×{least}"
            raise ValueError(f"cfg = {self.cfg}: its max-pools leave no pixel {needs}")
        maps = self.feature(images)  # (batch, channels, 2, 2) for 32×32 images
        return self.classifier(torch.mean(maps, dim=(2, 3)))
