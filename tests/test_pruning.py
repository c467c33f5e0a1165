"""utils/pruning.py: which channels go, and that the slim network computes what the masked does."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch_pruning as tp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import cfgs, network, seeds
from torch import nn

from models.vgg import VGG
from utils import cost
from utils.pruning import PruningPlan, mask, plan_pruning, slim
from utils.repair import absorb_bias
from utils.sparsity import bn_layers

ratios = st.floats(0, 1, exclude_max=True)
floors, multiples = st.integers(1, 7), st.sampled_from([1, 1, 2, 3, 4])
# Few values, so that ties and zeros are common.
few_gammas = st.lists(
    st.lists(st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=9),
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


def oracle(gammas, floor, multiple):
    """The rule in plain Python: what is kept after each group that leaves, from all to the floors.

    Of each layer the smallest are next, down to the next multiple; of these groups the one whose
    largest |γ| is smallest leaves, if the floor lets it.
    """
    keep = [[True] * len(gs) for gs in gammas]
    states = [keep]
    while True:
        groups = []
        for layer, gs in enumerate(gammas):
            kept = sorted((abs(g), i) for i, g in enumerate(gs) if keep[layer][i])
            left = (len(kept) - 1) // multiple * multiple
            if left >= floor:
                group = kept[: len(kept) - left]
                groups.append((group[-1][0], layer, [i for _, i in group]))
        if not groups:
            return states
        _, layer, leaving = min(groups)
        keep = copy.deepcopy(keep)
        for i in leaving:
            keep[layer][i] = False
        states.append(keep)


def count_kept(keep):
    return sum(map(sum, keep))


def macs_by_hand(widths, pools=(), classes=10, side=32):
    """Of 3×3 convolutions on a square image, with a max-pool after the layers in `pools`."""
    macs, channels = 0, 3
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
@given(gammas=few_gammas, pair=st.tuples(ratios, ratios), floor=floors, multiple=multiples)
def test_plan_is_that_of_the_rule_in_plain_python(gammas, pair, floor, multiple):
    """plan invariants: count, floors, multiples, threshold, ties, monotonic in the ratio

    What a floor keeps is pruned elsewhere; where that is impossible, an error says so.
    """
    model, total, found = network(*gammas), sum(map(len, gammas)), []
    states = oracle(gammas, floor, multiple)
    for ratio in sorted(pair):
        stay, options = total - round(total * ratio), {"min_channels": floor}
        if stay < sum(min(len(gs), floor) for gs in gammas):
            with pytest.raises(ValueError, match=rf"^pruning_ratio = .* min_channels = {floor} "):
                plan_pruning(model, ratio, multiple_of=multiple, **options)
            return
        plan = plan_pruning(model, ratio, multiple_of=multiple, **options)
        expected = min(states, key=lambda keep: abs(count_kept(keep) - stay))
        assert masks(plan) == expected
        assert plan.cfg == [sum(keep) for keep in expected]
        assert plan.mass_cut == pytest.approx(mass_by_hand(gammas, expected))
        assert (plan.pruning_ratio, plan.kept, plan.total) == (ratio, count_kept(expected), total)
        assert (plan.macs, plan.realised_macs) == (None, None)
        # The properties themselves, apart from the rule that has them.
        for keep, gs in zip(expected, gammas, strict=True):
            assert sum(keep) >= min(len(gs), floor)
            assert sum(keep) % multiple == 0 or all(keep)
            assert all(k or abs(g) <= plan.threshold for k, g in zip(keep, gs, strict=True))
            below = sum(k and abs(g) < plan.threshold for k, g in zip(keep, gs, strict=True))
            assert below < multiple or sum(keep) < floor + multiple
        assert abs(plan.kept - stay) <= multiple / 2 or plan.kept == count_kept(states[-1])
        if multiple == 1:
            assert plan.kept == stay and masks(plan) == masks(plan_pruning(model, ratio, **options))
        found += [torch.cat(plan.cfg_mask)]
    assert not (found[1] & ~found[0]).any()  # pruned at one ratio is pruned at each higher one


@settings(max_examples=8)
@given(gammas=few_gammas, macs=st.floats(0.01, 1), floor=floors, multiple=multiples)
def test_plan_by_macs_is_that_of_the_rule_in_plain_python(gammas, macs, floor, multiple):
    """No channel more may go than the MACs ask for: the rule stops at the first that is enough."""
    model, whole = network(*gammas), macs_by_hand(map(len, gammas))
    options = {"macs": macs, "min_channels": floor, "multiple_of": multiple}
    states = oracle(gammas, floor, multiple)
    enough = [k for k in states if macs_by_hand(map(sum, k)) / whole <= macs]
    if not enough:
        with pytest.raises(ValueError, match=r"^macs = .*: min_channels and multiple_of keep "):
            plan_pruning(model, **options)
        return
    plan = plan_pruning(model, **options)
    assert masks(plan) == enough[0]
    assert plan.macs == macs
    assert plan.realised_macs == macs_by_hand(plan.cfg) / whole
    assert plan.mass_cut == pytest.approx(mass_by_hand(gammas, enough[0]))
    assert plan.pruning_ratio == plan.realised_ratio


@pytest.mark.parametrize("side", [32, 8])
def test_macs_of_the_slim_network_are_the_realised_ones_and_asking_for_them_changes_nothing(side):
    model, options = random_network([8, 9, "M", 12, "M", 7], num_classes=3), {"min_channels": 2}
    options["input_shape"] = (3, side, side)
    plan = plan_pruning(model, macs=0.3, **options)
    widths = [v for v in plan.cfg if v != "M"]
    whole = macs_by_hand([8, 9, 12, 7], pools=(1, 2), classes=3, side=side)
    realised = macs_by_hand(widths, pools=(1, 2), classes=3, side=side) / whole
    assert plan.realised_macs == realised
    assert plan.realised_macs == pytest.approx(
        cost.macs(slim(model, plan), (3, side, side)) / whole
    )
    again = plan_pruning(model, macs=plan.realised_macs, **options)
    by_ratio = plan_pruning(model, plan.pruning_ratio, min_channels=2)
    assert masks(again) == masks(by_ratio) == masks(plan)


def test_channels_leave_in_groups_of_which_the_largest_decides():
    """Smaller ones wait in the first layer for a larger one; the mean would let them go."""
    model = network([0.01, 0.6, 0.8, 0.9], [0.3, 0.4, 0.5, 0.7])
    assert masks(plan_pruning(model, 2 / 8, multiple_of=2)) == [[1, 1, 1, 1], [0, 0, 1, 1]]
    plan = plan_pruning(model, 4 / 8, multiple_of=2)
    assert masks(plan) == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert plan.threshold == pytest.approx((0.6 + 0.7) / 2)
    plan = plan_pruning(network([0.1] * 40, [0.9] * 5), 0.5, multiple_of=16)
    assert plan.cfg == [16, 5] and plan.realised_ratio == 24 / 45  # 22.5 were asked for
    plan = plan_pruning(network([0.1, 0.2, 0.3], [0.4] * 8), 9 / 11, multiple_of=4)
    assert plan.cfg == [3, 4] and plan.realised_ratio == 4 / 11  # no other group can leave
    assert plan_pruning(network([0.0, -0.0, 0.0], [0.0]), 0.5).mass_cut == 0


@pytest.mark.parametrize("asked", [{"pruning_ratio": 0}, {"macs": 1}])
def test_to_prune_nothing_keeps_everything(asked):
    plan = plan_pruning(random_network([3, 4, "M", 5]), **asked, multiple_of=2)
    assert plan.cfg == [3, 4, "M", 5] and all(keep.all() for keep in plan.cfg_mask)
    assert (plan.threshold, plan.realised_ratio, plan.mass_cut) == (0, 0, 0)


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        *[("pruning_ratio", v, "") for v in (1.0, -0.1, math.nan, math.inf, True, "0.5", [0.5])],
        *[("pruning_ratio", 50, "; did you mean 0.5?"), ("macs", 100, "; did you mean 1?")],
        *[("macs", v, "") for v in (0, -0.1, 101, math.nan, True, "0.5")],
        *[("min_channels", v, "") for v in (0, 0.5, 1.0, 200.0, math.nan, True, "2", None)],
        *[("multiple_of", v, "") for v in (0, -8, 16.0, True)],
        *[("pruning_ratio", v, "") for v in (np.array([0.5, 0.5]), torch.tensor([0.5]))],
    ],
)
def test_bad_settings_raise_an_error_that_names_field_and_value(field, value, hint):
    share = {"pruning_ratio": 0.5} if field in ("min_channels", "multiple_of") else {}
    with pytest.raises(ValueError) as error:
        plan_pruning(VGG([4, 4]), **(share | {field: value}))
    assert str(error.value).startswith(f"{field} = {value!r}: must be ")
    assert str(error.value).partition("; did")[1:] == hint.partition("; did")[1:]


def test_neither_share_or_both_is_an_error():
    for shares in ({}, {"pruning_ratio": 0.5, "macs": 0.5}):
        with pytest.raises(ValueError, match=r"pruning_ratio = .*, macs = .*: give exactly one"):
            plan_pruning(VGG([4, 4]), **shares)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_numbers_of_numpy_and_torch_are_plain_numbers_in_the_plan(kind):
    model, two = random_network([5, 6]), torch.tensor(2) if kind is torch.tensor else np.int64(2)
    by_ratio = plan_pruning(model, kind(0.5), min_channels=two, multiple_of=two)
    by_macs = plan_pruning(model, macs=kind(0.5), min_channels=two)
    assert masks(by_ratio) == masks(plan_pruning(model, 0.5, multiple_of=2))
    assert masks(by_macs) == masks(plan_pruning(model, macs=0.5, min_channels=2))
    assert type(by_ratio.pruning_ratio) is type(by_macs.macs) is float


@pytest.mark.parametrize("gamma", [math.nan, -math.inf])
@pytest.mark.parametrize("share", ["pruning_ratio", "macs"])
def test_gamma_that_is_not_finite_is_an_error(gamma, share):
    with pytest.raises(ValueError, match="not finite"):
        plan_pruning(network([0.5, gamma], [0.5]), **{share: 0.5})


def test_printed_plan_shows_what_was_asked_for_and_what_is_realised():
    text = str(plan_pruning(network([0.1, 0.2, 0.6]), 0.5))
    shown = ("prune 50.0%", "pruned 66.67%", "1 of 3 channels", "|γ| = 4.00e-01")
    assert all(part in text for part in shown), text
    text = str(plan_pruning(network([0.1, 0.2, 0.3]), macs=0.5))
    # One of three channels: 1 · 27 · 32² + 10 of 3 · 27 · 32² + 30 MACs.
    shown = ("keep 50.00% of the MACs", "kept 33.33%", "pruned 66.67%", "1 of 3")
    assert all(part in text for part in shown), text


# --- a plan made by hand ----------------------------------------------------------------------


def by_hand(*cfg_mask, cfg=(2,)):
    return PruningPlan(pruning_ratio=0.5, threshold=0.5, cfg=list(cfg), cfg_mask=list(cfg_mask))


ROW = [0, 1, 0, 1]
ROWS = [ROW, (False, True, False, True), np.array(ROW), np.array(ROW, np.float32)]
ROWS += [torch.tensor(ROW), torch.tensor(ROW).byte(), torch.tensor(ROW).float()]


@pytest.mark.parametrize("row", ROWS, ids=repr)
def test_a_mask_of_0_and_1_switches_the_channels_off_that_it_names(row):
    model = network([0.1, 0.9, 0.2, 0.8])
    model.feature[1].bias.data.fill_(1)
    plan = by_hand(row)
    assert plan.cfg_mask[0].dtype == torch.bool
    for switched in (mask(model, plan), absorb_bias(model, plan)):
        assert switched.feature[1].weight.tolist() == pytest.approx([0, 0.9, 0, 0.8])
        assert switched.feature[1].bias.tolist() == [0, 1, 0, 1]
    moved = absorb_bias(model, plan).classifier.bias - model.classifier.bias
    weights = model.classifier.weight
    torch.testing.assert_close(moved, weights[:, 0] + weights[:, 2])
    assert slim(model, plan).feature[1].weight.tolist() == pytest.approx([0.9, 0.8])
    assert (plan.kept, plan.total, plan.realised_ratio) == (2, 4, 0.5)


@pytest.mark.parametrize(
    ("cfg", "rows", "said"),
    [
        ([2], [[0, 2, 0, 1]], r"cfg_mask has \[0, 2, 0, 1\]"),
        ([2], [[0.5, 1, 0, 1]], r"cfg_mask has \[0\.5, "),
        ([2], [[math.nan, 1, 0, 1]], r"cfg_mask has \[nan, "),
        ([2], [[[0, 1, 0, 1]]], r"cfg_mask has \[\[0, "),
        ([2], [0, 1, 0, 1], "cfg_mask has 0: must be a row"),
        ([3], [[0, 1, 0, 1]], r"cfg = \[3\]: does not fit cfg_mask, which keeps \[2\]"),
        ([2, "M", 1], [[0, 1, 0, 1]], "does not fit"),
        ([0], [[0, 0, 0, 0]], "must be a list of channel counts"),
    ],
)
def test_a_plan_that_is_none_is_refused(cfg, rows, said):
    with pytest.raises(ValueError, match=said):
        by_hand(*rows, cfg=cfg)


@pytest.mark.parametrize("apply", [mask, slim, absorb_bias])
def test_a_plan_that_does_not_fit_the_network_or_no_longer_itself_is_refused(apply):
    plan = plan_pruning(VGG([4, "M", 5]), 0.5)
    for other in ([4, 5], [4, "M", 6], [4], [4, "M", 5, "M"]):
        with pytest.raises(ValueError, match="the plan is for"):
            apply(VGG(other), plan)
    plan = by_hand([1, 0, 0, 0], cfg=[1])
    plan.cfg_mask[0][1] = True  # one more, by hand: cfg would copy one channel into two
    with pytest.raises(ValueError, match=r"cfg = \[1\]: does not fit"):
        apply(VGG([4]), plan)
    plan = dataclasses.replace(plan, cfg=[2])
    plan.cfg_mask[0] = plan.cfg_mask[0].int()
    assert slim(apply(VGG([4]), plan) if apply is not slim else VGG([4]), plan).cfg == [2]


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


def test_slim_copies_what_torch_prunings_dependency_graph_copies():
    model = random_network([6, 5, "M", 7, "M", 4])
    plan = plan_pruning(model, 0.5, multiple_of=2)
    reference = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(reference, torch.randn(1, 3, 16, 16))
    convs = [m for m in reference.modules() if isinstance(m, nn.Conv2d)]
    for conv, keep in zip(convs, plan.cfg_mask, strict=True):
        pruned = (~keep).nonzero().flatten().tolist()
        if pruned:
            graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=pruned).prune()

    for bn in bn_layers(model):
        bn.eps, bn.momentum = 0.01, 0.3
    for conv, _ in model.blocks():
        conv.padding_mode = "reflect"
    slimmed = slim(model, plan)
    assert {(bn.eps, bn.momentum) for bn in bn_layers(slimmed)} == {(0.01, 0.3)}
    assert {conv.padding_mode for conv, _ in slimmed.blocks()} == {"reflect"}
    expected, slimmed = reference.state_dict(), slimmed.state_dict()
    assert slimmed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(slimmed[name], value), name


@pytest.mark.parametrize("apply", [mask, slim])
@pytest.mark.parametrize(("training", "dtype"), [(True, torch.float64), (False, torch.bfloat16)])
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
