"""utils/pruning.py: which channels go, and that the slim network computes what the masked does."""

import copy
import math

import numpy as np
import pytest
import torch
import torch_pruning as tp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import cfgs, network, seeds
from torch import nn

from models.vgg import VGG, most_prunable
from utils import cost
from utils.pruning import mask, plan_pruning, slim
from utils.sparsity import bn_layers, scaling_factors

ratios = st.floats(0, 1, exclude_max=True)
floors = st.integers(1, 7)
# Few values, so that ties and zeros are common.
few_gammas = st.lists(
    st.lists(st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


def masks(plan):
    return [m.tolist() for m in plan.cfg_mask]


def random_network(cfg, **options):
    """Nothing left at its initial value, γ of both signs."""
    model = VGG(cfg, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
        for bn in bn_layers(model):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
            bn.num_batches_tracked.fill_(7)
    return model


def integer_network(cfg):
    """float64, small whole numbers and powers of two only: no operation of it rounds."""
    model = VGG(cfg).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape))
        for bn in bn_layers(model):
            bn.running_mean.copy_(torch.randint(-3, 4, bn.running_mean.shape))
            variance = 4.0 ** torch.randint(-1, 2, bn.running_var.shape)
            bn.running_var.copy_(variance.double() - bn.eps)
            assert torch.equal(bn.running_var + bn.eps, variance.double())
    return model


def integer_images():
    return torch.randint(-4, 5, (2, 3, 16, 16)).double()


def feasible_plan(model, pruning_ratio, floor):
    try:
        return plan_pruning(model, pruning_ratio, min_channels=floor)
    except ValueError:
        assume(False)  # that an error is right is the oracle's test


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# --- plan_pruning ---------------------------------------------------------------------------


def oracle(gammas, floor, enough):
    """The rule in plain Python: smallest first, skip a layer at its floor, until `enough`(widths).

    None where that never comes.
    """
    channels = [(abs(g), layer, i) for layer, gs in enumerate(gammas) for i, g in enumerate(gs)]
    keep = [[True] * len(gs) for gs in gammas]
    for _, layer, i in sorted(channels):
        if enough([sum(k) for k in keep]):
            break
        if sum(keep[layer]) > floor:
            keep[layer][i] = False
    return keep if enough([sum(k) for k in keep]) else None


def macs_by_hand(widths, pools=(), classes=10):
    """Of 3×3 convolutions on a 32×32 image, with a max-pool after the layers in `pools`."""
    macs, channels, side = 0, 3, 32
    for layer, width in enumerate(widths):
        macs += side * side * 9 * channels * width
        channels = width
        side //= 2 if layer in pools else 1
    return macs + channels * classes


def mass_by_hand(gammas, keep):
    mass, stays = [abs(g) for gs in gammas for g in gs], [k for ks in keep for k in ks]
    lost = sum(m for m, k in zip(mass, stays, strict=True) if not k)
    return lost / sum(mass) if lost else 0


@pytest.mark.reliability
@given(gammas=few_gammas, pruning_ratio=ratios, floor=floors)
def test_plan_is_that_of_the_rule_in_plain_python(gammas, pruning_ratio, floor):
    """plan invariants: exact count, floors, ties in forward order

    What a floor keeps is pruned elsewhere; where that is impossible, an error says so.
    """
    model, total = network(*gammas), sum(map(len, gammas))
    stay = total - round(total * pruning_ratio)
    expected = oracle(gammas, floor, lambda widths: sum(widths) <= stay)
    if expected is None:
        with pytest.raises(ValueError, match=rf"^pruning_ratio = .* min_channels = {floor} "):
            plan_pruning(model, pruning_ratio, min_channels=floor)
        return
    plan = plan_pruning(model, pruning_ratio, min_channels=floor)
    assert masks(plan) == expected
    assert plan.cfg == [sum(keep) for keep in expected]
    assert plan.mass_cut == pytest.approx(mass_by_hand(gammas, expected))
    assert (plan.pruning_ratio, plan.kept, plan.total) == (pruning_ratio, stay, total)
    assert (plan.macs, plan.realised_macs) == (None, None)


@settings(max_examples=20)
@given(gammas=few_gammas, macs=st.floats(0.01, 1), floor=floors)
def test_plan_by_macs_is_that_of_the_rule_in_plain_python(gammas, macs, floor):
    """No channel more may go than the MACs ask for: the rule stops at the first that is enough."""
    model, whole = network(*gammas), macs_by_hand(map(len, gammas))
    expected = oracle(gammas, floor, lambda widths: macs_by_hand(widths) / whole <= macs)
    if expected is None:
        with pytest.raises(ValueError, match=rf"^macs = .* min_channels = {floor} "):
            plan_pruning(model, macs=macs, min_channels=floor)
        return
    plan = plan_pruning(model, macs=macs, min_channels=floor)
    assert masks(plan) == expected
    assert plan.cfg == [sum(keep) for keep in expected]
    assert plan.macs == macs
    assert plan.realised_macs == macs_by_hand(plan.cfg) / whole
    assert plan.mass_cut == pytest.approx(mass_by_hand(gammas, expected))
    assert plan.pruning_ratio == plan.realised_ratio


def test_macs_of_the_slim_network_are_the_realised_ones_and_asking_for_them_changes_nothing():
    model = random_network([8, 9, "M", 12, "M", 7], num_classes=3)
    plan = plan_pruning(model, macs=0.3, min_channels=2)
    assert plan.realised_macs == cost.macs(slim(model, plan)) / cost.macs(model)
    widths = [v for v in plan.cfg if v != "M"]
    whole = macs_by_hand([8, 9, 12, 7], pools=(1, 2), classes=3)
    assert plan.realised_macs == macs_by_hand(widths, pools=(1, 2), classes=3) / whole
    again = plan_pruning(model, macs=plan.realised_macs, min_channels=2)
    by_ratio = plan_pruning(model, plan.pruning_ratio, min_channels=2)
    assert masks(again) == masks(by_ratio) == masks(plan)


@given(cfg=cfgs, floor=floors)
def test_the_most_that_can_go_leaves_each_layer_its_floor_and_one_channel_more_is_refused(
    cfg, floor
):
    model = random_network(cfg)
    total, most = scaling_factors(model).numel(), most_prunable(cfg, floor)
    plan = plan_pruning(model, most / total, min_channels=floor)
    one_more = (most + 1) / total
    assert [m.sum() for m in plan.cfg_mask] == [min(m.numel(), floor) for m in plan.cfg_mask]
    if one_more < 1:
        with pytest.raises(ValueError, match="min_channels"):
            plan_pruning(model, one_more, min_channels=floor)


@pytest.mark.reliability
@given(cfg=cfgs, seed=seeds, pair=st.tuples(ratios, ratios).map(sorted), floor=floors)
def test_a_channel_pruned_at_one_ratio_stays_pruned_at_every_higher_one(cfg, seed, pair, floor):
    """plan invariants: monotonic in the ratio"""
    torch.manual_seed(seed)
    model = random_network(cfg)
    less, more = (feasible_plan(model, ratio, floor) for ratio in pair)
    for kept_at_more, kept_at_less in zip(more.cfg_mask, less.cfg_mask, strict=True):
        assert not (kept_at_more & ~kept_at_less).any()


@pytest.mark.reliability
@given(cfg=cfgs, seed=seeds, pruning_ratio=ratios)
def test_threshold_separates_kept_from_pruned_where_no_layer_needs_its_floor(
    cfg, seed, pruning_ratio
):
    """plan invariants: the threshold separates kept from pruned"""
    torch.manual_seed(seed)
    model = random_network(cfg)
    gammas = [bn.weight.detach().abs() for bn in bn_layers(model)]
    ordered = torch.cat(gammas).sort().values
    count = round(len(ordered) * pruning_ratio)
    assume(len(ordered.unique()) == len(ordered))
    assume(count < len(ordered) and all(g.max() >= ordered[count] for g in gammas))
    plan = plan_pruning(model, pruning_ratio)
    for gamma, keep in zip(gammas, plan.cfg_mask, strict=True):
        assert torch.equal(keep, gamma > plan.threshold)


def test_threshold_is_halfway_between_the_last_to_go_and_the_first_to_stay():
    assert plan_pruning(network([0.1, 0.9], [-0.3, 0.7]), 0.5).threshold == pytest.approx(0.5)


@pytest.mark.parametrize("asked", [{"pruning_ratio": 0}, {"macs": 1}])
def test_to_prune_nothing_keeps_everything(asked):
    model = random_network([3, 4, "M", 5])
    plan = plan_pruning(model, **asked)
    assert plan.cfg == model.cfg
    assert all(keep.all() for keep in plan.cfg_mask)
    assert (plan.threshold, plan.realised_ratio, plan.mass_cut, plan.kept) == (0, 0, 0, 12)
    slimmed = slim(model, plan).state_dict()
    assert all(torch.equal(slimmed[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        *[("pruning_ratio", v, "") for v in (1, 1.0, -0.1, 100, math.nan, math.inf)],
        *[("pruning_ratio", v, "") for v in (False, True, "0.5", [0.5])],
        *[("pruning_ratio", v, "; did you mean 0.5?") for v in (50, 50.0)],
        *[("macs", v, "") for v in (0, 0.0, -0.1, 101, math.nan, True, "0.5")],
        *[("macs", 7.5, "; did you mean 0.075?"), ("macs", 100, "; did you mean 1?")],
        *[("min_channels", v, "") for v in (0, -1, 0.5, 1.0, 200.0, math.nan, True, "2", None)],
    ],
)
def test_bad_settings_raise_an_error_that_names_field_and_value(field, value, hint):
    share = {"pruning_ratio": 0.5} if field == "min_channels" else {}
    with pytest.raises(ValueError) as error:
        plan_pruning(VGG([4, 4]), **(share | {field: value}))
    assert str(error.value).startswith(f"{field} = {value!r}: must be ")
    assert str(error.value).partition("; did")[1:] == hint.partition("; did")[1:]


@pytest.mark.parametrize("value", [np.array([0.5, 0.5]), torch.tensor([0.5]), np.bool_(True)])
def test_what_is_no_single_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^pruning_ratio = .*: must be "):
        plan_pruning(VGG([4, 4]), value)


def test_where_every_gamma_is_0_a_cut_loses_nothing():
    assert plan_pruning(network([0.0, -0.0, 0.0], [0.0]), 0.5).mass_cut == 0


def test_neither_share_or_both_is_an_error():
    for shares in ({}, {"pruning_ratio": 0.5, "macs": 0.5}):
        with pytest.raises(ValueError, match=r"pruning_ratio = .*, macs = .*: give exactly one"):
            plan_pruning(VGG([4, 4]), **shares)


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor])
def test_numbers_of_numpy_and_torch_are_plain_numbers_in_the_plan(kind):
    model, floor = random_network([5, 6]), torch.tensor(2) if kind is torch.tensor else np.int64(2)
    by_ratio = plan_pruning(model, kind(0.5), min_channels=floor)
    by_macs = plan_pruning(model, macs=kind(0.5), min_channels=floor)
    assert masks(by_ratio) == masks(plan_pruning(model, 0.5, min_channels=2))
    assert masks(by_macs) == masks(plan_pruning(model, macs=0.5, min_channels=2))
    assert type(by_ratio.pruning_ratio) is type(by_macs.macs) is float


@pytest.mark.parametrize("gamma", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", ["pruning_ratio", "macs"])
def test_gamma_that_is_not_finite_is_an_error(gamma, share):
    with pytest.raises(ValueError, match="not finite"):
        plan_pruning(network([0.5, gamma], [0.5]), **{share: 0.5})


def test_printed_plan_shows_what_was_asked_for_and_what_is_realised():
    text = str(plan_pruning(network([0.1, 0.2, 0.3]), 0.5))
    assert all(part in text for part in ("prune 50.0%", "pruned 66.67%", "1 of 3 channels"))
    text = str(plan_pruning(network([0.1, 0.2, 0.3]), macs=0.5))
    # One of three channels: 1 · 27 · 32² + 10 of 3 · 27 · 32² + 30 MACs.
    asked_and_realised = ("keep 50.00% of the MACs", "kept 33.33%", "pruned 66.67%", "1 of 3")
    assert all(part in text for part in asked_and_realised), text


# --- mask and slim --------------------------------------------------------------------------


@pytest.mark.reliability
@given(cfg=cfgs, seed=seeds, pruning_ratio=ratios, floor=floors)
def test_masked_equals_slim_exactly_in_exact_arithmetic(cfg, seed, pruning_ratio, floor):
    """masked ≡ slim network, exact arithmetic"""
    torch.manual_seed(seed)
    model = integer_network(cfg)
    plan, images = feasible_plan(model, pruning_ratio, floor), integer_images()
    assert torch.equal(slim(model, plan)(images), mask(model, plan)(images))


@pytest.mark.reliability
@given(cfg=cfgs, seed=seeds, pruning_ratio=ratios, floor=floors)
def test_masked_equals_slim_to_1e_4_in_float32(cfg, seed, pruning_ratio, floor):
    """masked ≡ slim network, random float32"""
    torch.manual_seed(seed)
    model, images = random_network(cfg), torch.randn(2, 3, 16, 16)
    plan = feasible_plan(model, pruning_ratio, floor)
    assert relative_error(slim(model, plan)(images), mask(model, plan)(images)) <= 1e-4


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["exact", "float32"])
def test_masked_equals_slim_fails_where_beta_is_left_unmasked(kind):
    """negative control: β left unmasked makes masked ≡ slim fail

    γ = 0 alone leaves relu(β) flowing onward.
    """
    exact = kind == "exact"
    model = (integer_network if exact else random_network)([4, "M", 5])
    with torch.no_grad():
        for bn in bn_layers(model):
            bn.bias.abs_().add_(1)
    images = integer_images() if exact else torch.randn(2, 3, 16, 16)
    plan = plan_pruning(model, 0.5)
    slimmed, leaky = slim(model, plan)(images), mask(model, plan)
    assert relative_error(slimmed, leaky(images)) <= 1e-4
    for bn, old in zip(bn_layers(leaky), bn_layers(model), strict=True):
        bn.bias.data.copy_(old.bias)
    assert relative_error(slimmed, leaky(images)) > 1e-2


def test_mask_sets_gamma_and_beta_of_pruned_channels_to_0_and_nothing_else():
    model = random_network([4, "M", 5])
    plan = plan_pruning(model, 0.5)
    masked = mask(model, plan).state_dict()
    for name, value in model.state_dict().items():
        layer = {"feature.1": 0, "feature.5": 1}.get(name.rpartition(".")[0])
        if layer is not None and name.endswith((".weight", ".bias")):
            value = torch.where(plan.cfg_mask[layer], value, torch.zeros(()))
        assert torch.equal(masked[name], value), name


@pytest.mark.parametrize("seed", range(3))
def test_slim_copies_what_torch_prunings_dependency_graph_copies(seed):
    torch.manual_seed(seed)
    model = random_network([6, 5, "M", 7, "M", 4])
    plan = plan_pruning(model, 0.5)
    reference = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(reference, torch.randn(1, 3, 16, 16))
    convs = [m for m in reference.modules() if isinstance(m, nn.Conv2d)]
    for conv, keep in zip(convs, plan.cfg_mask, strict=True):
        pruned = (~keep).nonzero().flatten().tolist()
        if pruned:
            graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=pruned).prune()

    for bn in bn_layers(model):
        bn.eps, bn.momentum = 0.01, 0.3
    kept = {(bn.eps, bn.momentum) for bn in bn_layers(slim(model, plan))}
    assert kept == {(0.01, 0.3)}
    expected, slimmed = reference.state_dict(), slim(model, plan).state_dict()
    assert slimmed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(slimmed[name], value), name


@pytest.mark.parametrize("apply", [mask, slim])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mode_dtype_and_classes_stay_and_the_input_is_unchanged(apply, training, dtype):
    model = random_network([4, "M", 5], num_classes=3).to(dtype).train(training)
    before = copy.deepcopy(model.state_dict())
    result = apply(model, plan_pruning(model, 0.5))

    assert all(module.training is training for module in result.modules())
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert result.classifier.out_features == 3
    with torch.no_grad():  # writing to the result must not reach the input either
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.zero_()
    assert model.cfg == [4, "M", 5]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("apply", [mask, slim])
@pytest.mark.parametrize("other", [[4, 5], [4, "M", 6], [4], [4, 5, "M"], [4, "M", 5, "M"]])
def test_plan_of_another_network_is_an_error(apply, other):
    plan = plan_pruning(VGG([4, "M", 5]), 0.5)
    with pytest.raises(ValueError, match="the plan is for"):
        apply(VGG(other), plan)
