"""Which trained network to cut, and by how much it can be: decided on training images only."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from models.vgg import most_prunable, num_pruned
from utils.images.data import ImageData
from utils.profile import is_ratio
from utils.pruning import PruningPlan
from utils.repair import slim_repaired
from utils.sparsity import is_collapsed, off_below, scaling_factors, swing
from utils.training import evaluate

WORKS = 0.5
"""A network works if it has this share of the best trained one's gain over guessing: what works
has nearly all of it, what does not hardly any, so that no rounding decides."""

Networks = Mapping[float, Any]  # λ → (model, history) of a training
Plans = Mapping[float, PruningPlan]


class Verdict(NamedTuple):
    """Whether a trained network is worth cutting, and why."""

    works: bool
    reason: str


def judge(
    networks: Networks, plans: Plans, labels: Tensor, momentum: float
) -> dict[float, Verdict]:
    """For each λ: has its network learned, and how much of Σ|γ| would its plan take?

    All were trained with `momentum`, on images of `labels`. Collapsed is a network whose γ are all
    as near zero as they swing when λ pulls at them."""
    (guessing, needed), verdicts = _bounds(networks, labels), {}
    for l1_lambda, (model, history) in networks.items():
        gammas, accuracy = scaling_factors(model).cpu(), history.train_accuracy[-1]
        swung = swing(history.lr[-1], l1_lambda, momentum)
        has = f"{accuracy:.2f} % on the training images"
        holds = f"the channels to go hold {plans[l1_lambda].mass_cut:.2%} of Σ|γ|"
        fault = ""
        if l1_lambda > 0 and is_collapsed(gammas, swung):
            on = off_below(swung)
            alive = (gammas >= on).float().mean()
            fault = f"collapsed: |γ| ≥ {on:g} in {alive:.1%} of the channels; λ is too strong"
        elif accuracy <= guessing:
            fault = f"has learned nothing: {has}, guessing has {guessing:.2f} %"
        elif accuracy < needed:
            fault = f"has learned much less than the best: {has} ({needed:.2f} needed)"
        verdicts[l1_lambda] = Verdict(not fault, fault or holds)
    return verdicts


def choose(
    networks: Networks, plans: Plans, labels: Tensor, momentum: float,
    *, calibration: list, judging: list, l1_lambda: float | None = None,
) -> tuple[float, dict[float, Verdict]]:  # fmt: skip
    """The λ whose network is to be cut by its plan, and the verdict on each.

    It is the weakest whose network still works when it is cut and repaired (BN on `calibration`,
    accuracy on `judging`: training images); if none does, the one whose plan takes least of Σ|γ|;
    λ = 0 only where no other has learned. `l1_lambda` chooses by hand. Raises ValueError if that
    was not trained, or no network is worth cutting."""
    verdicts = judge(networks, plans, labels, momentum)
    if l1_lambda in verdicts:
        return l1_lambda, verdicts
    if l1_lambda is not None:
        raise ValueError(f"l1_lambda = {l1_lambda!r}: trained are {', '.join(map(str, verdicts))}")
    working = [k for k, verdict in verdicts.items() if verdict.works]
    working = [k for k in working if k > 0] or working
    if not working:
        why = "; ".join(f"λ = {k:g} {verdict.reason}" for k, verdict in verdicts.items())
        raise ValueError(f"no network is worth cutting: {why}")
    (_, needed), survive = _bounds(networks, labels), []
    for k in working:
        repaired = slim_repaired(networks[k].model, plans[k], calibration)
        if (left := evaluate(repaired, judging).accuracy) >= needed:
            survive.append(k)
        has = f"cut and repaired it has {left:.2f} % on training images ({needed:.2f} needed)"
        verdicts[k] = verdicts[k]._replace(reason=f"{verdicts[k].reason}; {has}")
    return min(survive or working, key=lambda k: k if survive else plans[k].mass_cut), verdicts


def judging_batches(data: ImageData) -> list[tuple[Tensor, Tensor]]:
    """A tenth of the training images, on which cuts are compared: test images choose nothing."""
    return [*data.hold_out(max(1, len(data.train_labels) // 10)).plain_batches("test", 1000)]


def _bounds(networks: Networks, labels: Tensor) -> tuple[float, float]:
    """Accuracy in %: of always naming the most frequent class, and from which a network works."""
    guessing = 100 * labels.bincount().max().item() / len(labels)
    best = max(network.history.train_accuracy[-1] for network in networks.values())
    return guessing, guessing + WORKS * (best - guessing)


def feasible(ratios: Iterable[float], cfg: list[int | str], min_channels: int) -> list[float]:
    """Those of `ratios` by which a network of `cfg` can be cut; a printed line for each other.
    Raises ValueError, naming `ladder_ratios`, for what is no list of ratios or leaves none."""
    most = most_prunable(cfg, min_channels)
    try:
        fits = {r: num_pruned(cfg, is_ratio(r)) <= most for r in map(float, ratios)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"ladder_ratios = {ratios!r}: {error}") from None
    for ratio in (r for r, fit in fits.items() if not fit):
        print(f"{100 * ratio:g}% left out: min_channels = {min_channels} keeps more")
    if not any(fits.values()):
        raise ValueError(f"ladder_ratios = {ratios!r}: min_channels = {min_channels} leaves none")
    return [r for r, fit in fits.items() if fit]
