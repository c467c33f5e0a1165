"""The steps of the lab, as notebooks, tests and sweeps call them: train, choose, cut, fine-tune.

Each is a call of the modules below plus the bookkeeping of a run: which file, which settings, what
is there already. Called again, a step that is done just loads.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from models.vgg import VGG, most_prunable
from utils.checkpoint import Checkpoint, load, save
from utils.compensation import slim_repaired
from utils.config import Profile, is_ratio
from utils.data import ImageData
from utils.files import typed_path
from utils.pruning import PruningPlan, plan_pruning
from utils.resume import History, weights_digest
from utils.runs import Run, RunError
from utils.sparsity import add_l1_subgradient, is_collapsed, reach, scaling_factors, swing
from utils.step import Penalty
from utils.training import evaluate, fit

LEARNED = 0.8
"""A network is worth going on with if it has this share of the best one's gain over guessing."""


class Trained(NamedTuple):
    """A network in evaluation mode, on the device of the data, and how it came about."""

    model: VGG
    history: History


class Verdict(NamedTuple):
    """Whether a trained network is worth cutting, and why."""

    works: bool
    mass_cut: float
    """Share of Σ|γ| that would go."""
    reason: str


class Choice(NamedTuple):
    """Which network to cut by a ratio, and what speaks for and against each."""

    l1_lambda: float
    verdicts: dict[float, Verdict]


def train(
    run: Run,
    data: ImageData,
    l1_lambda: float,
    *,
    penalty: Penalty = add_l1_subgradient,
    on_epoch: Callable[[History], None] | None = None,
) -> Trained:
    """The dense network of `run`, trained with `l1_lambda`; every λ starts from the same weights.

    Raises what `fit` raises, and RunError for a run that only cuts another's networks.
    """
    if run.trained_in:
        raise RunError(f"the run {run.name} only cuts what {run.trained_in} trained")
    profile = run.profile
    torch.manual_seed(profile.seed)
    model = VGG(profile.cfg, num_classes=len(data.classes)).to(data.train_images.device)
    lambdas = list(profile.l1_lambdas)
    of = f" ({lambdas.index(l1_lambda) + 1} of {len(lambdas)})" if l1_lambda in lambdas else ""
    history = fit(
        model, data, profile, l1_lambda=l1_lambda, penalty=penalty, on_epoch=on_epoch,
        checkpoint=run.trained_file(l1_lambda), label=f"λ = {l1_lambda:g}{of}",
    )  # fmt: skip
    return Trained(model.eval(), history)


def trained_networks(run: Run, data: ImageData) -> dict[float, Trained]:
    """The trained network of every λ of `run`, as sparsity_train.ipynb left them.

    Raises RunError that names everything missing, unfinished or made with other images.
    """
    if data.digest != run.data["digest"]:
        raise RunError(
            f"the run {run.name} was trained on {run.data['name']} ({run.data['digest']}), these "
            f"images are {data.name} ({data.digest}): set LAB_DATA back, or open another run"
        )
    found, wrong = {}, []
    fixed = run.settings | {"images": data.digest, "cfg": run.profile.cfg}
    for l1_lambda in sorted(run.profile.l1_lambdas):
        file = run.trained_file(l1_lambda)
        if not file.exists():
            wrong.append(f"λ = {l1_lambda:g} was not trained ({file} is missing)")
            continue
        saved = load(file, kind="trained")
        history, epochs = History(**saved.history), run.profile.epochs
        if len(history) < epochs:
            wrong.append(f"λ = {l1_lambda:g}: {len(history)} of {epochs} epochs are done")
        wanted = fixed | {"l1_lambda": l1_lambda}
        differ = [
            f"{k} = {saved.settings[k]!r}, the run has {v!r}"
            for k, v in wanted.items()
            if k in saved.settings and saved.settings[k] != v
        ]
        wrong += [f"λ = {l1_lambda:g} was made with {d}" for d in differ]
        found[l1_lambda] = Trained(saved.model().to(data.train_images.device), history)
    if wrong:
        raise RunError(
            f"the run {run.name}: {'; '.join(wrong)}. Run sparsity_train.ipynb to the end"
        )
    return found


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
        verdicts[l1_lambda] = Verdict(works, plan.mass_cut, reason)
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
        model, verdict = networks[k].model, verdicts[k]
        plan = plan_pruning(model, ratio, min_channels=run.profile.min_channels)
        left = evaluate(slim_repaired(model, plan, batches), judges).accuracy
        survive += [k] if left >= needed else []
        said = f"{verdict.reason}; cut and repaired it has {left:.2f} % ({needed:.2f} needed)"
        verdicts[k] = verdict._replace(reason=said)
    chosen = min(survive) if survive else min(working, key=lambda k: verdicts[k].mass_cut)
    return Choice(chosen, verdicts)


def judging_batches(data: ImageData) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """A tenth of the training images, on which cuts are compared: test images choose nothing."""
    return data.hold_out(len(data.train_labels) // 10).plain_batches("test", 1000)


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
    total, most = sum(v for v in cfg if v != "M"), most_prunable(cfg, min_channels)
    for ratio in [ratio for ratio in ratios if round(total * ratio) > most]:
        print(f"{100 * ratio:g}% left out: min_channels = {min_channels} keeps more channels")
    kept = [ratio for ratio in ratios if round(total * ratio) <= most]
    if not kept:
        raise ValueError(f"ladder_ratios = {ratios}: min_channels = {min_channels} leaves none")
    return kept


def calibration(run: Run, data: ImageData) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches on which BN is recalibrated: the first 25 of 200 (images, labels) of an epoch,
    augmented as this run trains."""
    how = run.profile
    batches = data.train_batches(
        200, seed=how.seed, epoch=0, crop_padding=how.crop_padding, flip=how.flip
    )
    return list(itertools.islice(batches, 25))


def save_slim(
    run: Run, data: ImageData, l1_lambda: float, model: VGG, plan: PruningPlan, slimmed: VGG,
    results: dict,
) -> dict:  # fmt: skip
    """Keep `slimmed`, cut from `model` by `plan`, for train_prune_model.ipynb; its settings."""
    settings = {
        "images": data.digest,
        "l1_lambda": l1_lambda,
        "cut from": weights_digest(model),
        "pruning_ratio": plan.pruning_ratio,
        "realised_ratio": plan.realised_ratio,
        "min_channels": run.profile.min_channels,
    }
    done = Checkpoint("slim", slimmed.cfg, slimmed.state_dict(), settings, results=results)
    save(_slim_file(run, plan.pruning_ratio), done)
    return settings


def slim_networks(
    run: Run, data: ImageData, networks: Mapping[float, Trained]
) -> dict[float, Checkpoint]:
    """The slim network of every ratio of `run`, as vggprune.ipynb left them.

    Raises RunError that names everything missing, or cut from other networks than `networks`.
    """
    found, wrong = {}, []
    for ratio in run.profile.pruning_ratios:
        file = _slim_file(run, ratio)
        if not file.exists():
            wrong.append(f"{100 * ratio:g} % were not cut ({file} is missing)")
            continue
        slimmed = found[ratio] = load(file, kind="slim")
        said = slimmed.settings.get
        if said("images") != data.digest:
            wrong.append(f"{file} was cut with other images")
        source = networks.get(said("l1_lambda"))
        if source is None or weights_digest(source.model) != said("cut from"):
            wrong.append(f"{file} was cut from another network than the run has now")
        for name, value in (("pruning_ratio", ratio), ("min_channels", run.profile.min_channels)):
            if said(name) != value:
                wrong.append(f"{file} was cut with {name} = {said(name)}, the run has {value}")
    if wrong:
        raise RunError(f"the run {run.name}: {'; '.join(wrong)}. Run vggprune.ipynb")
    return found


def _slim_file(run: Run, ratio: float) -> Path:
    return run.checkpoints / f"slim_{ratio:g}.pt"


def cut_on(run: Run, data: ImageData, network: VGG, plan: PruningPlan) -> VGG:
    """`network` cut by `plan` and repaired. Kept in a file, so that what is trained afterwards goes
    on from the very same bits, on another machine too."""
    source = weights_digest(network)
    file = run.checkpoints / f"cut_{plan.kept}_of_{source}.pt"
    saved = load(file, kind="slim") if file.exists() else None
    if saved is None or saved.cfg != plan.cfg:
        slimmed = slim_repaired(network, plan, calibration(run, data))
        save(file, Checkpoint("slim", plan.cfg, slimmed.state_dict(), {"images": data.digest}))
        saved = load(file, kind="slim")
    return saved.model().to(data.train_images.device)


def cut_to(run: Run, data: ImageData, network: VGG, pruning_ratio: float) -> VGG:
    """`network`, which may have been cut before, cut until that share of the channels of the run's
    dense network is gone, and repaired: a pass of many, or the only one."""
    total, left = (sum(v for v in cfg if v != "M") for cfg in (run.profile.cfg, network.cfg))
    of_those_left = 1 - (total - round(total * pruning_ratio)) / left
    plan = plan_pruning(network, of_those_left, min_channels=run.profile.min_channels)
    return cut_on(run, data, network, plan)


def train_again(run: Run, data: ImageData, network: VGG, l1_lambda: float, label: str) -> Trained:
    """`network`, between two passes, trained with the penalty again (Liu et al. 2017, sec. 3)."""
    file = run.checkpoints / f"pass_from_{weights_digest(network)}.pt"
    model = copy.deepcopy(network)
    history = fit(model, data, run.profile, l1_lambda=l1_lambda, checkpoint=file, label=label)
    return Trained(model.eval(), history)


def finetune(
    run: Run,
    data: ImageData,
    network: VGG,
    *,
    profile: Profile | None = None,
    teacher: VGG | None = None,
    label: str = "",
    on_epoch: Callable[[History], None] | None = None,
    quiet: bool = False,
) -> Trained:
    """A copy of `network`, trained without the penalty; `profile` defaults to the run's own way.

    Each way and each start has a file of its own: trying another loses nothing. Raises ValueError
    for distillation without a `teacher`, and what `fit` raises.
    """
    how = profile or run.profile.for_finetuning()
    way = f"{how.schedule}_{how.lr:g}_{how.epochs}_{how.distillation:g}_{how.seed}"
    file = run.checkpoints / f"finetuned_{way}_from_{weights_digest(network)}.pt"
    model = copy.deepcopy(network)
    if not how.distillation:
        teacher = None
    elif teacher is None:
        raise ValueError(f"distillation = {how.distillation:g}: needs a teacher, the dense network")
    history = fit(
        model, data, how, checkpoint=file, kind="finetuned", teacher=teacher, label=label,
        on_epoch=on_epoch, quiet=quiet,
    )  # fmt: skip
    return Trained(model.eval(), history)


def from_scratch(network: VGG, seed: int) -> VGG:
    """Fresh weights in the shape of `network` (Liu et al., Rethinking …, ICLR 2019)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = VGG(network.cfg, num_classes=network.classifier.out_features)
    return fresh.to(next(network.parameters()).device)


def from_elsewhere(file: str, data: ImageData) -> VGG:
    """The network in a file of somebody else, such as `{'cfg', 'state_dict'}`, to be fine-tuned.

    Raises CheckpointError for a file that holds no such network, ValueError for other classes.
    """
    file = typed_path(file)
    found = load(file)
    if found.num_classes != len(data.classes):
        raise ValueError(
            f"lab_file = {str(file)!r}: a network for {found.num_classes} classes; the images have "
            f"{len(data.classes)}"
        )
    return found.model().to(data.train_images.device)
