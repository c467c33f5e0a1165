"""One run, one identity: what it was trained with is written down once, and read ever after.

checkpoints/<run>/run.json holds every setting, the digest of the images, the precision and the
machine. `sparsity_train.ipynb` begins a run; the notebooks after it open it and decide only what is
theirs. What is missing or foreign raises a RunError before anything is drawn or saved.
"""

import dataclasses
import datetime
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from utils.engine import fast_precision
from utils.images.data import ImageData
from utils.profile import SETTINGS, Profile
from utils.run.machine import describe_machine
from utils.store.files import json_digest, write_json, write_whole

CUT = ("pruning_ratios", "min_channels")
FINETUNE = (
    "multipass_ratios", "finetune_epochs", "finetune_lr", "finetune_schedule", "distillation",
)  # fmt: skip
SHARED = [name for name in SETTINGS if f"finetune_{name}" not in FINETUNE]
SHOWN = {
    "training": ("depth", "width", "l1_lambdas", *SETTINGS, "precision"),
    "cut": ("l1_lambdas", "seed", "crop_padding", "flip", *CUT),  # BN is recalibrated augmented
    "finetune": (*SHARED, "precision", *FINETUNE),
}
"""The settings that each notebook uses."""
WITHOUT_EFFECT = ("name", "data", "cuda_graph", "test_batch_size")
"""Fields of a profile on which no weight depends (the images count by their digest)."""
LAST_RUN = "checkpoints/last_run.txt"


class RunError(Exception):
    """A run that is missing, unfinished or of other settings; says which, and what to do."""


@dataclass(frozen=True)
class Run:
    """What a run was trained with, and where its files lie."""

    profile: Profile
    """Every setting; the precision is decided, never "auto"."""
    data: dict
    """Name, digest, classes and sizes of the images."""
    machine: dict = field(default_factory=dict)
    began: str = ""
    trained_in: str = ""
    """The run whose trained networks this one cuts, if that is another."""

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def id(self) -> str:
        """16 hex digits that stand for all that the trained networks follow from."""
        settings = {k: v for k, v in self.settings.items() if k not in (*CUT, *FINETUNE)}
        return json_digest([settings, self.data["digest"]])

    @property
    def settings(self) -> dict:
        fields = dataclasses.asdict(self.profile)
        return {k: v for k, v in fields.items() if k not in WITHOUT_EFFECT}

    @property
    def checkpoints(self) -> Path:
        return Path("checkpoints") / self.name

    @property
    def figures(self) -> Path:
        return Path("figures") / self.name

    def trained_file(self, l1_lambda: float) -> Path:
        folder = Path("checkpoints") / (self.trained_in or self.name)
        return folder / f"trained_lambda_{l1_lambda:g}.pt"

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
    """The run that `profile` names: a new one is written down, one that is there goes on.

    Raises RunError, naming every difference, if one of this name was begun with other settings or
    images. (λ's may be added or left out: each has a file of its own. How it is cut and fine-tuned
    stays as it was: that is `open_run`'s.) `remember`: as the one that the notebooks open next;
    without it they know nothing of it, and it is cut and fine-tuned as `profile` says.
    """
    before = _read(profile.name) if _file(profile.name).exists() else None
    if profile.precision == "auto":  # decided once: on other hardware a run goes on as it began
        decided = before.profile.precision if before else fast_precision(device)
        profile = dataclasses.replace(profile, precision=decided)
    images = {
        "name": data.name,
        "digest": data.digest,
        "classes": list(data.classes),
        "train": len(data.train_labels),
        "test": len(data.test_labels),
    }
    now = datetime.datetime.now().isoformat(" ", timespec="seconds")
    run = Run(profile, images, describe_machine(device), now)
    if before:
        _require_same(run, before)
        free = {k: getattr(profile, k) for k in ("l1_lambdas", *WITHOUT_EFFECT)}
        run = _with(before, **free)
    if run != before:
        _write(run)
    if not remember:
        return dataclasses.replace(run, profile=profile)
    stays = {k: getattr(run.profile, k) for k in (*CUT, *FINETUNE)}
    if kept := [f"{k} = {v}" for k, v in stays.items() if v != getattr(profile, k)]:
        print(f"The run goes on with {', '.join(kept)}; notebooks 2 and 3 can change that")
    return _last(run)


def open_run(name: str | None = None, *, save_as: str | None = None, **decided) -> Run:
    """The run `name`, by default the one that was begun or opened last.

    `decided` are the settings that the calling notebook may choose; None leaves what the run has.
    They are kept with the run, for the notebooks that follow. `save_as` gives what follows to a run
    of its own, which cuts the same trained networks. Raises RunError if there is no such run.
    """
    name = name or last_run()
    run = before = _read(name)
    for name in decided.keys() - {*CUT, *FINETUNE}:
        raise RunError(f"{name}: was decided when the run was trained; begin another run for it")
    if save_as and save_as != run.name:
        if run.trained_in:  # what is cut anew begins with the settings of the training
            run = _read(run.trained_in)
        new = dataclasses.replace(_with(run, name=save_as), trained_in=run.name)
        before = _read(save_as) if _file(save_as).exists() else None
        run = _with(before or new, l1_lambdas=new.profile.l1_lambdas)
        if (run.trained_in, run.id) != (new.trained_in, new.id):
            raise RunError(f"save_as = {save_as!r}: a run of other networks is there; name another")
    run = _with(run, **{k: v for k, v in decided.items() if v is not None})
    if run != before:
        _write(run)
    return _last(run)


def last_run() -> str:
    """The name of the run that a notebook was last run for. Raises RunError if there is none."""
    note = Path(os.environ.get("LAB_LAST_RUN") or LAST_RUN)
    if not note.exists():
        raise RunError(f"no run yet ({note.resolve()} is missing): run sparsity_train.ipynb")
    return note.read_text("utf-8").strip()


def _with(run: Run, **changes) -> Run:
    return dataclasses.replace(run, profile=dataclasses.replace(run.profile, **changes))


def _write(run: Run) -> None:
    content = {"id": run.id, "name": run.name, "profile": dataclasses.asdict(run.profile)}
    content |= {k: getattr(run, k) for k in ("data", "machine", "began", "trained_in")}
    write_json(_file(run.name), content)


def _file(name: str) -> Path:
    return Path("checkpoints") / name / "run.json"


def _read(name: str) -> Run:
    file = _file(name)
    if not file.exists():
        known = sorted(p.parent.name for p in Path("checkpoints").glob("*/run.json"))
        there = f"there are {', '.join(known)}" if known else "there is none yet"
        raise RunError(f"run_name = {name!r}: no such run ({there}); run sparsity_train.ipynb")
    try:
        content = json.loads(file.read_text("utf-8"))
        rest = {k: content[k] for k in ("data", "machine", "began", "trained_in")}
        run = Run(Profile(**content["profile"]), **rest)
        if run.id != content["id"]:
            raise ValueError("its id does not fit its settings")
        if run.name != name:
            raise ValueError(f"it is of the run {run.name!r}, so the folder has to be called that")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{file.resolve()}: not readable ({error}). It says what the checkpoints beside it "
            "were trained with; move that folder away and begin the run anew"
        ) from None
    return run


def _last(run: Run) -> Run:
    """Remember `run` for the notebook that is opened next."""
    write_whole(os.environ.get("LAB_LAST_RUN") or LAST_RUN, f"{run.name}\n".encode())
    return run


def _require_same(wanted: Run, found: Run) -> None:
    free = ("l1_lambdas", *CUT, *FINETUNE)
    pairs = {k: (found.settings[k], v) for k, v in wanted.settings.items() if k not in free}
    if found.data["digest"] != wanted.data["digest"]:  # a folder may have been renamed
        pairs["images"] = tuple(f"{r.data['name']} ({r.data['digest']})" for r in (found, wanted))
    differ = [f"{k} = {a}, now {b}" for k, (a, b) in pairs.items() if a != b]
    if found.trained_in:
        differ.append(f"the networks of the run {found.trained_in}")
    if differ:
        raise RunError(
            f"{_file(wanted.name).resolve()}: the run {wanted.name!r} was begun with "
            f"{'; '.join(differ)}. Set that back to go on with it, or give the new run a run_name "
            "(make lab … RUN=name)"
        )
