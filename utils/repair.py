"""Keep the accuracy at the cut, without training: absorb β, re-estimate the BN statistics."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from models.vgg import VGG
from utils.pruning import PruningPlan, mask, slim
from utils.sparsity import bn_layers


def absorb_bias(model: VGG, plan: PruningPlan) -> VGG:
    """The masked network, with what pruned channels still send onward moved into the next layer.

    A channel with γ ≈ 0 is a constant map relu(β), through a max-pool too. The next convolution
    turns it into the constant W.sum((2, 3)) @ relu(β), so its BN's running mean is lowered by that;
    after the last layer the classifier's bias is raised by W @ relu(β). Exact for γ = 0, except at
    the border, where zero padding hides part of the constant. Apply `slim(…, plan)` to the result.
    """
    absorbed = mask(model, plan)
    # relu(β) of the pruned channels of the layer before, 0 for those that stay, as colours do.
    constant = model.classifier.weight.new_zeros(3)
    walk = zip(model.blocks(), absorbed.blocks(), plan.cfg_mask, strict=True)
    with torch.no_grad():
        for (conv, bn), (_, absorbed_bn), keep in walk:
            absorbed_bn.running_mean -= conv.weight.sum((2, 3)) @ constant
            constant = bn.bias.relu()
            constant[keep] = 0
        absorbed.classifier.bias += model.classifier.weight @ constant
    return absorbed


def recalibrate_bn(model: VGG, batches: Iterable[tuple[Tensor, Tensor]]) -> VGG:
    """A copy of `model` with BN running statistics measured anew (EagleEye: Li et al., ECCV 2020).

    `batches` yields (images, labels) of the training set; labels are not used. The new running mean
    is the average of the batches' means, the new running variance that of their unbiased variances,
    both weighted by the number of images, so each image counts the same. No weight changes, and the
    same batches give the same result; mode and momentum are those of `model`.

    One image has no variance where its maps shrink to 1×1: it joins the batch before it (the first
    one, the batch after it). Raises ValueError without a batch, or where such an image is the only.
    """
    recalibrated = copy.deepcopy(model).train()
    layers = bn_layers(recalibrated)
    for bn in layers:
        bn.reset_running_stats()
    seen = 0
    with torch.no_grad():
        for images in _with_variance(batches, model.cfg):
            seen += len(images)
            for bn in layers:
                bn.momentum = len(images) / seen  # running statistics become the weighted average
            recalibrated(images)
    for bn, before in zip(layers, bn_layers(model), strict=True):
        bn.momentum = before.momentum
    return recalibrated.train(model.training)


def _with_variance(batches: Iterable[tuple[Tensor, Tensor]], cfg: list[int | str]) -> list[Tensor]:
    """The images of each batch; one that leaves the last BN a single value joins its neighbour."""
    last = max(i for i, v in enumerate(cfg) if v != "M")
    pools = cfg[:last].count("M")

    def alone(images: Tensor) -> bool:
        height, width = images.shape[-2:]
        return len(images) * (height >> pools) * (width >> pools) == 1

    joined: list[Tensor] = []
    for images, _ in batches:
        if joined and (alone(images) or alone(joined[-1])):
            joined[-1] = torch.cat([joined[-1], images])
        else:
            joined.append(images)
    if not joined or alone(joined[0]):
        raise ValueError(
            f"recalibrate_bn: {len(joined)} images are too few to measure a variance; "
            "pass at least one batch of two images or more"
        )
    return joined


def slim_repaired(model: VGG, plan: PruningPlan, batches: Iterable[tuple[Tensor, Tensor]]) -> VGG:
    """The slim network with both repairs: β absorbed, BN recalibrated on `batches`."""
    return recalibrate_bn(slim(absorb_bias(model, plan), plan), batches)


def slim_rungs(
    model: VGG, plan: PruningPlan, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, VGG]:
    """The slim network at each rung of the ladder: the raw cut, each repair alone, and both."""
    batches = list(batches)  # gone through twice
    raw, absorbed = slim(model, plan), slim(absorb_bias(model, plan), plan)
    return {
        "raw cut": raw,
        "β absorbed": absorbed,
        "BN recalibrated": recalibrate_bn(raw, batches),
        "β absorbed, BN recalibrated": recalibrate_bn(absorbed, batches),
    }
