"""The lab's first two steps, train and cut, and their files. Called again, a step just loads."""

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from models.vgg import VGG
from utils import choosing
from utils.engine import pick_device
from utils.images.data import ImageData
from utils.images.sources import load_data
from utils.profile import SETTINGS
from utils.pruning import PruningPlan, plan_pruning
from utils.repair import slim_repaired
from utils.run.identity import Run, RunError
from utils.sparsity import add_l1_subgradient
from utils.step import Penalty
from utils.store.checkpoint import Checkpoint, History, load, save
from utils.store.identity import differences, fingerprint, follows_from, weights_digest
from utils.training import fit

OnEpoch = Callable[[History], None] | None


class Trained(NamedTuple):
    """A network in evaluation mode, on the device of the data, and how it came about."""

    model: VGG
    history: History


def train(
    run: Run, data: ImageData, l1_lambda: float, *, penalty: Penalty = add_l1_subgradient,
    on_epoch: OnEpoch = None,
) -> Trained:  # fmt: skip
    """The dense network of `run`, trained with `l1_lambda`; every λ starts from the same weights.
    Raises what `fit` raises, and RunError for other images than the run's."""
    _require_images(run, data)
    profile, lambdas = run.profile, run.profile.l1_lambdas
    torch.manual_seed(profile.seed)
    model = VGG(profile.cfg, num_classes=len(data.classes)).to(data.train_images.device)
    of = f" ({lambdas.index(l1_lambda) + 1} of {len(lambdas)})" if l1_lambda in lambdas else ""
    history = fit(
        model, data, profile, l1_lambda=l1_lambda, penalty=penalty, on_epoch=on_epoch,
        checkpoint=run.trained_file(l1_lambda), label=f"λ = {l1_lambda:g}{of}",
    )  # fmt: skip
    return Trained(model.eval(), history)


def _require_images(run: Run, data: ImageData) -> None:
    if data.digest != run.data["digest"]:
        were, are = f"{run.data['name']} ({run.data['digest']})", f"{data.name} ({data.digest})"
        way_out = "put the former back, or begin another run"
        raise RunError(f"the run {run.name} was trained on {were}, now there are {are}: {way_out}")


def images_of(run: Run, device: str | None = None) -> ImageData:
    """The images of `run`, read once by each worker. Raises RunError if they are others now."""
    data = _loaded(run.profile.data, device)
    _require_images(run, data)
    return data


@functools.lru_cache(maxsize=1)
def _loaded(name: str, device: str | None) -> ImageData:
    return load_data(name).to(pick_device(device))


def _saved(
    run: Run, kind: str, files: Mapping[float, Path], facts: Callable[[float, Checkpoint], dict]
) -> dict[float, Checkpoint]:
    """The checkpoints in `files`; RunError names all missing, unfinished or not as `facts` says."""
    found, wrong = {}, []
    for key, file in files.items():
        if not file.exists():
            wrong.append(f"{file} is missing")
            continue
        saved = found[key] = load(file, kind=kind)
        if saved.optimizer:  # it is kept as long as there are epochs to come
            done = len(History(**saved.history))
            wrong.append(f"{file}: {done} of {run.profile.epochs} epochs are done")
        if differ := differences(saved.settings, facts(key, saved)):
            wrong.append(f"{file} was made with {', '.join(differ)}")
    if wrong:
        notebook = {"trained": "sparsity_train.ipynb", "slim": "vggprune.ipynb"}[kind]
        raise RunError(f"the run {run.name}: {'; '.join(wrong)}. Run {notebook} to the end")
    return found


def trained_networks(run: Run, data: ImageData) -> dict[float, Trained]:
    """The trained network of every λ; RunError names all missing, unfinished or another run's."""

    def facts(l1_lambda: float, saved: Checkpoint) -> dict:
        # Whose the penalty and the first weights are, only the training itself can tell.
        own = {k: v for k, v in saved.settings.items() if k in ("penalty", "starts_from")}
        own |= {"cfg": run.profile.cfg, "images": data.digest, "l1_lambda": l1_lambda}
        return follows_from(run.profile, (*SETTINGS, "precision"), **own)

    files = {k: run.trained_file(k) for k in sorted(run.profile.l1_lambdas)}
    return {
        k: Trained(saved.model().to(data.train_images.device), History(**saved.history))
        for k, saved in _saved(run, "trained", files, facts).items()
    }


def calibration(run: Run, data: ImageData) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """25 batches of 200 (images, labels), augmented as this run trains, to recalibrate BN on."""
    how = {name: getattr(run.profile, name) for name in ("seed", "crop_padding", "flip")}
    return list(itertools.islice(data.train_batches(200, epoch=0, **how), 25))


def plan_cut(
    run: Run, data: ImageData, network: VGG, ratio: float | None = None, **options
) -> PruningPlan:
    """`plan_pruning` as `run` cuts its networks; `options` go before the run's settings."""
    how = {"min_channels": run.profile.min_channels, "multiple_of": run.profile.multiple_of}
    return plan_pruning(network, ratio, **{"input_shape": data.input_shape, **how, **options})


def choose(
    run: Run, data: ImageData, networks: Mapping[float, Trained], ratio: float,
    l1_lambda: float | None = None,
) -> tuple[float, dict[float, choosing.Verdict]]:  # fmt: skip
    """The λ whose network to cut by `ratio`, and the verdict on each, of `choosing.choose`."""
    plans = {k: plan_cut(run, data, network.model, ratio) for k, network in networks.items()}
    return choosing.choose(
        networks, plans, data.train_labels, run.profile.momentum, l1_lambda=l1_lambda,
        calibration=calibration(run, data), judging=choosing.judging_batches(data),
    )  # fmt: skip


def _cut_facts(run: Run, data: ImageData, network: VGG, **cut: object) -> dict:
    """What a cut of `network` follows from; `cut` is λ and ratio, or the cfg."""
    how = ("min_channels", "multiple_of", "seed", "crop_padding", "flip")
    origin = {"images": data.digest, "cut_from": weights_digest(network)}
    return follows_from(run.profile, how, **origin, **cut)


def save_slim(
    run: Run, data: ImageData, network: VGG, l1_lambda: float, ratio: float, slimmed: VGG,
    results: dict,
) -> None:  # fmt: skip
    """Keep `slimmed`, cut from the `network` of `l1_lambda`, for train_prune_model.ipynb."""
    facts = _cut_facts(run, data, network, l1_lambda=l1_lambda, pruning_ratio=ratio)
    done = Checkpoint("slim", slimmed.cfg, slimmed.state_dict(), facts, results=results)
    save(run.slim_file(ratio), done)


def slim_networks(
    run: Run, data: ImageData, networks: Mapping[float, Trained]
) -> dict[float, Checkpoint]:
    """The slim network of every ratio; RunError names all missing or not cut from `networks`."""

    def facts(ratio: float, saved: Checkpoint) -> dict:
        k = saved.settings.get("l1_lambda")
        k = k if k in networks else min(networks)
        return _cut_facts(run, data, networks[k].model, l1_lambda=k, pruning_ratio=ratio)

    files = {ratio: run.slim_file(ratio) for ratio in run.profile.pruning_ratios}
    return _saved(run, "slim", files, facts)


def cut_on(run: Run, data: ImageData, network: VGG, plan: PruningPlan) -> VGG:
    """`network` cut by `plan` and repaired. Kept in a file, so that what is trained afterwards goes
    on from the very same bits, on another machine too."""
    facts = _cut_facts(run, data, network, cfg=plan.cfg)
    file = run.checkpoints / f"cut_{fingerprint(facts)}.safetensors"
    if not file.exists():
        slimmed = slim_repaired(network, plan, calibration(run, data))
        save(file, Checkpoint("cut", plan.cfg, slimmed.state_dict(), facts))
    return load(file, kind="cut").model().to(data.train_images.device)
