"""Which trained network to cut, and by how much it can be: decided on training images only."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from models.vgg import most_prunable, num_pruned
from utils.images.data import ImageData
from utils.profile import is_ratio
from utils.pruning import PruningPlan, plan_pruning
from utils.repair import slim_repaired
from utils.run.identity import Run, RunError
from utils.run.lab import Trained, calibration
from utils.sparsity import is_collapsed, reach, scaling_factors, swing
from utils.training import evaluate

LEARNED = 0.8
"""A network is worth going on with if it has this share of the best one's gain over guessing."""


class Verdict(NamedTuple):
    """Whether a trained network is worth cutting, and why."""

    works: bool
    plan: PruningPlan
    reason: str


class Choice(NamedTuple):
    """Which network to cut by a ratio, and what speaks for and against each."""

    l1_lambda: float
    verdicts: dict[float, Verdict]


def judge(
    run: Run, data: ImageData, networks: Mapping[float, Trained], ratio: float
) -> dict[float, Verdict]:
    """For each λ: has the network learned, and how much of Σ|γ| would a cut by `ratio` take?

    Collapsed is a network whose γ are all near zero, as near as they swing when λ pulls at them.
    One that is no better than always naming the most frequent class has learned nothing.
    """
    guessing, needed = _guessing(data), _needed(data, networks)
    verdicts = {}
    for l1_lambda, (model, history) in networks.items():
        plan = plan_pruning(model, ratio, min_channels=run.profile.min_channels)
        gammas, works = scaling_factors(model), False
        accuracy, said = history.train_accuracy[-1], "on the training images"
        swung = swing(history.lr[-1], l1_lambda, run.profile.momentum)
        if l1_lambda > 0 and is_collapsed(gammas, swung):
            on = reach(swung)
            alive = 100 * (gammas >= on).double().mean()
            reason = f"collapsed: |γ| ≥ {on:g} in {alive:.1f} % of the channels; λ is too strong"
        elif accuracy <= guessing:
            reason = f"has learned nothing: {accuracy:.2f} % {said}, guessing has {guessing:.2f} %"
        elif accuracy < needed:
            reason = f"has learned much less than the best: {accuracy:.2f} % {said}"
        else:
            works, reason = True, f"the channels to go hold {plan.mass_cut:.2%} of Σ|γ|"
        verdicts[l1_lambda] = Verdict(works, plan, reason)
    return verdicts


def choose(
    run: Run,
    data: ImageData,
    networks: Mapping[float, Trained],
    ratio: float,
    l1_lambda: float | None = None,
) -> Choice:
    """The network to cut by `ratio`: that of the weakest penalty which still works when it is cut
    and repaired, for a stronger one costs accuracy; if none does, the one that loses least of
    Σ|γ|. λ = 0, which the others are compared with, only where nothing else works. `l1_lambda`
    chooses by hand.

    "Works" is judged on training images. Raises RunError if no network is worth cutting,
    ValueError for an `l1_lambda` that was not trained.
    """
    verdicts = judge(run, data, networks, ratio)
    if l1_lambda is not None:
        if l1_lambda not in verdicts:
            trained = ", ".join(f"{k:g}" for k in verdicts)
            raise ValueError(f"l1_lambda = {l1_lambda!r}: trained are {trained}")
        return Choice(l1_lambda, verdicts)
    working = [k for k, verdict in verdicts.items() if verdict.works]
    working = [k for k in working if k > 0] or working
    if not working:
        why = "; ".join(f"λ = {k:g} {verdict.reason}" for k, verdict in verdicts.items())
        raise RunError(f"no network is worth cutting: {why}")
    needed, survive = _needed(data, networks), []
    batches, judges = calibration(run, data), list(judging_batches(data))
    for k in working:
        verdict = verdicts[k]
        repaired = slim_repaired(networks[k].model, verdict.plan, batches)
        left = evaluate(repaired, judges).accuracy
        survive += [k] if left >= needed else []
        has = f"cut and repaired it has {left:.2f} % on training images ({needed:.2f} needed)"
        verdicts[k] = verdict._replace(reason=f"{verdict.reason}; {has}")
    chosen = min(survive) if survive else min(working, key=lambda k: verdicts[k].plan.mass_cut)
    return Choice(chosen, verdicts)


def judging_batches(data: ImageData) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """A tenth of the training images, on which cuts are compared: test images choose nothing."""
    return data.hold_out(max(1, len(data.train_labels) // 10)).plain_batches("test", 1000)


def _guessing(data: ImageData) -> float:
    """Accuracy in % of always naming the most frequent class."""
    return 100 * data.train_labels.bincount().max().item() / len(data.train_labels)


def _needed(data: ImageData, networks: Mapping[float, Trained]) -> float:
    """Accuracy in % on training images, above which a network is worth going on with."""
    guessing = _guessing(data)
    best = max(network.history.train_accuracy[-1] for network in networks.values())
    return guessing + LEARNED * (best - guessing)


def feasible(ratios: Iterable[float], cfg: list[int | str], min_channels: int) -> list[float]:
    """Those of `ratios` by which a network of `cfg` can be cut; a printed line for each other.

    Raises ValueError, naming `ladder_ratios`, for what is no list of ratios or leaves none.
    """
    try:
        ratios = [is_ratio(float(ratio)) for ratio in ratios]
    except (TypeError, ValueError) as error:
        raise ValueError(f"ladder_ratios = {ratios!r}: {error}") from None
    most = most_prunable(cfg, min_channels)
    kept = [ratio for ratio in ratios if num_pruned(cfg, ratio) <= most]
    for ratio in [ratio for ratio in ratios if ratio not in kept]:
        print(f"{100 * ratio:g}% left out: min_channels = {min_channels} keeps more channels")
    if not kept:
        why = f"min_channels = {min_channels} leaves none" if ratios else "name one at least"
        raise ValueError(f"ladder_ratios = {ratios}: {why}")
    return kept
