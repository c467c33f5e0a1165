"""Keep the accuracy at the cut, without training: absorb β, re-estimate the BN statistics."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from models.vgg import VGG
from utils.pruning import PruningPlan, mask, slim


def absorb_bias(model: VGG, plan: PruningPlan) -> VGG:
    """The masked network, with what pruned channels still send onward moved into the next layer.

    A channel with γ ≈ 0 is a constant map relu(β), through a max-pool too. The next convolution
    turns it into the constant W.sum((2, 3)) @ relu(β), so its BN's running mean is lowered by that;
    after the last layer the classifier's bias is raised by W @ relu(β). Exact for γ = 0, except at
    the border, where zero padding hides part of the constant. Apply `slim(…, plan)` to the result.
    """
    absorbed = mask(model, plan)
    constant = None  # relu(β) of the pruned channels of the layer before, 0 for those that stay
    masks = iter(plan.cfg_mask)
    with torch.no_grad():
        for old, new in zip(model.feature, absorbed.feature, strict=True):
            if isinstance(old, nn.Conv2d) and constant is not None:
                carried = old.weight.sum((2, 3)) @ constant
            elif isinstance(old, nn.BatchNorm2d):
                if constant is not None:
                    new.running_mean -= carried
                keep = next(masks).to(old.bias.device)
                constant = old.bias.relu().masked_fill(keep, 0)
        absorbed.classifier.bias += model.classifier.weight @ constant
    return absorbed


def recalibrate_bn(model: VGG, batches: Iterable[tuple[Tensor, Tensor]]) -> VGG:
    """A copy of `model` whose BN running statistics are the plain average over `batches`.

    `batches` yields (images, labels) of the training set; labels are not used. No weight changes.
    The same batches give the same result; mode and momentum are those of `model`. Raises ValueError
    without a batch. (EagleEye: Li et al., ECCV 2020.)
    """
    batches = list(batches)
    if not batches:
        raise ValueError("recalibrate_bn: no batches given; pass at least one batch of images")
    recalibrated = copy.deepcopy(model)
    update_bn(batches, recalibrated)
    return recalibrated


def slim_repaired(model: VGG, plan: PruningPlan, batches: Iterable[tuple[Tensor, Tensor]]) -> VGG:
    """The slim network with both repairs: β absorbed, BN recalibrated on `batches`."""
    return recalibrate_bn(slim(absorb_bias(model, plan), plan), batches)


def slim_rungs(
    model: VGG, plan: PruningPlan, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, VGG]:
    """The slim network at each rung of the ladder: the raw cut, each repair alone, and both."""
    raw = slim(model, plan)
    return {
        "raw cut": raw,
        "β absorbed": slim(absorb_bias(model, plan), plan),
        "BN recalibrated": recalibrate_bn(raw, batches),
        "β absorbed, BN recalibrated": slim_repaired(model, plan, batches),
    }
