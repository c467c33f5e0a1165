"""utils/repair.py: absorbed β and re-estimated BN statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny import cfgs, seeds
from torch import nn
from torch.optim.swa_utils import update_bn

from models.vgg import VGG
from utils.pruning import mask, plan_pruning, slim
from utils.repair import RUNGS, absorb_bias, recalibrate_bn, slim_repaired, slim_rungs
from utils.sparsity import bn_layers


def trained(cfg, padding="zeros"):
    """A float64 network with nothing left at its initial value, as training leaves it."""
    model = VGG(cfg).double().eval()
    with torch.no_grad():
        for bn in bn_layers(model):
            bn.weight.copy_(torch.rand_like(bn.weight) + 0.1)
            bn.bias.normal_()
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
        model.classifier.weight.normal_()
        model.classifier.bias.normal_()
    for conv in model.feature:
        if isinstance(conv, nn.Conv2d):
            conv.padding_mode = padding
    return model


def with_plan(cfg, pruning_ratio=0.5, padding="zeros"):
    """A network, and a plan for it that prunes only channels whose γ is 0 (β is anything)."""
    model = trained(cfg, padding)
    plan = plan_pruning(model, pruning_ratio)
    with torch.no_grad():
        for bn, keep in zip(bn_layers(model), plan.cfg_mask, strict=True):
            bn.weight[~keep] = 0
    return model, plan


def images(n=2, size=16):
    return torch.randn(n, 3, size, size, dtype=torch.float64)


def unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


@pytest.mark.reliability
@given(cfg=cfgs, seed=seeds, share=st.floats(0, 1))
def test_absorbing_beta_is_exact_where_padding_does_not_break_a_constant_map(cfg, seed, share):
    """absorb_bias: exact where padding keeps a constant map constant

    Replicate padding does, up to the edge; zero padding does not.
    """
    torch.manual_seed(seed)
    total = sum(v for v in cfg if v != "M")
    prunable = total - sum(v != "M" for v in cfg)
    model, plan = with_plan(cfg, share * prunable / total, "replicate")
    x = images()
    absorbed = absorb_bias(model, plan)
    for network in (absorbed, slim(absorbed, plan)):
        torch.testing.assert_close(network(x), model(x), rtol=1e-9, atol=1e-9)


def test_with_zero_padding_absorbing_beta_is_exact_inside_but_not_at_the_border():
    model = trained([4, 3])
    with torch.no_grad():
        model.feature[1].weight[:2] = 0
        model.feature[1].bias[:2] = 1
    plan = plan_pruning(model, 2 / 7)
    assert [m.tolist() for m in plan.cfg_mask] == [[False, False, True, True], [True] * 3]
    x = images()
    error = (absorb_bias(model, plan).feature(x) - model.feature(x)).abs()
    assert error[..., 1:-1, 1:-1].max() < 1e-12
    assert error.max() > 1e-3


def test_absorb_bias_changes_only_gamma_beta_running_means_and_the_classifiers_bias():
    model, plan = with_plan([4, "M", 5])
    before = copy.deepcopy(model.state_dict())
    masked, absorbed = mask(model, plan).state_dict(), absorb_bias(model, plan).state_dict()
    differing = {key for key in masked if not torch.equal(masked[key], absorbed[key])}
    assert differing == {"feature.5.running_mean", "classifier.bias"}
    assert unchanged(model, before)


def batches(sizes=(4, 4, 4), size=8):
    """Batches whose statistics differ."""
    return [
        (images(n, size) * (i + 1) + i, torch.zeros(n, dtype=torch.long))
        for i, n in enumerate(sizes)
    ]


def statistics(model):
    return [t for bn in bn_layers(model) for t in (bn.running_mean, bn.running_var)]


def test_recalibrated_statistics_are_the_batches_means_and_unbiased_variances_weighted():
    sizes = (2, 5, 3)
    model, data = trained([3, "M", 2]), batches(sizes)
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    found = []
    for x, _ in data:
        maps = F.conv2d(x, model.feature[0].weight, padding=1)
        gamma, beta = model.feature[1].weight, model.feature[1].bias
        normed = F.batch_norm(maps, None, None, gamma, beta, training=True)
        deeper = F.conv2d(F.max_pool2d(F.relu(normed), 2), model.feature[4].weight, padding=1)
        found.append([s for m in (maps, deeper) for s in (m.mean((0, 2, 3)), m.var((0, 2, 3)))])
    expected = [weights @ torch.stack(values) for values in zip(*found, strict=True)]
    for value, average in zip(statistics(recalibrate_bn(model, data)), expected, strict=True):
        torch.testing.assert_close(value, average)


def test_recalibration_on_batches_of_equal_size_is_torchs_update_bn_bit_for_bit():
    model, data = trained([3, "M", 2]).float(), [(x.float(), y) for x, y in batches((4,) * 7)]
    expected = copy.deepcopy(model)
    update_bn(data, expected)
    assert unchanged(recalibrate_bn(model, data), expected.state_dict())


@pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (1, 1, 1)])
def test_a_batch_of_one_image_joins_its_neighbour(sizes):
    model, data = trained([3, "M", "M", "M", 2]), batches(sizes)
    together = [(torch.cat([x for x, _ in data]), None)]
    assert unchanged(recalibrate_bn(model, data), recalibrate_bn(model, together).state_dict())


def test_recalibration_forgets_the_old_statistics_and_repeats_exactly():
    model, data = trained([3, "M", 2]), batches()
    other = copy.deepcopy(model)
    for bn in bn_layers(other):
        bn.running_mean.fill_(torch.inf)
        bn.running_var.fill_(torch.nan)
    once = recalibrate_bn(model, data).state_dict()
    assert unchanged(recalibrate_bn(model, data), once)
    assert unchanged(recalibrate_bn(other, data), once)


@pytest.mark.parametrize("training", [True, False])
def test_recalibration_changes_statistics_only_and_leaves_its_input_unchanged(training):
    model = trained([3, "M", 2]).train(training)
    for bn in bn_layers(model):
        bn.momentum = 0.3
    before = copy.deepcopy(model.state_dict())
    recalibrated = recalibrate_bn(model, iter(batches()))  # an iterable that can be read only once

    assert unchanged(model, before)
    assert all(m.training is training for m in [*model.modules(), *recalibrated.modules()])
    assert [bn.momentum for bn in bn_layers(recalibrated)] == [0.3, 0.3]
    for name, parameter in recalibrated.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for name, statistics in recalibrated.named_buffers():
        assert not torch.equal(statistics, before[name]), name


@pytest.mark.parametrize("sizes", [(), (1,)])
def test_too_few_images_for_a_variance_are_an_error(sizes):
    with pytest.raises(ValueError, match=f"{len(sizes)} images .* pass at least one batch"):
        recalibrate_bn(trained([3, "M", "M", "M", 2]), iter(batches(sizes)))


def test_rungs_are_the_raw_cut_each_repair_alone_and_both():
    model, data = trained([6, 5, "M", 4]), batches()
    plan = plan_pruning(model, 0.5)
    raw, absorbed = slim(model, plan), slim(absorb_bias(model, plan), plan)
    expected = {
        "raw cut": raw,
        "β absorbed": absorbed,
        "BN recalibrated": recalibrate_bn(raw, data),
        "β absorbed, BN recalibrated": recalibrate_bn(absorbed, data),
    }
    rungs = slim_rungs(model, plan, iter(data))  # an iterable that can be read only once
    assert tuple(rungs) == RUNGS == tuple(expected)
    for name, network in rungs.items():
        assert unchanged(network, expected[name].state_dict()), name
    both = slim_repaired(model, plan, iter(data))
    assert unchanged(both, expected["β absorbed, BN recalibrated"].state_dict())
