"""One run, one identity: `sparsity_train.ipynb` writes what it was trained with to
checkpoints/<run>/run.json; the notebooks after it open it and decide only what is theirs."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch

from utils.engine import fast_precision
from utils.images.data import ImageData
from utils.profile import FIELDS, SETTINGS, Profile
from utils.run.machine import describe_machine
from utils.store.files import write_json, write_whole
from utils.store.identity import differences, fingerprint, follows_from

CUT = ("pruning_ratios", "min_channels", "multiple_of")
FINETUNE = (
    "multipass_ratios", "finetune_epochs", "finetune_lr", "finetune_schedule",
    "finetune_weight_decay", "distillation",
)  # fmt: skip
SHOWN = {  # the settings that each notebook uses
    "training": ("depth", "width", "l1_lambdas", *SETTINGS, "precision"),
    "cut": ("l1_lambdas", "seed", "crop_padding", "flip", *CUT),  # BN is recalibrated augmented
    "finetune": [n for n in (*SETTINGS, "precision", *FINETUNE) if f"finetune_{n}" not in FINETUNE],
}
WITHOUT_EFFECT = ("name", "data", "cuda_graph", "test_batch_size")  # on any weight
TRAINED_WITH = [name for name in FIELDS if name not in (*CUT, *FINETUNE, *WITHOUT_EFFECT)]
KEPT = ("data", "machine", "began", "trained_in")  # in run.json, beside the profile
LAST_RUN = "checkpoints/last_run.txt"


class RunError(Exception):
    """A run that is missing, unfinished or of other settings; says which, and what to do."""


@dataclass(frozen=True)
class Run:
    """What a run was trained with, and where its files lie."""

    profile: Profile  # every setting; the precision is decided, never "auto"
    data: dict  # name, digest, classes and sizes of the images
    machine: dict = field(default_factory=dict)
    began: str = ""
    trained_in: str = ""  # the run whose trained networks this one cuts, if that is another

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def facts(self) -> dict:
        """All that the trained networks follow from."""
        return follows_from(self.profile, TRAINED_WITH, images=self.data["digest"])

    @property
    def id(self) -> str:
        return fingerprint(self.facts)

    @property
    def checkpoints(self) -> Path:
        return Path("checkpoints") / self.name

    @property
    def figures(self) -> Path:
        return Path("figures") / self.name

    def trained_file(self, l1_lambda: float) -> Path:
        folder = Path("checkpoints") / (self.trained_in or self.name)
        return folder / f"trained_lambda_{l1_lambda:g}.safetensors"

    def slim_file(self, ratio: float) -> Path:
        return self.checkpoints / f"slim_{ratio:g}.safetensors"

    def __str__(self) -> str:
        images, profile = self.data, self.profile
        cuts = f"\nIt cuts the networks of the run {self.trained_in}" if self.trained_in else ""
        return (
            f"Run {self.name} · id {self.id}\n{images['name']}, {images['train']:,} training and "
            f"{images['test']:,} test images · VGG-{profile.depth} at width {profile.width:g} · "
            f"{profile.precision} on {self.machine.get('device')} · begun {self.began}{cuts}"
        )

    def table(self, part: str) -> pd.DataFrame:
        """The settings that a notebook uses: `part` is "training", "cut" or "finetune"."""
        values = {name: getattr(self.profile, name) for name in SHOWN[part]}
        return pd.Series(values, name="value").to_frame()


def begin(
    profile: Profile, data: ImageData, device: torch.device | str, *, remember: bool = True
) -> Run:
    """The run that `profile` names, begun or gone on with. Raises RunError, naming each difference,
    if it was begun with other settings or images (but for λ's). `remember`: as the one to open
    next; then it stays cut and fine-tuned as it was, else as `profile` says."""
    before = _find(profile.name)
    if profile.precision == "auto":  # decided once: on other hardware a run goes on as it began
        decided = before.profile.precision if before else fast_precision(device)
        profile = replace(profile, precision=decided)
    images = {"name": data.name, "digest": data.digest, "classes": list(data.classes)}
    images |= {"train": len(data.train_labels), "test": len(data.test_labels)}
    now = datetime.now().isoformat(" ", timespec="seconds")
    run = Run(profile, images, describe_machine(device), now)
    if before:
        differ = differences(before.facts, _with(run, l1_lambdas=before.profile.l1_lambdas).facts)
        if before.trained_in:
            differ.append(f"the networks of the run {before.trained_in}")
        if differ:
            way_out = "Set that back, or give the new run a run_name (make lab … RUN=name)"
            was = f"the run {before.name!r} was begun with {'; '.join(differ)}"
            raise RunError(f"{before.checkpoints.resolve()}/run.json: {was}. {way_out}")
        run = _with(before, **{k: getattr(profile, k) for k in ("l1_lambdas", *WITHOUT_EFFECT)})
    _keep(run, before, remember)
    return run if remember else replace(run, profile=profile)


def open_run(
    name: str | None = None, *, save_as: str | None = None, remember: bool = True, **decided
) -> Run:
    """The run `name`, by default the last one begun or opened. `decided`: settings that the caller
    may choose, kept for those that follow; None leaves them. `save_as`: a run of its own, which
    cuts the same networks. `remember`: as for `begin`. Raises RunError if there is no such run."""
    run = before = _read(name or last_run())
    for name in decided.keys() - {*CUT, *FINETUNE}:
        raise RunError(f"{name}: was decided when the run was trained; begin another run for it")
    if save_as and save_as != run.name:
        if run.trained_in:  # what is cut anew begins with the settings of the training
            run = _read(run.trained_in)
        new = replace(_with(run, name=save_as), trained_in=run.name)
        before = _find(save_as)
        run = _with(before or new, l1_lambdas=new.profile.l1_lambdas)
        if (run.trained_in, run.id) != (new.trained_in, new.id):
            raise RunError(f"save_as = {save_as!r}: a run of other networks is there; name another")
    run = _with(run, **{k: v for k, v in decided.items() if v is not None})
    _keep(run, before, remember)
    return run


def last_run() -> str:
    """The name of the run that a notebook was last run for. Raises RunError if there is none."""
    note = Path(os.environ.get("LAB_LAST_RUN") or LAST_RUN)
    if not note.exists():
        raise RunError(f"no run yet ({note.resolve()} is missing): run sparsity_train.ipynb")
    return note.read_text("utf-8").strip()


def _keep(run: Run, before: Run | None, remember: bool) -> None:
    """Write `run` down, unless it is as `before`; remember it for the notebook opened next."""
    if run != before:
        content = {"id": run.id, "name": run.name, "profile": asdict(run.profile)}
        write_json(run.checkpoints / "run.json", content | {k: getattr(run, k) for k in KEPT})
    if remember:
        write_whole(os.environ.get("LAB_LAST_RUN") or LAST_RUN, f"{run.name}\n".encode())


def _with(run: Run, **changes) -> Run:
    return replace(run, profile=replace(run.profile, **changes))


def _read(name: str) -> Run:
    if run := _find(name):
        return run
    known = sorted(p.parent.name for p in Path("checkpoints").glob("*/run.json"))
    there = f"there are {', '.join(known)}" if known else "there is none yet"
    raise RunError(f"run_name = {name!r}: no such run ({there}); run sparsity_train.ipynb")


def _find(name: str) -> Run | None:
    file = Path("checkpoints") / name / "run.json"
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
        run = Run(Profile(**content["profile"]), **{k: content[k] for k in KEPT})
        if (run.name, run.id) != (name, content["id"]):
            raise ValueError(f"it is of the run {run.name!r}, or its id does not fit its settings")
        return run
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        way_out = "move that folder away and begin the run anew"
        raise RunError(f"{file.resolve()}: not readable ({error}); {way_out}") from None
