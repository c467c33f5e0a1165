"""γ → one global threshold → cfg_mask and cfg → a slim network (Liu et al. 2017, section 3)."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.vgg import VGG
from utils.sparsity import bn_layers


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Which channels stay. Made by `plan_pruning`, applied by `mask` and `slim`."""

    pruning_ratio: float
    """The share of channels asked for."""
    threshold: float
    """The global cut on |γ|: channels below it go, but for those that a layer's floor keeps."""
    cfg: list[int | str]
    """Kept widths with 'M', as `VGG(cfg)` takes it."""
    cfg_mask: list[Tensor]
    """One BoolTensor per BN layer: True = keep, False = prune."""

    @property
    def kept(self) -> int:
        return sum(int(m.sum()) for m in self.cfg_mask)

    @property
    def total(self) -> int:
        return sum(m.numel() for m in self.cfg_mask)

    @property
    def realised_ratio(self) -> float:
        return 1 - self.kept / self.total

    def __str__(self) -> str:
        return (
            f"asked to prune {self.pruning_ratio:.1%}, pruned {self.realised_ratio:.2%}: "
            f"{self.kept:,} of {self.total:,} channels stay, threshold |γ| = {self.threshold:.2e}"
        )


def _floor(width: int, min_channels: int | float) -> int:
    """Channels that a layer of `width` must keep: a number, or a share of the layer."""
    if isinstance(min_channels, float):
        # Rounded first: 0.07 · 100 is 7.000000000000001 in binary.
        min_channels = math.ceil(round(min_channels * width, 9))
    return min(width, max(1, min_channels))


def _to_multiple(kept: int, floor: int, width: int, multiple: int) -> int:
    """The multiple nearest to `kept` that is not below the floor, or the whole layer."""
    if kept == width:
        return width
    least = math.ceil(floor / multiple)
    return min(width, multiple * max(least, round(kept / multiple)))


def largest_ratio(model: VGG, min_channels: int | float = 1) -> float:
    """The largest pruning ratio for which each layer can keep its floor of `min_channels`."""
    widths = [bn.num_features for bn in bn_layers(model)]
    return 1 - sum(_floor(width, min_channels) for width in widths) / sum(widths)


def plan_pruning(
    model: VGG, pruning_ratio: float, *, min_channels: int | float = 1, multiple_of: int = 1
) -> PruningPlan:
    """Choose the round(n·pruning_ratio) channels with the smallest |γ| in the whole network.

    `min_channels` is a floor for every layer, as a number (int) or as a share of the layer (float;
    0.5 is the cap of the paper's multi-pass scheme, at most half of a layer a pass). What a floor
    keeps is pruned elsewhere, so the count stays exact. Equal |γ| go in forward order, first first.
    `multiple_of` then rounds each layer's width (8 suits a GPU): `realised_ratio` says what became
    of the request.

    Raises ValueError for a ratio outside [0, 1), γ that are not finite, or floors that leave too
    little to prune.
    """
    if not 0 <= pruning_ratio < 1:
        raise ValueError(f"pruning_ratio = {pruning_ratio!r}: must be at least 0 and below 1")
    if isinstance(min_channels, bool) or not min_channels >= 0:
        raise ValueError(f"min_channels = {min_channels!r}: must be 0 or more")
    if isinstance(min_channels, float) and min_channels > 1:
        raise ValueError(f"min_channels = {min_channels!r}: as a share it must be at most 1.0")
    if not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of = {multiple_of!r}: must be a whole number of at least 1")

    gammas = [bn.weight.detach().abs().cpu() for bn in bn_layers(model)]
    ordered, order = torch.sort(torch.cat(gammas), stable=True)  # ascending, ties in forward order
    if not ordered.isfinite().all():
        raise ValueError("the network has scaling factors γ that are not finite; it has diverged")

    protected = [_largest(g, _floor(len(g), min_channels)) for g in gammas]
    prunable = ~torch.cat(protected)[order]

    count = round(len(order) * pruning_ratio)
    if count > prunable.sum():
        raise ValueError(
            f"pruning_ratio = {pruning_ratio}: {count} of {len(order)} channels would go, but "
            f"min_channels = {min_channels} keeps all but {int(prunable.sum())}; lower one of them"
        )
    pruned = order[prunable][:count]
    keep = torch.ones_like(order, dtype=torch.bool)
    keep[pruned] = False
    cfg_mask = list(keep.split([len(g) for g in gammas]))
    if multiple_of > 1:
        cfg_mask = [
            _largest(
                g, _to_multiple(int(m.sum()), _floor(len(g), min_channels), len(g), multiple_of)
            )
            for g, m in zip(gammas, cfg_mask, strict=True)
        ]
    widths = iter(int(m.sum()) for m in cfg_mask)
    cfg = [v if v == "M" else next(widths) for v in model.cfg]
    threshold = _halfway(torch.cat(gammas), keep) if count else 0.0
    return PruningPlan(pruning_ratio, threshold, cfg, cfg_mask)


def _halfway(gamma: Tensor, keep: Tensor) -> float:
    """Between the largest |γ| that goes and the next larger that stays."""
    last = gamma[~keep].max()
    above = gamma[keep & (gamma >= last)]
    return ((last + above.min()) / 2 if len(above) else last).item()


def _largest(gamma: Tensor, count: int) -> Tensor:
    """True for the `count` largest of a layer: those that the global order would prune last."""
    keep = torch.zeros_like(gamma, dtype=torch.bool)
    keep[gamma.sort(stable=True).indices[len(gamma) - count :]] = True
    return keep


def _check_fits(model: VGG, plan: PruningPlan) -> None:
    widths = iter(m.numel() for m in plan.cfg_mask)
    planned = [v if v == "M" else next(widths) for v in plan.cfg]
    if planned != model.cfg:
        raise ValueError(f"the plan is for a network of cfg {planned}, the model has {model.cfg}")


def mask(model: VGG, plan: PruningPlan) -> VGG:
    """A copy of `model`, same shape, with γ and β of the pruned channels set to 0: it computes what
    the slim network computes."""
    _check_fits(model, plan)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for bn, keep in zip(bn_layers(masked), plan.cfg_mask, strict=True):
            pruned = ~keep.to(bn.weight.device)
            bn.weight[pruned] = 0
            bn.bias[pruned] = 0
    return masked


def slim(model: VGG, plan: PruningPlan) -> VGG:
    """A new, smaller network with the surviving channels of `model`, which stays as it was.

    A convolution keeps the rows of its own surviving channels (`out_idx`) and the columns of those
    of the layer before (`in_idx`); BN keeps γ, β, running mean and variance of `out_idx`; the
    classifier keeps the columns of the last layer's channels.
    """
    _check_fits(model, plan)
    reference = model.classifier.weight
    with torch.device("meta"):  # no memory and no random numbers: every weight is copied below
        slimmed = VGG(plan.cfg, num_classes=model.classifier.out_features)
    slimmed = slimmed.to(reference.dtype).to_empty(device=reference.device).train(model.training)
    in_idx = torch.arange(3, device=reference.device)  # the colour channels all stay
    out_masks = iter(plan.cfg_mask)
    with torch.no_grad():
        for old, new in zip(model.feature, slimmed.feature, strict=True):
            if isinstance(old, nn.Conv2d):
                # Index tensors keep both axes even where one channel is left.
                out_idx = next(out_masks).nonzero().flatten().to(reference.device)
                new.weight.copy_(old.weight[out_idx][:, in_idx])
                new.padding_mode = old.padding_mode
                in_idx = out_idx
            elif isinstance(old, nn.BatchNorm2d):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    getattr(new, name).copy_(getattr(old, name)[out_idx])
                new.num_batches_tracked.copy_(old.num_batches_tracked)
                new.eps, new.momentum = old.eps, old.momentum
        slimmed.classifier.weight.copy_(model.classifier.weight[:, in_idx])
        slimmed.classifier.bias.copy_(model.classifier.bias)
    return slimmed
