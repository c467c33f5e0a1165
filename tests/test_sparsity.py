"""utils/sparsity.py: where γ is, what the penalty adds to its gradient, how sparse it is."""

import pytest
import torch
import torch.nn.functional as F
from tiny import network
from torch import nn

from models.vgg import VGG
from utils.sparsity import (
    EPS,
    add_l1_subgradient,
    bn_layers,
    is_collapsed,
    scaling_factors,
    sparsity,
    swing,
)


def test_bn_layers_of_any_network_come_in_forward_order():
    first, second, third = (nn.BatchNorm2d(n) for n in (3, 4, 5))
    model = nn.Sequential(first, nn.Sequential(nn.ReLU(), second), nn.ModuleDict({"bn": third}))
    assert bn_layers(model) == [first, second, third]


def test_scaling_factors_are_the_absolute_values_in_forward_order_without_gradient():
    factors = scaling_factors(network([0.5, -2.0], [0.0], [-0.25, 1.0, 3.0]))
    assert factors.tolist() == [0.5, 2.0, 0.0, 0.25, 1.0, 3.0]
    assert not factors.requires_grad


@pytest.mark.parametrize("l1_lambda", [0.0, 1e-2])
def test_l1_subgradient_is_what_autograd_finds_for_the_sum_of_absolute_gammas(l1_lambda):
    model = network([-0.3, 0.0, 0.7, -0.0], [0.0, -2.0], [1e-8, -1e-8, 0.5])
    loss = model(torch.randn(4, 3, 8, 8)).square().mean()
    gammas = [bn.weight for bn in bn_layers(model)]
    penalised = loss + l1_lambda * sum(gamma.abs().sum() for gamma in gammas)
    expected = torch.autograd.grad(penalised, list(model.parameters()), retain_graph=True)

    loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    add_l1_subgradient(model, l1_lambda)

    for p, old, new in zip(model.parameters(), before, expected, strict=True):
        if any(p is gamma for gamma in gammas):
            torch.testing.assert_close(p.grad, new, rtol=1e-6, atol=1e-9)
        else:  # convolutions, β and the classifier carry no penalty
            assert torch.equal(p.grad, old)


@pytest.mark.parametrize("l1_lambda", [0.0, 1e-4, 0.3])
def test_l1_subgradient_is_the_plain_loop_bit_for_bit(l1_lambda):
    model, plain = VGG([64, "M", 128, 7]), []
    for bn in bn_layers(model):
        bn.weight.data = torch.randn_like(bn.weight) * (torch.rand_like(bn.weight) > 0.2)
        bn.weight.grad = torch.randn_like(bn.weight) * 10.0 ** torch.randint(-6, 3, bn.weight.shape)
        plain.append(bn.weight.grad + l1_lambda * bn.weight.detach().sign())
    add_l1_subgradient(model, l1_lambda)
    assert all(
        torch.equal(bn.weight.grad, g) for bn, g in zip(bn_layers(model), plain, strict=True)
    )


def test_l1_subgradient_before_backward_is_an_error():
    with pytest.raises(RuntimeError, match="backward"):
        add_l1_subgradient(network([0.5]), 1e-4)


def test_a_frozen_gamma_can_not_be_pulled_and_its_layer_is_named():
    model = network([0.5], [0.3, -0.3], [0.7])
    frozen = bn_layers(model)[1].weight.requires_grad_(False)
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    pulled = [bn_layers(model)[k].weight.grad.clone() for k in (0, 2)]
    with pytest.raises(ValueError, match=r"^l1_lambda = 0\.001: γ is frozen in feature\.4, .*True"):
        add_l1_subgradient(model, 1e-3)
    add_l1_subgradient(model, 0.0)
    assert frozen.grad is None
    assert all(
        torch.equal(bn_layers(model)[k].weight.grad, g) for k, g in zip((0, 2), pulled, strict=True)
    )


@pytest.mark.parametrize("eps", [0.25, EPS])
def test_a_channel_exactly_at_eps_is_not_sparse(eps):
    below = torch.nextafter(torch.tensor(eps), torch.tensor(0.0)).item()
    assert sparsity(network([eps, -eps], [below, -below, 0.0, 2 * eps]), eps) == 0.5


def test_sparsity_is_0_at_the_start_and_1_when_every_gamma_is_0():
    assert sparsity(VGG([3, 4])) == 0
    assert sparsity(network([0.0], [0.0, -0.0])) == 1


@pytest.mark.parametrize(("lr", "l1_lambda", "momentum"), [(0.1, 1e-3, 0.9), (0.4, 0.2, 0.0)])
def test_swing_is_the_step_that_sgd_takes_under_a_pull_of_lambda(lr, l1_lambda, momentum):
    gamma = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    sgd = torch.optim.SGD([gamma], lr=lr, momentum=momentum)
    for _ in range(300):
        before = gamma.item()
        gamma.grad = torch.full_like(gamma, l1_lambda)
        sgd.step()
    assert before - gamma.item() == pytest.approx(swing(lr, l1_lambda, momentum))


@pytest.mark.parametrize(("alive", "collapsed"), [(0, True), (1, True), (29, True), (30, False)])
@pytest.mark.parametrize(("least", "swing"), [(EPS, 0.0), (EPS, EPS / 4), (0.75, 0.25)])
def test_collapsed_means_that_less_than_3_percent_of_the_channels_stay_on(
    alive, collapsed, least, swing
):
    """At λ = 1e-2 30 of 1,376 channels stayed on, at 24 % accuracy."""
    gammas = torch.full((1000,), 0.99 * least, dtype=torch.float64)
    gammas[:alive] = -least
    assert is_collapsed(gammas, swing) is collapsed


@pytest.mark.parametrize(("l1_lambda", "collapsed"), [(0.2, True), (1e-3, False), (0.0, False)])
def test_training_with_too_strong_a_penalty_is_seen_though_gamma_still_swings(l1_lambda, collapsed):
    model, lr, momentum = VGG([8, "M", 16], num_classes=2), 0.1, 0.9
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(60):
        images = torch.randn(8, 3, 8, 8)
        loss = F.cross_entropy(model(images), (images.mean((1, 2, 3)) > 0).long())
        sgd.zero_grad()
        loss.backward()
        add_l1_subgradient(model, l1_lambda)
        sgd.step()
    gammas = scaling_factors(model)
    assert is_collapsed(gammas, swing(lr, l1_lambda, momentum)) is collapsed
    assert not is_collapsed(gammas)  # EPS alone does not see it
