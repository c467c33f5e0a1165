"""Profile: every hyperparameter of a run, named and validated before any work starts."""

import dataclasses
import difflib
import os
import re
import unicodedata
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from models.vgg import VGG_CFGS, most_prunable, num_pruned, scale_cfg, widths
from utils.store.files import typed_path


def _names_a_folder(name: str) -> str:
    if not re.fullmatch(r"\w[\w-]{0,99}", name):
        raise ValueError("must be letters, digits, - and _ (it names folders), 100 at most")
    return name


def is_ratio(ratio: float) -> float:
    """`ratio`, or a ValueError if it is none."""
    if not 0 <= ratio < 1:
        hint = f"; did you mean {ratio / 100:g}?" if 1 < ratio < 100 else ""
        raise ValueError(f"must be at least 0 and below 1{hint}")
    return ratio


def _name_files(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if len({float(f"{number:g}") for number in numbers}) < len(numbers):
        raise ValueError("must be all different in their first 6 digits (they name files)")
    return numbers


def _are_passes(ratios: tuple[float, ...]) -> tuple[float, ...]:
    if len(ratios) == 1 or list(ratios) != sorted(ratios):
        raise ValueError("must be two ratios or more in ascending order, or none")
    return ratios


Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Lambdas = Annotated[tuple[NotNegative, ...], Field(min_length=1), AfterValidator(_name_files)]
Ratio = Annotated[float, AfterValidator(is_ratio)]
Ratios = Annotated[tuple[Ratio, ...], AfterValidator(_name_files)]
Schedule = Literal["step", "cosine"]


def _plain(value: object) -> object:
    """Numbers and lists of numpy or torch as Python's own, which every file can hold."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _unknown(what: str, value: object, known) -> str:
    close = difflib.get_close_matches(str(value).lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{what} = {value!r}: must be one of {', '.join(known)}{hint}"


def _explain(error: dict, settings: dict) -> str:
    """pydantic's error about one field in a line: "lr = '0.1': must be a valid number"."""
    field, *entry = error["loc"]
    if error["type"] == "unexpected_keyword_argument":
        return _unknown("field", field, FIELDS)
    rule = error["msg"].removeprefix("Value error, ").replace("valid tuple", "list of numbers")
    rule = re.sub(r"^\w+ should", "must", rule)
    wrong_entry = f"{error['input']!r} " if entry else ""
    value = settings[field] if field in settings else getattr(Profile, field)
    return f"{field} = {value!r}: {wrong_entry}{rule}"


def _explained(profile: type) -> type:
    """Let `profile(...)` raise a ValueError that has one line for each wrong value."""
    init = profile.__init__

    def __init__(self, **settings) -> None:
        try:
            init(self, **settings)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(e, settings) for e in error.errors())) from None

    profile.__init__ = __init__
    return profile


@_explained
@dataclass(
    frozen=True,
    config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_default=True),
)
class Profile:
    """One set of hyperparameters. Wrong values raise a ValueError that names field and value.

    The defaults are the lab's own: SGD, lr 0.1, batch 100, 20 epochs, lr ÷ 10 at 50 % and 75 %.
    """

    name: Annotated[str, AfterValidator(_names_a_folder)] = "cifar10"
    data: Annotated[str, Field(min_length=1)] = "cifar10"
    """"cifar10", "digits", or a folder with train/<class>/ and test/<class>/."""
    depth: Literal[tuple(VGG_CFGS)] = 19
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Channels of every layer relative to VGG."""

    # A γ without use moves by lr·λ/(1 − momentum) a step: 0.05 an epoch of 500 steps at λ = 1e-4,
    # 0.5 at 1e-3. From 0.5 that is (with weight decay's help) 8 epochs at 1e-4, just before the lr
    # drops; 1e-3 leaves time for a cut of 90 %, and the network still learns.
    l1_lambdas: Lambdas = (0.0, 1e-4, 1e-3, 1e-2)
    """λ: one training run for each."""
    epochs: Count = 20
    lr: Rate = 0.1
    schedule: Schedule = "step"
    """"step": lr ÷ 10 after half and after three quarters of the epochs, as in the lab.
    "cosine": one epoch of warm-up, then down to zero."""
    batch_size: Annotated[int, Field(ge=2)] = 100
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 1e-4
    crop_padding: Annotated[int, Field(ge=0, le=16)] = 4
    """Black pixels around an image before its random crop."""
    flip: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto": what the hardware does well, from a fixed table (engine.py)."""
    cuda_graph: bool = True
    """False: each step is launched by itself, if a GPU's driver refuses graphs."""

    pruning_ratios: Annotated[Ratios, Field(min_length=1)] = (0.5, 0.9)
    min_channels: Count = 2
    """Channels that every layer keeps."""
    multipass_ratios: Annotated[Ratios, AfterValidator(_are_passes)] = (0.7, 0.9)
    """Cut to the first ratio, train with the penalty again, cut on to the next (Liu et al. 2017,
    section 3). () to leave it out."""

    finetune_epochs: Count = 20
    finetune_lr: Rate = 0.05
    finetune_schedule: Schedule = "cosine"
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the dense network's logits in the fine-tuning loss, 0 to 1 (Hinton et al. 2015)."""

    test_batch_size: Count = 1000

    _of_plain_values = field_validator("*", mode="before")(_plain)

    @field_validator("min_channels")
    @classmethod
    def _lets_each_cut_be_made(cls, floor, fields_before):
        before = fields_before.data
        if {"depth", "width", "pruning_ratios"} <= before.keys():
            cfg = scale_cfg(VGG_CFGS[before["depth"]], before["width"])
            hardest = max(before["pruning_ratios"])
            asked, most = num_pruned(cfg, hardest), most_prunable(cfg, floor)
            if asked > most:
                raise ValueError(
                    f"must be lower for a pruning ratio of {hardest:g}: it lets only {most} of "
                    f"{sum(widths(cfg))} channels go, not {asked}"
                )
        return floor

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov, fields_before):
        if nesterov and fields_before.data.get("momentum") == 0:
            raise ValueError("must be False without momentum")
        return nesterov

    @property
    def cfg(self) -> list[int | str]:
        """The widths of the dense network."""
        return scale_cfg(VGG_CFGS[self.depth], self.width)

    def for_finetuning(self) -> "Profile":
        """The same profile with the epochs, lr and schedule of fine-tuning."""
        tuning = ("epochs", "lr", "schedule")
        return dataclasses.replace(self, **{f: getattr(self, f"finetune_{f}") for f in tuning})


FIELDS = tuple(field.name for field in dataclasses.fields(Profile))
SETTINGS = (
    "epochs", "lr", "schedule", "batch_size", "momentum", "nesterov", "weight_decay",
    "crop_padding", "flip", "seed",
)  # fmt: skip
"""The fields of a profile that decide what a training computes."""

_DIGITS = {"data": "digits", "crop_padding": 2, "flip": False, "precision": "float32"}

# fmt: off
PROFILES: dict[str, Profile] = {p.name: p for p in (
    # The lab itself, on a GPU. A floor of 16 at 90 % is notebook 2's finding (docs/
    # beside_the_report.md).
    Profile(min_channels=16),
    # scikit-learn's handwritten digits: all three regimes of λ in minutes, without a network.
    Profile(name="quick", **_DIGITS, width=0.125, l1_lambdas=(0.0, 5e-3, 5e-2),
            epochs=22, batch_size=50, finetune_epochs=10),
    # CIFAR-10 without a GPU: a quarter of the width, a sixteenth of the work.
    Profile(name="laptop", width=0.25, l1_lambdas=(0.0, 1e-3, 1e-2), min_channels=4,
            multipass_ratios=(0.7, 0.83, 0.9), finetune_lr=0.1),
    # Liu et al. 2017, section 4.
    Profile(name="paper", l1_lambdas=(0.0, 1e-4), epochs=160, batch_size=64, nesterov=True,
            pruning_ratios=(0.7,), multipass_ratios=(),
            finetune_epochs=160, finetune_lr=0.1, finetune_schedule="step"),
    # For the tests: everything happens, nothing is learned; λ = 0.02 tells in twelve steps.
    Profile(name="smoke", **_DIGITS, width=0.0625, l1_lambdas=(0.0, 0.02), min_channels=1,
            epochs=2, batch_size=250, finetune_epochs=2),
)}
# fmt: on


def default_profile() -> str:
    """The profile of a run that names none: LAB_PROFILE, else by whether there is a CUDA GPU."""
    return os.environ.get("LAB_PROFILE") or ("cifar10" if torch.cuda.is_available() else "quick")


def get_profile(name: str | None = None, /, **overrides) -> Profile:
    """The named profile, else the default one; `overrides` replace single values, None none.

    Three environment variables count where no override does: LAB_DATA, a folder of images as it
    is called where the command was typed (LAB_CWD); LAB_EPOCHS, for training and fine-tuning; and
    LAB_RUN, the run's name, without which other data and LAB_EPOCHS give it one of its own.
    Raises ValueError for an unknown profile or field and for a wrong value.
    """
    profile = name or default_profile()
    if profile not in PROFILES:
        raise ValueError(_unknown("profile", profile, PROFILES))
    values = {k: v for k, v in overrides.items() if v is not None or k not in FIELDS}
    parts = [profile]
    if os.environ.get("LAB_DATA"):
        folder = typed_path(os.environ["LAB_DATA"], os.environ.get("LAB_CWD", ""))
        values.setdefault("data", str(folder))
    if values.get("data", PROFILES[profile].data) != PROFILES[profile].data:
        parts.append(_last_part(values["data"]))
    if epochs := os.environ.get("LAB_EPOCHS"):
        if not epochs.isdecimal() or int(epochs) < 1:
            raise ValueError(f"LAB_EPOCHS = {epochs!r}: must be a whole number of at least 1")
        parts += [] if "epochs" in values else [f"{int(epochs)}_epochs"]
        values = {"epochs": int(epochs), "finetune_epochs": int(epochs)} | values
    values.setdefault("name", os.environ.get("LAB_RUN") or "_".join(parts))
    return dataclasses.replace(PROFILES[profile], **values)


def _last_part(path: object) -> str:
    """What a run on these images is named after, whatever the Unicode form of the folder's name."""
    last = unicodedata.normalize("NFC", os.path.basename(os.path.abspath(str(path))))
    return re.sub(r"[^\w-]+", "-", last).strip("-")[:60] or "images"
