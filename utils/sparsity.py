"""The scaling factors γ of a network: where they are, how the L1 penalty pulls them to zero."""

import torch
from torch import Tensor, nn

EPS = 1e-2
"""A channel counts as sparse when |γ| < EPS. γ starts at 0.5; at lr 0.1 and λ = 1e-3 a γ that has
reached zero still swings by about lr·λ/(1 − momentum) = 1e-3."""


def bn_layers(model: nn.Module) -> list[nn.BatchNorm2d]:
    """The batch-norm layers of `model`, in forward order."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def scaling_factors(model: nn.Module) -> Tensor:
    """|γ| of every channel of every BN layer, in forward order: a 1-D tensor without gradient."""
    return torch.cat([bn.weight.detach().abs() for bn in bn_layers(model)])


def add_l1_subgradient(model: nn.Module, l1_lambda: float) -> None:
    """γ.grad += λ·sign(γ) for every BN layer: the sub-gradient of λ·Σ|γ| (Liu et al. 2017, eq. 1).

    Call it after `backward()` and before `step()`. At γ = 0 the sub-gradient chosen is 0, as
    autograd chooses it for |·|. Raises RuntimeError if there is no gradient yet.
    """
    gammas = [bn.weight for bn in bn_layers(model)]
    if any(gamma.grad is None for gamma in gammas):
        raise RuntimeError("add_l1_subgradient: γ has no gradient yet; call backward() first")
    if l1_lambda == 0:
        return
    # One call for all layers, as torch's own optimizers do it: 16 small launches become one.
    # (Up to torch 2.14 these functions have no public name.)
    with torch.no_grad():
        signs = torch._foreach_sign(gammas)
        torch._foreach_add_([gamma.grad for gamma in gammas], signs, alpha=l1_lambda)


def sparsity(model: nn.Module, eps: float = EPS) -> float:
    """Share of channels with |γ| < eps, from 0 to 1."""
    return (scaling_factors(model) < eps).float().mean().item()


def swing(lr: float, l1_lambda: float, momentum: float) -> float:
    """How far a γ that has reached zero still swings in a step: λ's pull, summed up by momentum."""
    return lr * l1_lambda / (1 - momentum)


def reach(swing: float) -> float:
    """Above this |γ| a channel is on: EPS, or 3 swings where λ is strong (at momentum 0.9 a γ
    overshoots zero by up to 2.5)."""
    return max(EPS, 3 * swing)


def is_collapsed(gammas: Tensor, swing: float = 0.0) -> bool:
    """True when λ was so strong that less than 3 % of the channels stay on.

    `swing` is that of the last lr. Not "none stay on": a few may, in a network that hardly works
    any more (seen at λ = 1e-2: 30 of 1,376 channels, 24 % accuracy).
    """
    return (gammas.abs() >= reach(swing)).double().mean().item() < 0.03
