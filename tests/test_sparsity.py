"""utils/sparsity.py: where γ is, what the penalty adds to its gradient, how sparse it is."""

import pytest
import torch

from models.vgg import VGG
from utils.sparsity import (
    EPS,
    add_l1_subgradient,
    bn_layers,
    is_collapsed,
    mass_below,
    scaling_factors,
    sparsity,
    verdict,
)


def network(*gammas):
    """A network with one layer per list of γ."""
    model = VGG([len(g) for g in gammas])
    for bn, gamma in zip(bn_layers(model), gammas, strict=True):
        bn.weight.data = torch.tensor(gamma)
    return model


def test_bn_layers_come_in_forward_order():
    model = VGG([3, 4, "M", 5])
    layers = bn_layers(model)
    assert len(layers) == 3
    assert all(layer is model.feature[i] for layer, i in zip(layers, (1, 4, 8), strict=True))


def test_scaling_factors_are_the_absolute_values_in_forward_order_without_gradient():
    factors = scaling_factors(network([0.5, -2.0], [0.0], [-0.25, 1.0, 3.0]))
    assert factors.tolist() == [0.5, 2.0, 0.0, 0.25, 1.0, 3.0]
    assert not factors.requires_grad


@pytest.mark.parametrize("l1_lambda", [0.0, 1e-4, 1e-2, 1.0])
def test_l1_subgradient_is_what_autograd_finds_for_lambda_times_the_sum_of_absolute_gammas(
    l1_lambda,
):
    model = network([-0.3, 0.0, 0.7, -0.0], [0.0, -2.0], [1e-8, -1e-8, 0.5])
    loss = model(torch.randn(4, 3, 8, 8)).square().mean()
    gammas = [bn.weight for bn in bn_layers(model)]
    penalised = loss + l1_lambda * sum(gamma.abs().sum() for gamma in gammas)
    expected = torch.autograd.grad(penalised, list(model.parameters()), retain_graph=True)

    loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    add_l1_subgradient(model, l1_lambda)

    is_gamma = [any(p is gamma for gamma in gammas) for p in model.parameters()]
    for p, old, new, has_penalty in zip(
        model.parameters(), before, expected, is_gamma, strict=True
    ):
        if has_penalty:
            torch.testing.assert_close(p.grad, new, rtol=1e-6, atol=1e-9)
        else:  # convolutions, β and the classifier carry no penalty
            assert torch.equal(p.grad, old)


@pytest.mark.parametrize("l1_lambda", [0.0, 1e-4])
def test_l1_subgradient_before_backward_is_an_error(l1_lambda):
    with pytest.raises(RuntimeError, match="backward"):
        add_l1_subgradient(network([0.5]), l1_lambda)


@pytest.mark.parametrize("eps", [0.25, EPS])
def test_a_channel_exactly_at_eps_is_not_sparse(eps):
    below = torch.nextafter(torch.tensor(eps), torch.tensor(0.0)).item()
    assert sparsity(network([eps, -eps], [below, -below, 0.0, 2 * eps]), eps) == 0.5


def test_sparsity_is_0_at_the_start_and_1_when_every_gamma_is_0():
    assert sparsity(VGG([3, 4])) == 0
    assert sparsity(network([0.0], [0.0, -0.0])) == 1


@pytest.mark.parametrize(
    ("pruning_ratio", "mass"), [(0, 0.0), (0.25, 0.1), (0.5, 0.3), (0.75, 0.6), (1, 1.0)]
)
def test_mass_below_is_the_share_of_the_sum_that_the_smallest_channels_hold(pruning_ratio, mass):
    assert mass_below(torch.tensor([4.0, -1.0, 3.0, -2.0]), pruning_ratio) == pytest.approx(mass)


def test_mass_below_of_a_network_without_any_gamma_left_is_0():
    assert mass_below(torch.zeros(4), 0.5) == 0


@pytest.mark.parametrize(("largest", "collapsed"), [(0.25, False), (-0.25, False), (0.24, True)])
def test_collapsed_means_that_no_gamma_reaches_eps(largest, collapsed):
    assert is_collapsed(torch.tensor([0.0, largest, 0.1]), eps=0.25) is collapsed


@pytest.mark.parametrize(("alive", "collapsed"), [(1, True), (29, True), (30, False)])
def test_a_few_channels_that_stay_on_do_not_hide_a_collapse(alive, collapsed):
    """At λ = 1e-2 30 of 1,376 channels stayed on, at 24 % accuracy."""
    gammas = torch.full((1000,), 1e-5)
    gammas[:alive] = 0.5
    assert is_collapsed(gammas) is collapsed


@pytest.mark.parametrize(
    ("gammas", "words"),
    [
        ([1e-5, -3e-5, 2e-5, 0.0], ["collapsed", "0.0%", "λ is too strong"]),
        ([1.0, 1e-4, -2.0, 0.0], ["safe", "50%", "0.00%"]),
        ([1.0, 99.0], ["safe", "50%", "1.00%"]),  # exactly the mass that counts as safe
        ([1.0, -1.0, 2.0, 4.0], ["too little sparsity", "50%", "25.0%"]),
    ],
)
def test_verdict_names_the_state_and_its_numbers(gammas, words):
    sentence = verdict(torch.tensor(gammas), pruning_ratio=0.5)
    assert all(word in sentence for word in words), sentence
