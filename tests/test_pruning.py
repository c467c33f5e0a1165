"""utils/pruning.py: which channels go, and that the slim network computes what the masked does."""

import copy
import math

import pytest
import torch
import torch_pruning as tp
from conftest import cfgs, seeds
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from models.vgg import VGG
from utils.pruning import largest_ratio, mask, plan_pruning, slim
from utils.sparsity import bn_layers

ratios = st.floats(0, 1, exclude_max=True)
# Shares that binary fractions hold exactly, so that share × width has one right ceiling.
floors = st.integers(0, 7) | st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])


def network(*gammas):
    """A network with one layer per list of γ."""
    model = VGG([len(g) for g in gammas])
    for bn, gamma in zip(bn_layers(model), gammas, strict=True):
        bn.weight.data = torch.tensor(gamma)
    return model


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


def oracle_floor(width, min_channels):
    share = isinstance(min_channels, float)
    return max(1, math.ceil(min_channels * width) if share else min(min_channels, width))


def oracle(gammas, pruning_ratio, min_channels):
    """The rule in plain Python: smallest first, skip a layer at its floor. None: impossible."""
    channels = [(abs(g), layer, i) for layer, gs in enumerate(gammas) for i, g in enumerate(gs)]
    keep = [[True] * len(gs) for gs in gammas]
    to_go = round(len(channels) * pruning_ratio)
    for _, layer, i in sorted(channels):
        if to_go and sum(keep[layer]) > oracle_floor(len(gammas[layer]), min_channels):
            keep[layer][i] = False
            to_go -= 1
    return None if to_go else keep


@pytest.mark.reliability
@given(
    gammas=st.lists(
        # Few values, so that ties and zeros are common.
        st.lists(st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    ),
    pruning_ratio=ratios,
    floor=floors,
)
def test_plan_is_that_of_the_rule_in_plain_python(gammas, pruning_ratio, floor):
    """plan invariants: exact count, floors, ties in forward order

    What a floor keeps is pruned elsewhere; where that is impossible, an error says so.
    """
    model, expected = network(*gammas), oracle(gammas, pruning_ratio, floor)
    if expected is None:
        with pytest.raises(ValueError, match="min_channels"):
            plan_pruning(model, pruning_ratio, min_channels=floor)
        return
    plan = plan_pruning(model, pruning_ratio, min_channels=floor)
    assert masks(plan) == expected
    assert plan.cfg == [sum(keep) for keep in expected]
    assert plan.total - plan.kept == round(plan.total * pruning_ratio)


@given(cfg=cfgs, floor=floors)
def test_the_largest_ratio_leaves_each_layer_its_floor_and_one_channel_more_is_refused(cfg, floor):
    model = random_network(cfg)
    largest = largest_ratio(model, floor)
    if largest < 1:
        plan = plan_pruning(model, largest, min_channels=floor)
        one_more = largest + 1 / plan.total
        assert [m.sum() for m in plan.cfg_mask] == [
            oracle_floor(m.numel(), floor) for m in plan.cfg_mask
        ]
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


@pytest.mark.parametrize("pruning_ratio", [0.5, 0.7, 0.9])
def test_fresh_vgg19_where_all_gammas_tie_loses_exactly_the_share_asked_for(pruning_ratio):
    with torch.device("meta"):
        model = VGG()
    for bn in bn_layers(model):  # γ alone is needed
        bn.weight = nn.Parameter(torch.full(bn.weight.shape, 0.5))
    plan = plan_pruning(model, pruning_ratio)
    assert plan.total == 5504
    assert plan.kept == 5504 - round(5504 * pruning_ratio)
    assert min(v for v in plan.cfg if v != "M") >= 1
    assert [i for i, v in enumerate(plan.cfg) if v == "M"] == [2, 5, 10, 15]


def test_equal_gammas_go_in_forward_order():
    plan = plan_pruning(VGG([3, 4, "M", 5]), 0.5)  # γ = 0.5 everywhere; each layer keeps its last
    assert masks(plan) == [[False] * 2 + [True], [False] * 3 + [True], [False] + [True] * 4]
    assert plan.cfg == [1, 1, "M", 4]


def test_ratio_0_keeps_everything():
    model = random_network([3, 4, "M", 5])
    plan = plan_pruning(model, 0)
    assert plan.cfg == model.cfg
    assert all(keep.all() for keep in plan.cfg_mask)
    assert (plan.threshold, plan.realised_ratio, plan.kept) == (0, 0, 12)
    slimmed = slim(model, plan).state_dict()
    assert all(torch.equal(slimmed[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("floor", "kept"),
    [
        (1, [1, 5]),  # the small γ of the first layer all go, but one
        (2, [2, 4]),  # what the floor keeps there is pruned in the second layer
        (0.5, [3, 3]),
        (0.26, [2, 4]),  # 0.26 · 6 = 1.56: at least 2
        (0.0, [1, 5]),
    ],
)
def test_floor_as_a_number_or_as_a_share_is_kept_and_made_up_elsewhere(floor, kept):
    model = network([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    plan = plan_pruning(model, 6 / 12, min_channels=floor)
    assert plan.cfg == kept
    assert plan.realised_ratio == 0.5


def test_floor_as_a_share_is_not_raised_by_rounding_of_floats():
    """0.07 · 100 is 7.000000000000001 in binary floats; 7 % of 100 channels are 7."""
    assert plan_pruning(VGG([100, 100]), 186 / 200, min_channels=0.07).cfg == [7, 7]


def test_floor_wider_than_a_layer_keeps_that_layer_whole():
    assert plan_pruning(network([0.1, 0.1], [1.0] * 8), 0.4, min_channels=4).cfg == [2, 4]


@pytest.mark.parametrize(("ratio", "floor"), [(0.5, 1.0), (0.8, 0.5), (0.5, 100), (0.99, 1)])
def test_floors_that_leave_too_little_to_prune_are_an_error(ratio, floor):
    with pytest.raises(ValueError, match=f"min_channels = {floor}"):
        plan_pruning(VGG([10, 10]), ratio, min_channels=floor)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("pruning_ratio", v) for v in (1, 1.0, -0.1, 50, math.nan, math.inf)],
        *[("min_channels", v) for v in (-1, -0.5, 1.5, math.nan, math.inf, True)],
        *[("multiple_of", v) for v in (0, -8, 2.0, 1.5, None)],
    ],
)
def test_bad_settings_raise_an_error_that_names_field_and_value(field, value):
    with pytest.raises(ValueError) as error:
        plan_pruning(VGG([4, 4]), **{"pruning_ratio": 0.5, field: value})
    assert str(error.value).startswith(f"{field} = {value!r}: ")
    assert "must be" in str(error.value)


@pytest.mark.parametrize("gamma", [math.nan, math.inf, -math.inf])
def test_gamma_that_is_not_finite_is_an_error(gamma):
    with pytest.raises(ValueError, match="not finite"):
        plan_pruning(network([0.5, gamma], [0.5]), 0.5)


@pytest.mark.parametrize(("multiple", "kept"), [(1, [6, 10]), (4, [8, 8]), (8, [8, 8])])
def test_multiple_of_rounds_each_layer_and_keeps_its_largest_channels(multiple, kept):
    gammas = [[(i + 1) / 10 for i in range(12)], [(i + 4) / 10 + 0.05 for i in range(12)]]
    plan = plan_pruning(network(*gammas), 1 / 3, multiple_of=multiple)
    assert plan.cfg == kept
    assert masks(plan) == [[False] * (12 - k) + [True] * k for k in kept]
    assert plan.realised_ratio == pytest.approx(1 - sum(kept) / 24)


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.9])
def test_multiple_of_gives_multiples_but_for_layers_too_narrow(ratio):
    cfg = plan_pruning(random_network([3, 8, "M", 32, 21]), ratio, multiple_of=4).cfg
    assert cfg[0] == 3
    for kept, width in ((cfg[1], 8), (cfg[3], 32), (cfg[4], 21)):
        assert kept % 4 == 0 or kept == width
        assert 4 <= kept <= width


def test_multiple_of_does_not_round_a_layer_below_its_floor():
    cfg = plan_pruning(VGG([8, 8]), 0.3, min_channels=5, multiple_of=4).cfg
    assert min(cfg) >= 5


def test_printed_plan_shows_the_ratio_asked_for_and_the_one_realised():
    text = str(plan_pruning(network([0.1, 0.2, 0.3]), 0.5))
    assert "50.0%" in text
    assert "66.67%" in text
    assert "1 of 3" in text


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

    expected, slimmed = reference.state_dict(), slim(model, plan).state_dict()
    assert slimmed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(slimmed[name], value), name


def test_one_channel_left_in_every_layer_works():
    model = random_network([3, 4, "M", 5])
    plan = plan_pruning(model, 9 / 12)
    slimmed = slim(model, plan)
    assert slimmed.cfg == plan.cfg == [1, 1, "M", 1]
    assert [tuple(m.weight.shape) for m in slimmed.feature if isinstance(m, nn.Conv2d)] == [
        (1, 3, 3, 3),
        (1, 1, 3, 3),
        (1, 1, 3, 3),
    ]
    images = torch.randn(2, 3, 8, 8)
    assert relative_error(slimmed(images), mask(model, plan)(images)) <= 1e-4


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
