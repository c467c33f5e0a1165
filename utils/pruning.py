"""γ → one global threshold → cfg_mask and cfg → a slim network (Liu et al. 2017, section 3)."""

import copy
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.vgg import VGG, check_cfg, most_prunable, num_pruned, widths
from utils import cost


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Which channels stay. Made by `plan_pruning` or by hand, applied by `mask` and `slim`.
    Masks of 1 and 0 become BoolTensors; ValueError for others, or if `cfg` does not fit them."""

    pruning_ratio: float  # of the channels, as asked; if a share of the MACs was asked, as realised
    threshold: float  # on |γ|: all above stays; all below goes, but for floors and whole groups
    cfg: list[int | str]  # kept widths with 'M', as `VGG(cfg)` takes it
    cfg_mask: list[Tensor]  # one BoolTensor per BN layer: True = keep, False = prune
    mass_cut: float = torch.nan  # share of Σ|γ| that the pruned channels hold
    macs: float | None = None  # share of the MACs asked for, if one was
    realised_macs: float | None = None  # share of the MACs that the slim network then has

    def __post_init__(self) -> None:
        masks = [torch.as_tensor(mask).cpu() for mask in self.cfg_mask]
        for mask in masks:
            if mask.dim() != 1 or not ((mask == 0) | (mask == 1)).all():
                raise ValueError(f"cfg_mask has {mask.tolist()}: must be a row of 1 (keep) and 0")
        object.__setattr__(self, "cfg_mask", [mask.bool() for mask in masks])
        check_cfg(self.cfg)
        if (keeps := [int(mask.sum()) for mask in masks]) != widths(self.cfg):
            raise ValueError(f"cfg = {self.cfg}: does not fit cfg_mask, which keeps {keeps}")

    @property
    def kept(self) -> int:
        return sum(widths(self.cfg))

    @property
    def total(self) -> int:
        return sum(m.numel() for m in self.cfg_mask)

    @property
    def realised_ratio(self) -> float:
        return 1 - self.kept / self.total

    def __str__(self) -> str:
        asked = f"asked to prune {self.pruning_ratio:.1%}"
        if self.macs is not None:
            asked = f"asked to keep {self.macs:.2%} of the MACs, kept {self.realised_macs:.2%}"
        stay = f"pruned {self.realised_ratio:.2%}: {self.kept:,} of {self.total:,} channels stay"
        return f"{asked}, {stay}, threshold |γ| = {self.threshold:.2e}"


def _number(field: str, value: object, inside: Callable, words: str) -> float:
    """`value` as Python's own number, also where it comes from numpy or torch."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if type(value) in (int, float):
        if inside(value):
            return value
        words += f"; did you mean {value / 100:g}?" if value > 1 and inside(value / 100) else ""
    raise ValueError(f"{field} = {value!r}: must be {words}")


def plan_pruning(
    model: VGG, pruning_ratio: float | None = None, *, macs: float | None = None,
    min_channels: int = 1, multiple_of: int = 1, input_shape: tuple[int, int, int] = (3, 32, 32),
) -> PruningPlan:  # fmt: skip
    """Choose the channels with the smallest |γ| in the whole network: round(n·pruning_ratio) of its
    n channels, or as few as leave at most the share `macs` of its MACs for one image.

    Each layer keeps its `min_channels` largest (one with fewer keeps all); what that floor keeps is
    pruned elsewhere. Of equal |γ| that nearer the input goes first. With `multiple_of` a layer's
    channels leave in groups, so that a multiple of it (or all) stays; a group leaves when its
    largest |γ| would, and as many as come nearest to the count asked for. Raises ValueError for a
    bad value, both shares or none, γ that are not finite, and floors that forbid the cut.
    """
    if (pruning_ratio is None) == (macs is None):
        raise ValueError(f"pruning_ratio = {pruning_ratio!r}, macs = {macs!r}: give exactly one")
    natural = (lambda v: isinstance(v, int) and v >= 1, "a whole number of at least 1")
    floor = _number("min_channels", min_channels, *natural)
    counts, plan = _cuts(model, floor, _number("multiple_of", multiple_of, *natural))
    if macs is None:
        inside = (lambda v: 0 <= v < 1, "at least 0 and below 1")
        ratio = _number("pruning_ratio", pruning_ratio, *inside)
        asked, most = num_pruned(model.cfg, ratio), most_prunable(model.cfg, floor)
        if asked > most:
            lets = f"min_channels = {floor} lets only {most} of {sum(widths(model.cfg))} channels"
            raise ValueError(f"pruning_ratio = {ratio}: {lets} go, not {asked}; lower either")
        return replace(plan(min(counts, key=lambda n: abs(n - asked))), pruning_ratio=ratio)
    macs = _number("macs", macs, lambda v: 0 < v <= 1, "above 0 and at most 1")
    whole = cost.macs(model, input_shape)

    def share(count: int) -> float:
        cfg = plan(count).cfg
        with torch.device("meta"):
            slimmed = VGG(cfg, num_classes=model.classifier.out_features)
        return cost.macs(slimmed, input_shape) / whole

    count = counts[bisect_left(counts[:-1], True, key=lambda count: share(count) <= macs)]
    if (realised := share(count)) > macs:
        least = f"min_channels and multiple_of keep {realised:.3%} of the MACs"
        raise ValueError(f"macs = {macs}: {least}; raise it or lower them")
    return replace(plan(count), macs=macs, realised_macs=realised)


def _cuts(model: VGG, floor: int, multiple_of: int) -> tuple[list[int], Callable]:
    """How many channels can go, ascending from 0, and the plan for each of these counts."""
    gammas = [bn.weight.detach().abs().cpu() for _, bn in model.blocks()]
    gamma = torch.cat(gammas)
    if not gamma.isfinite().all():
        raise ValueError("the network has scaling factors γ that are not finite; it has diverged")
    rows, first = [], 0
    for layer in gammas:
        ordered, order = layer.sort(stable=True)  # ascending, ties in forward order
        larger = torch.arange(len(layer)).flip(0)  # so many of the layer are larger
        stay = larger // multiple_of * multiple_of  # so many are left once its group has gone
        rows.append((first + order, ordered.flip(0)[stay], stay >= floor, larger == stay))
        first += len(layer)
    channels, scores, free, ends = map(torch.cat, zip(*rows, strict=True))
    scores, order = scores.sort(stable=True)  # groups stay whole: neighbours with one score
    # A threshold lies halfway between the last score that goes and the next one, which stays.
    halfway = torch.stack([scores, torch.cat([scores[1:], scores[-1:]])]).mean(0)
    order, halfway = order[free[order]], halfway[free[order]]
    channels, ends = channels[order], ends[order]

    def plan(count: int) -> PruningPlan:
        keep = torch.ones_like(gamma, dtype=torch.bool)
        keep[channels[:count]] = False
        cfg_mask = keep.split(widths(model.cfg))
        kept = iter(int(m.sum()) for m in cfg_mask)
        cfg = [v if v == "M" else next(kept) for v in model.cfg]
        threshold = halfway[count - 1].item() if count else 0.0
        mass_cut = (gamma[~keep].double().sum() / gamma.double().sum()).nan_to_num().item()
        ratio = 1 - (len(gamma) - count) / len(gamma)
        return PruningPlan(ratio, threshold, cfg, cfg_mask, mass_cut)

    return [0, *(ends.nonzero().flatten() + 1).tolist()], plan


def masks_for(model: VGG, plan: PruningPlan) -> list[Tensor]:
    """The masks of `plan`. Raises ValueError if it is for a network of other widths, or if what was
    written to its masks or cfg no longer fits."""
    masks = replace(plan).cfg_mask  # checked again
    sizes = iter(m.numel() for m in masks)
    if (cfg := [v if v == "M" else next(sizes) for v in plan.cfg]) != model.cfg:
        wrong = f"the plan is for a network of cfg {cfg}, the model has {model.cfg}"
        raise ValueError(f"{wrong}; make one for this model with plan_pruning")
    return masks


def mask(model: VGG, plan: PruningPlan) -> VGG:
    """A copy of `model`, same shape, with γ and β of the pruned channels set to 0: it computes what
    the slim network computes. Raises ValueError as `masks_for` does."""
    masks, masked = masks_for(model, plan), copy.deepcopy(model)
    with torch.no_grad():
        for (_, bn), keep in zip(masked.blocks(), masks, strict=True):
            bn.weight[~keep] = bn.bias[~keep] = 0
    return masked


def slim(model: VGG, plan: PruningPlan) -> VGG:
    """A new, smaller network with the surviving channels of `model`, which stays as it was.

    A convolution keeps the rows of its own surviving channels (`out_idx`) and the columns of those
    of the layer before (`in_idx`); BN keeps γ, β, running mean and variance of `out_idx`; the
    classifier keeps the columns of the last layer's channels. Raises ValueError as `mask` does.
    """
    masks, reference = masks_for(model, plan), model.classifier.weight
    with torch.device("meta"):  # every weight is copied below
        slimmed = VGG(plan.cfg, num_classes=model.classifier.out_features)
    slimmed = slimmed.to(reference.dtype).to_empty(device=reference.device).train(model.training)
    in_idx = torch.arange(3)  # the colour channels all stay
    pairs = zip(model.blocks(), slimmed.blocks(), masks, strict=True)
    with torch.no_grad():
        for (conv, bn), (new_conv, new_bn), keep in pairs:
            # Index tensors keep both axes even where one channel is left.
            out_idx = keep.nonzero().flatten()
            new_conv.weight.copy_(conv.weight[out_idx][:, in_idx])
            new_conv.padding_mode = conv.padding_mode
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(new_bn, name).copy_(getattr(bn, name)[out_idx])
            new_bn.num_batches_tracked.copy_(bn.num_batches_tracked)
            new_bn.eps, new_bn.momentum = bn.eps, bn.momentum
            in_idx = out_idx
        slimmed.classifier.weight.copy_(model.classifier.weight[:, in_idx])
        slimmed.classifier.bias.copy_(model.classifier.bias)
    return slimmed
