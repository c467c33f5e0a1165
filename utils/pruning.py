"""γ → one global threshold → cfg_mask and cfg → a slim network (Liu et al. 2017, section 3)."""

import copy
from bisect import bisect_left
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.vgg import VGG, most_prunable, num_pruned, shapes_only, widths
from utils import cost


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Which channels stay. Made by `plan_pruning`, applied by `mask` and `slim`."""

    pruning_ratio: float  # of the channels, as asked; if a share of the MACs was asked, as realised
    threshold: float  # global cut on |γ|: what is below goes, but for what a layer's floor keeps
    cfg: list[int | str]  # kept widths with 'M', as `VGG(cfg)` takes it
    cfg_mask: list[Tensor]  # one BoolTensor per BN layer: True = keep, False = prune
    mass_cut: float  # share of Σ|γ| that the pruned channels hold
    macs: float | None = None  # share of the MACs asked for, if one was
    realised_macs: float | None = None  # share of the MACs that the slim network then has

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
        asked = f"asked to prune {self.pruning_ratio:.1%}"
        if self.macs is not None:
            asked = f"asked to keep {self.macs:.2%} of the MACs, kept {self.realised_macs:.2%}"
        stay = (
            f"{self.kept:,} of {self.total:,} channels stay, threshold |γ| = {self.threshold:.2e}"
        )
        return f"{asked}, pruned {self.realised_ratio:.2%}: {stay}"


_ALLOWED = {
    "pruning_ratio": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "macs": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_channels": (lambda v: isinstance(v, int) and v >= 1, "a whole number of at least 1"),
}


def _number(field: str, value: object) -> float:
    """`value` as Python's own number, also where it comes from numpy or torch."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    (inside, words), real = _ALLOWED[field], isinstance(value, int | float)
    if real and not isinstance(value, bool) and inside(value):
        return value
    hint = f"; did you mean {value / 100:g}?" if real and value > 1 and inside(value / 100) else ""
    raise ValueError(f"{field} = {value!r}: must be {words}{hint}")


def plan_pruning(
    model: VGG,
    pruning_ratio: float | None = None,
    *,
    macs: float | None = None,
    min_channels: int = 1,
) -> PruningPlan:
    """Choose the channels with the smallest |γ| in the whole network: round(n·pruning_ratio) of its
    n channels, or as few as leave at most the share `macs` of its MACs (for a 32×32 image).

    Each layer keeps its `min_channels` largest (one with fewer keeps all); what that floor keeps is
    pruned elsewhere. Of equal |γ| that nearer the input goes first. Raises ValueError for a value
    outside its range, both shares or none, γ that are not finite, and floors that forbid the cut.
    """
    if (pruning_ratio is None) == (macs is None):
        raise ValueError(f"pruning_ratio = {pruning_ratio!r}, macs = {macs!r}: give exactly one")
    floor = _number("min_channels", min_channels)
    if macs is None:
        return _plan_by_ratio(model, _number("pruning_ratio", pruning_ratio), floor)
    return _plan_by_macs(model, _number("macs", macs), floor)


def _plan_by_ratio(model: VGG, pruning_ratio: float, floor: int) -> PruningPlan:
    gammas = [bn.weight.detach().abs().cpu() for _, bn in model.blocks()]
    gamma = torch.cat(gammas)
    if not gamma.isfinite().all():
        raise ValueError("the network has scaling factors γ that are not finite; it has diverged")
    count, most = num_pruned(model.cfg, pruning_ratio), most_prunable(model.cfg, floor)
    if count > most:
        lets = f"min_channels = {floor} lets only {most} of {len(gamma)} channels go"
        raise ValueError(f"pruning_ratio = {pruning_ratio}: {lets}, not {count}; lower either")
    ordered, order = gamma.sort(stable=True)  # ascending, ties in forward order
    beside_floor = torch.cat([g.argsort(stable=True).argsort() < len(g) - floor for g in gammas])
    prunable = beside_floor[order].nonzero().flatten()  # places in that order
    keep = torch.ones_like(gamma, dtype=torch.bool)
    keep[order[prunable[:count]]] = False
    cfg_mask = list(keep.split([len(g) for g in gammas]))
    kept = iter(int(m.sum()) for m in cfg_mask)
    cfg = [v if v == "M" else next(kept) for v in model.cfg]
    # Halfway between the last |γ| that goes and the next one, which stays.
    threshold = ordered[prunable[count - 1] :][:2].mean().item() if count else 0.0
    mass_cut = (gamma[~keep].double().sum() / gamma.double().sum()).nan_to_num().item()
    return PruningPlan(pruning_ratio, threshold, cfg, cfg_mask, mass_cut)


def _plan_by_macs(model: VGG, macs: float, floor: int) -> PruningPlan:
    """The plan by ratio that prunes the fewest channels, of those that leave at most `macs`."""
    total, whole = sum(widths(model.cfg)), cost.macs(model)

    def plan(count: int) -> PruningPlan:
        by_ratio = _plan_by_ratio(model, 1 - (total - count) / total, floor)
        with shapes_only():
            left = cost.macs(VGG(by_ratio.cfg, num_classes=model.classifier.out_features))
        return replace(by_ratio, macs=macs, realised_macs=left / whole)

    counts = range(most_prunable(model.cfg, floor))
    chosen = plan(bisect_left(counts, True, key=lambda n: plan(n).realised_macs <= macs))
    if chosen.realised_macs > macs:
        least = f"min_channels = {floor} keeps {chosen.realised_macs:.3%} of the MACs"
        raise ValueError(f"macs = {macs}: {least}; raise the one or lower the other")
    return chosen


def _check_fits(model: VGG, plan: PruningPlan) -> None:
    planned = iter(m.numel() for m in plan.cfg_mask)
    cfg = [v if v == "M" else next(planned) for v in plan.cfg]
    if cfg != model.cfg:
        raise ValueError(
            f"the plan is for a network of cfg {cfg}, the model has {model.cfg}; make one for this "
            "model with plan_pruning"
        )


def mask(model: VGG, plan: PruningPlan) -> VGG:
    """A copy of `model`, same shape, with γ and β of the pruned channels set to 0: it computes what
    the slim network computes. Raises ValueError if the plan is for a network of other widths."""
    _check_fits(model, plan)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for (_, bn), keep in zip(masked.blocks(), plan.cfg_mask, strict=True):
            bn.weight[~keep] = bn.bias[~keep] = 0
    return masked


def slim(model: VGG, plan: PruningPlan) -> VGG:
    """A new, smaller network with the surviving channels of `model`, which stays as it was.

    A convolution keeps the rows of its own surviving channels (`out_idx`) and the columns of those
    of the layer before (`in_idx`); BN keeps γ, β, running mean and variance of `out_idx`; the
    classifier keeps the columns of the last layer's channels. Raises ValueError as `mask` does.
    """
    _check_fits(model, plan)
    reference = model.classifier.weight
    with shapes_only():  # every weight is copied below
        slimmed = VGG(plan.cfg, num_classes=model.classifier.out_features)
    slimmed = slimmed.to(reference.dtype).to_empty(device=reference.device).train(model.training)
    in_idx = torch.arange(3)  # the colour channels all stay
    pairs = zip(model.blocks(), slimmed.blocks(), plan.cfg_mask, strict=True)
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
