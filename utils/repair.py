"""Keep the accuracy at the cut, without training: absorb β, re-estimate the BN statistics."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from models.vgg import VGG
from utils.pruning import PruningPlan, mask, masks_for, slim
from utils.sparsity import bn_layers

Batches = Iterable[tuple[Tensor, Tensor]]  # training images; the labels are not used
RUNGS = ("raw cut", "β absorbed", "BN recalibrated", "β absorbed, BN recalibrated")
"""The ladder of repairs: none, each alone, both. Every table, page and report names them so."""


def absorb_bias(model: VGG, plan: PruningPlan) -> VGG:
    """The masked network, with what pruned channels still send onward moved into the next layer.

    A channel with γ ≈ 0 is a constant map relu(β), through a max-pool too. The next convolution
    turns it into the constant W.sum((2, 3)) @ relu(β), so its BN's running mean is lowered by that;
    after the last layer the classifier's bias is raised by W @ relu(β). Exact for γ = 0, but for
    the border, where zero padding hides part of the constant.
    """
    absorbed = mask(model, plan)
    # relu(β) of the pruned channels of the layer before, 0 for those that stay, as colours do.
    constant = model.classifier.weight.new_zeros(3)
    walk = zip(model.blocks(), absorbed.blocks(), masks_for(model, plan), strict=True)
    with torch.no_grad():
        for (conv, bn), (_, absorbed_bn), keep in walk:
            absorbed_bn.running_mean -= conv.weight.sum((2, 3)) @ constant
            constant = bn.bias.relu()
            constant[keep] = 0
        absorbed.classifier.bias += model.classifier.weight @ constant
    return absorbed


def recalibrate_bn(model: VGG, batches: Batches) -> VGG:
    """A copy of `model` with BN running statistics measured anew (EagleEye: Li et al., ECCV 2020).

    The running mean becomes the average of the batches' means, the running variance that of their
    unbiased variances, weighted by the number of images. No weight changes. A batch of one image,
    which may have no variance, joins its neighbour. Raises ValueError for less than two images.
    """
    recalibrated = copy.deepcopy(model).train()
    layers, seen = bn_layers(recalibrated), 0
    for bn in layers:
        bn.reset_running_stats()
    with torch.no_grad():
        for images in _with_variance(batches):
            seen += len(images)
            for bn in layers:
                bn.momentum = len(images) / seen  # running statistics become the weighted average
            recalibrated(images)
    for bn, before in zip(layers, bn_layers(model), strict=True):
        bn.momentum = before.momentum
    return recalibrated.train(model.training)


def _with_variance(batches: Batches) -> list[Tensor]:
    """The images of each batch, at least two of them in each."""
    joined: list[Tensor] = []
    for images, _ in batches:
        if joined and 1 in (len(images), len(joined[-1])):
            joined[-1] = torch.cat([joined[-1], images])
        else:
            joined.append(images)
    if not joined or len(joined[0]) < 2:
        few = f"{len(joined)} images are too few to measure a variance"
        raise ValueError(f"recalibrate_bn: {few}; pass at least one batch of two images or more")
    return joined


def slim_repaired(model: VGG, plan: PruningPlan, batches: Batches) -> VGG:
    """The slim network with both repairs: β absorbed, BN recalibrated on `batches`."""
    return recalibrate_bn(slim(absorb_bias(model, plan), plan), batches)


def slim_rungs(model: VGG, plan: PruningPlan, batches: Batches) -> dict[str, VGG]:
    """The slim network at each of RUNGS."""
    cut, batches = [slim(model, plan), slim(absorb_bias(model, plan), plan)], list(batches)
    return dict(zip(RUNGS, cut + [recalibrate_bn(net, batches) for net in cut], strict=True))
