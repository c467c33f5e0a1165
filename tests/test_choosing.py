"""Which network is cut: the verdict on each λ, what the weakest that works is, which ratios."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import cfgs, tiny_data, tiny_model, tiny_profile

from models.vgg import VGG
from utils.images.data import ImageData
from utils.pruning import plan_pruning
from utils.run import choosing
from utils.run.identity import Run, RunError
from utils.run.lab import Trained
from utils.sparsity import bn_layers
from utils.store.checkpoint import History

DATA = tiny_data()


def network(gammas: float | list[float], lr: float, accuracy: float) -> Trained:
    """A network whose γ are `gammas` in turn, after a training that ended so."""
    model = tiny_model().eval()
    values = torch.tensor(gammas if isinstance(gammas, list) else [gammas])
    for bn in bn_layers(model):
        bn.weight.data = values.repeat(len(bn.weight))[: len(bn.weight)].clone()
    return Trained(model, History(lr=[lr], train_accuracy=[accuracy]))


def judged(networks: dict, data: ImageData = DATA, **changes) -> dict[float, choosing.Verdict]:
    run = Run(tiny_profile(**changes), {})
    return choosing.judge(run, data, networks, 0.5)


def choose(networks: dict, l1_lambda: float | None = None) -> choosing.Choice:
    return choosing.choose(Run(tiny_profile(), {}), DATA, networks, 0.5, l1_lambda)


GOOD = network([0.5, 0.001], 0.001, 90.0)


def test_a_network_that_has_learned_loses_what_its_pruned_channels_hold():
    verdict = judged({0.0: network(0.5, 0.001, 91.0), 0.01: GOOD})
    assert verdict[0.01].works and verdict[0.0].works
    gammas = sorted([0.5, 0.001, 0.5] + [0.5, 0.001] * 2 + [0.5, 0.001] * 2 + [0.5])
    assert verdict[0.01].plan.mass_cut == pytest.approx(sum(gammas[:6]) / sum(gammas))
    assert f"{verdict[0.01].plan.mass_cut:.2%} of Σ|γ|" in verdict[0.01].reason
    assert verdict[0.0].plan.mass_cut == pytest.approx(0.5)
    assert choose({0.0: network(0.5, 0.001, 91.0), 0.01: GOOD}).l1_lambda == 0.01


@pytest.mark.parametrize(
    ("left", "chosen"),
    [
        ({0.01: 85.0, 0.02: 89.0}, 0.01),  # the stronger one has paid for what the cut doesn't need
        ({0.01: 60.0, 0.02: 89.0}, 0.02),
        ({0.01: 60.0, 0.02: 50.0}, 0.02),  # none works: it loses least of Σ|γ|
    ],
)
def test_the_weakest_penalty_that_works_once_cut_and_repaired_is_cut(left, chosen, monkeypatch):
    networks = {0.0: network(0.5, 0.001, 90.0), 0.01: network(0.5, 0.001, 89.0), 0.02: GOOD}
    found = [SimpleNamespace(accuracy=accuracy) for accuracy in left.values()]
    monkeypatch.setattr(choosing, "evaluate", lambda *_: found.pop(0))
    choice = choose(networks)
    assert choice.l1_lambda == chosen and not found
    for l1_lambda, accuracy in left.items():
        assert f"cut and repaired it has {accuracy:.2f} %" in choice.verdicts[l1_lambda].reason


def test_without_another_that_works_the_network_without_a_penalty_is_cut():
    assert choose({0.0: GOOD, 0.2: network(0.001, 0.001, 40.0)}).l1_lambda == 0.0


def test_collapsed_is_what_only_swings_about_zero():
    # lr·λ/(1 − momentum) = 0.2: |γ| up to 0.5 says nothing but that λ is strong.
    swinging = [0.3, -0.1, 0.5, -0.02]
    verdict = judged({0.0: GOOD, 0.2: network(swinging, 0.1, 89.0)})[0.2]
    assert not verdict.works
    assert verdict.reason.startswith(
        "collapsed: |γ| ≥ 0.6 in 0.0 % of the channels; λ is too strong"
    )
    assert judged({0.0: GOOD, 0.2: network(swinging, 1e-5, 89.0)})[0.2].works  # settled there


def test_naming_the_largest_class_always_is_nothing_learned():
    most = dataclasses.replace(DATA, train_labels=torch.tensor([0] * 24 + [1, 2]))
    share = 100 * 24 / 26
    verdicts = judged({0.0: network(0.5, 0.001, share), 0.01: network(0.5, 0.001, 99.0)}, most)
    assert not verdicts[0.0].works and verdicts[0.01].works
    assert f"has learned nothing: {share:.2f} %" in verdicts[0.0].reason
    assert f"guessing has {share:.2f} %" in verdicts[0.0].reason


def test_a_network_that_learned_far_less_than_the_best_is_left_out():
    verdicts = judged({0.0: GOOD, 0.01: network(0.5, 0.001, 75.0), 0.02: network(0.5, 0.001, 85.0)})
    assert [v.works for v in verdicts.values()] == [True, False, True]
    assert "much less than the best: 75.00 %" in verdicts[0.01].reason


@pytest.mark.parametrize("gamma", [0.5, 0.001])
def test_without_a_penalty_it_is_not_the_penalty_that_is_blamed(gamma):
    (verdict,) = judged({0.0: network(gamma, 0.1, 20.0)}).values()
    assert not verdict.works and "learned nothing" in verdict.reason
    with pytest.raises(RunError) as caught:
        choose({0.0: network(gamma, 0.1, 20.0)})
    assert "λ = 0 has learned nothing" in str(caught.value)
    assert "strong" not in str(caught.value) and "collapsed" not in str(caught.value)


def test_a_lambda_by_hand_is_taken_and_the_verdict_on_it_stays():
    networks = {0.0: GOOD, 0.2: network(0.001, 0.001, 40.0)}
    by_hand = choose(networks, 0.2)
    assert by_hand.l1_lambda == 0.2 and "collapsed" in by_hand.verdicts[0.2].reason
    assert choose(networks, 0).l1_lambda == 0
    for wrong in (0.05, "0.2"):
        with pytest.raises(ValueError, match=rf"l1_lambda = {wrong!r}: trained are 0, 0\.2"):
            choose(networks, wrong)


@pytest.mark.parametrize("ratios", [None, [], [50, 90], [0.5, 1.0], [0.99]])
def test_ladder_ratios_that_leave_no_ladder_are_named(ratios):
    with pytest.raises(ValueError, match="ladder_ratios"):
        choosing.feasible(ratios, [4, 4], min_channels=1)


def test_a_ladder_ratio_that_the_floor_forbids_is_left_out_with_a_word(capsys):
    assert choosing.feasible([0.25, 0.6], [4, "M", 4], min_channels=2) == [0.25]
    assert "60% left out: min_channels = 2" in capsys.readouterr().out


@given(cfg=cfgs, floor=st.integers(1, 4), ratio=st.floats(0, 0.99))
def test_a_ladder_ratio_is_kept_exactly_where_the_plan_can_be_made(cfg, floor, ratio):
    try:
        plan_pruning(VGG(cfg), ratio, min_channels=floor)
    except ValueError:
        with pytest.raises(ValueError, match="leaves none"):
            choosing.feasible([ratio], cfg, floor)
    else:
        assert choosing.feasible([ratio], cfg, floor) == [ratio]
