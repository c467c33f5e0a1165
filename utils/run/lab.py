"""The steps of the lab, as notebooks, tests and sweeps call them: train, choose, cut, fine-tune.

Each is a call of the modules below plus the bookkeeping of a run: which file, which settings, what
is there already. Called again, a step that is done just loads.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from models.vgg import VGG, most_prunable, num_pruned, widths
from utils.images.data import ImageData
from utils.profile import Profile
from utils.pruning import PruningPlan, plan_pruning
from utils.repair import slim_repaired
from utils.run.identity import Run, RunError
from utils.sparsity import add_l1_subgradient
from utils.step import Penalty
from utils.store.checkpoint import Checkpoint, History, load, save
from utils.store.files import typed_path
from utils.store.resume import weights_digest
from utils.training import fit


class Trained(NamedTuple):
    """A network in evaluation mode, on the device of the data, and how it came about."""

    model: VGG
    history: History


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
        only = f"the run {run.name} only cuts what {run.trained_in} trained"
        raise RunError(f"{only}; train in that one")
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
            f"the run {run.name} was trained on {run.data['name']} ({run.data['digest']}), the "
            f"images in {run.profile.data} are {data.name} ({data.digest}): put the former back, "
            "or begin another run"
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


def train_again(run: Run, data: ImageData, network: VGG, l1_lambda: float, label: str) -> Trained:
    """`network`, between two passes, trained with the penalty again (Liu et al. 2017, sec. 3)."""
    file = run.checkpoints / f"pass_from_{weights_digest(network)}.pt"
    model = copy.deepcopy(network)
    history = fit(model, data, run.profile, l1_lambda=l1_lambda, checkpoint=file, label=label)
    return Trained(model.eval(), history)


def in_passes(
    run: Run, data: ImageData, network: VGG, l1_lambda: float, ratios: Sequence[float]
) -> Iterator[tuple[float, VGG, History | None]]:
    """`network` cut and repaired at each of `ratios`, shares of the channels of the run's dense
    network, and before each but the first trained with the penalty again (Liu et al. 2017, section
    3): ratio, slim network, and the history of that training. One ratio makes a single cut.

    Nothing but a printed line where `min_channels` forbids the last cut.
    """
    history, cfg, floor = None, run.profile.cfg, run.profile.min_channels
    if ratios and num_pruned(cfg, ratios[-1]) > most_prunable(cfg, floor):
        print(f"no passes: min_channels = {floor} forbids {100 * ratios[-1]:g}%")
        return
    for k, ratio in enumerate(ratios):
        if k > 0:
            label = f"between the passes ({k} of {len(ratios) - 1})"
            network, history = train_again(run, data, network, l1_lambda, label)
        stay = sum(widths(cfg)) - num_pruned(cfg, ratio)
        of_those_left = 1 - stay / sum(widths(network.cfg))
        plan = plan_pruning(network, of_those_left, min_channels=floor)
        network = cut_on(run, data, network, plan)
        yield ratio, network, history


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
