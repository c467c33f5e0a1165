"""The last step of the lab: train a slim network again, at once or in passes."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from models.vgg import VGG, most_prunable, num_pruned, widths
from utils.images.data import ImageData
from utils.profile import Profile, typed_path
from utils.repair import RUNGS
from utils.run.identity import Run
from utils.run.lab import OnEpoch, Trained, cut_on, plan_cut, slim_networks
from utils.store.checkpoint import History, load
from utils.store.identity import fingerprint
from utils.training import fit, training_facts


class Start(NamedTuple):
    """A network to be fine-tuned, and how it came about; None where a file does not tell."""

    network: VGG
    l1_lambda: float | None = None
    epochs: int | None = None  # trained so far
    pruning_ratio: float | None = None
    raw_cut: float | None = None  # test accuracy in % right after the cut, before the repairs


def slim_starts(run: Run, data: ImageData, networks: Mapping[float, Trained]) -> dict[str, Start]:
    """The slim network of every ratio, "50% pruned", …; raises RunError as `slim_networks` does."""
    device, starts = data.train_images.device, {}
    for ratio, cut in slim_networks(run, data, networks).items():
        history = cut.settings["l1_lambda"], run.profile.epochs, ratio, cut.results[RUNGS[0]]
        starts[f"{100 * ratio:g}% pruned"] = Start(cut.model().to(device), *history)
    return starts


def train_again(
    run: Run, data: ImageData, network: VGG, profile: Profile, kind: str, **how
) -> Trained:
    """A copy of `network`, trained as `profile` and `how`, the options of `fit`, say. Its file is
    named by `kind` and by all that it follows from, so that another way loses nothing."""
    model = copy.deepcopy(network)
    follows = {"l1_lambda": how.get("l1_lambda", 0.0), "teacher": how.get("teacher")}
    facts = training_facts(model, data, profile, **follows)
    file = run.checkpoints / f"{kind}_{fingerprint(facts)}.safetensors"
    history = fit(model, data, profile, checkpoint=file, kind=kind, **how)
    return Trained(model.eval(), history)


def in_passes(
    run: Run, data: ImageData, network: VGG, l1_lambda: float, ratios: Sequence[float],
    on_epoch: Callable[[str, int], OnEpoch] = lambda label, epochs: None,
) -> Iterator[tuple[float, VGG, History | None]]:  # fmt: skip
    """Cut and repair `network` at each of `ratios`; train it with the penalty before each but the
    first (Liu et al. 2017, section 3). Yields ratio, slim network and that training's history.
    `ratios` are shares of the dense network's channels; where `min_channels` forbids the last, only
    a line is printed. `on_epoch` makes that of `fit` from a training's label and epochs."""
    history, cfg, floor = None, run.profile.cfg, run.profile.min_channels
    if ratios and num_pruned(cfg, ratios[-1]) > most_prunable(cfg, floor):
        print(f"no passes: min_channels = {floor} forbids {100 * ratios[-1]:g}%")
        return
    for k, ratio in enumerate(ratios):
        if k > 0:
            label, epochs = f"between the passes ({k} of {len(ratios) - 1})", run.profile.epochs
            how = {"label": label, "l1_lambda": l1_lambda, "on_epoch": on_epoch(label, epochs)}
            network, history = train_again(run, data, network, run.profile, "pass", **how)
        stay = sum(widths(cfg)) - num_pruned(cfg, ratio)
        of_those_left = 1 - stay / sum(widths(network.cfg))
        network = cut_on(run, data, network, plan_cut(run, data, network, of_those_left))
        yield ratio, network, history


def finetune(
    run: Run, data: ImageData, network: VGG, *, profile: Profile | None = None,
    teacher: VGG | None = None, label: str = "fine-tuning", on_epoch: OnEpoch = None,
) -> Trained:  # fmt: skip
    """A copy of `network`, trained without the penalty; `profile` defaults to the run's own way.
    Raises ValueError for distillation without a `teacher`, and what `fit` raises."""
    profile = profile or run.profile.for_finetuning()
    if profile.distillation and teacher is None:
        raise ValueError(f"distillation = {profile.distillation:g}: needs a teacher, a network")
    how = {"label": label, "teacher": teacher if profile.distillation else None}
    return train_again(run, data, network, profile, "finetuned", on_epoch=on_epoch, **how)


def from_scratch(network: VGG, seed: int) -> VGG:
    """Fresh weights in the shape of `network` (Liu et al., Rethinking …, ICLR 2019)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = VGG(network.cfg, num_classes=network.classifier.out_features)
    return fresh.to(next(network.parameters()).device)


def from_elsewhere(file: str, data: ImageData) -> Start:
    """The network in somebody else's file, such as `{'cfg', 'state_dict'}`. Raises CheckpointError
    if it holds none, ValueError for other classes or images too small for its max-pools."""
    file = typed_path(file)
    network, classes = load(file).model().to(data.train_images.device), len(data.classes)
    if (theirs := network.classifier.out_features) != classes:
        what = f"a network for {theirs} classes; the images have {classes}"
        raise ValueError(f"lab_file = {str(file)!r}: {what}")
    network(torch.zeros(1, *data.input_shape, device=data.train_images.device))
    return Start(network)
