"""Profile: every hyperparameter of a run, named and validated before any work starts."""

import dataclasses
import difflib
import os
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from models.vgg import VGG_CFGS, most_prunable, num_pruned, scale_cfg


def is_ratio(ratio: float) -> float:
    """`ratio`, or a ValueError if it is none."""
    if not 0 <= ratio < 1:
        hint = f"; did you mean {ratio / 100:g}?" if 1 < ratio < 100 else ""
        raise ValueError(f"must be at least 0 and below 1{hint}")
    return ratio


Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Ratios = tuple[Annotated[float, AfterValidator(is_ratio)], ...]
Schedule = Literal["step", "cosine"]


def _named_apart(numbers: tuple[float, ...]) -> bool:
    """They name files; 0.0 and −0.0 are one."""
    return len({f"{number + 0.0:g}" for number in numbers}) == len(numbers)


def _plain(value: object) -> object:
    """Numbers and lists of numpy or torch as Python's own, which every file can hold."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _unknown(what: str, value: object, known) -> str:
    close = difflib.get_close_matches(str(value).lower(), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{what} = {value!r}: must be one of {', '.join(known)}{hint}"


def _explain(error: dict, settings: dict) -> str:
    """pydantic's error about one field in a line: "lr = '0.1': must be a valid number"."""
    rule = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several fields, and says which
        return rule
    field, *entry = error["loc"]
    if error["type"] == "unexpected_keyword_argument":
        return _unknown("field", field, FIELDS)
    wrong_entry = f"{error['input']!r} " if entry else ""
    rule = re.sub(r"^\w+ should", "must", rule)
    return f"{field} = {settings[field]!r}: {wrong_entry}{rule}"


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Profile:
    """One set of hyperparameters, by default the lab's own. Wrong values raise a ValueError that
    names field and value."""

    name: str = "cifar10"
    data: Annotated[str, Field(min_length=1)] = "cifar10"
    """"cifar10", "digits", or a folder with train/<class>/ and test/<class>/."""
    depth: Literal[tuple(VGG_CFGS)] = 19
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Channels of every layer relative to VGG."""

    l1_lambdas: Annotated[tuple[NotNegative, ...], Field(min_length=1)] = (0.0, 1e-4, 1e-3, 1e-2)
    """λ: one training run for each. A γ without use falls by lr·λ/(1 − momentum) a step: from 0.5
    to 0 in 500 steps at 1e-3; at 1e-4 (with weight decay) just before the lr drops."""
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
    multiple_of: Count = 1
    """Widths of the slim networks are multiples of this, as hardware likes them."""
    multipass_ratios: Ratios = (0.7, 0.9)
    """Cut to the first ratio, train with the penalty again, cut on to the next (Liu et al. 2017,
    section 3). () to leave it out."""

    finetune_epochs: Count = 20
    finetune_lr: Rate = 0.05
    finetune_schedule: Schedule = "cosine"
    finetune_weight_decay: NotNegative = 1e-4
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the dense network's logits in the fine-tuning loss, 0 to 1 (Hinton et al. 2015)."""
    test_batch_size: Count = 1000

    @model_validator(mode="after")
    def _fits_together(self):
        lambdas, ratios, passes = self.l1_lambdas, self.pruning_ratios, self.multipass_ratios
        asked, most = num_pruned(self.cfg, max(ratios)), most_prunable(self.cfg, self.min_channels)
        floor = f"be lower for a pruning ratio of {max(ratios):g}: it lets {most} channels go, not"
        rules = {
            "name": (re.fullmatch(r"\w[\w-]*", self.name) and len(self.name.encode()) <= 200,
                     "be letters, digits, - and _, 200 bytes at most"),
            "l1_lambdas": (_named_apart(lambdas), "be different in six digits"),
            "pruning_ratios": (_named_apart(ratios), "be different in six digits"),
            "multipass_ratios": (len(passes) != 1 and sorted(set(passes)) == list(passes),
                                 "be two ratios or more in ascending order, or none"),
            "nesterov": (not self.nesterov or self.momentum, "be False without momentum"),
            "min_channels": (asked <= most, f"{floor} {asked}"),
        }  # fmt: skip
        wrong = [f"{k} = {getattr(self, k)!r}: must {r}" for k, (ok, r) in rules.items() if not ok]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def cfg(self) -> list[int | str]:
        """The widths of the dense network."""
        return scale_cfg(VGG_CFGS[self.depth], self.width)

    def for_finetuning(self) -> "Profile":
        """The same profile with the epochs, lr, schedule and weight decay of fine-tuning."""
        tuning = ("epochs", "lr", "schedule", "weight_decay")
        return dataclasses.replace(self, **{f: getattr(self, f"finetune_{f}") for f in tuning})


def _explained(self, *, _init=Profile.__init__, **settings) -> None:
    """Profile(...) takes numpy's numbers, too, and has a line for each wrong one."""
    try:
        _init(self, **{name: _plain(value) for name, value in settings.items()})
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e, settings) for e in error.errors())) from None


Profile.__init__ = _explained
FIELDS = tuple(field.name for field in dataclasses.fields(Profile))
SETTINGS = ("epochs", "lr", "schedule", "batch_size", "momentum", "nesterov", "weight_decay",
            "crop_padding", "flip", "seed")  # fmt: skip
"""The fields of a profile that decide what a training computes."""

_DIGITS = {"data": "digits", "crop_padding": 1, "flip": False, "precision": "float32"}

# fmt: off
PROFILES: dict[str, Profile] = {p.name: p for p in (
    # The lab itself, on a GPU; why each setting: benchmarks/README.md, "The profile cifar10".
    Profile(schedule="cosine", nesterov=True, weight_decay=5e-4, min_channels=16,
            l1_lambdas=(0.0, 1e-4, 5e-4, 1e-3, 1e-2), finetune_lr=0.1, finetune_weight_decay=5e-4),
    # scikit-learn's handwritten digits: all three regimes of λ in a minute, without a network.
    # With a floor of 8, 90 % ends above 90 % on held-out images in each of three seeds.
    Profile(name="quick", **_DIGITS, width=0.25, l1_lambdas=(0.0, 5e-3, 5e-2),
            epochs=11, batch_size=50, min_channels=8, finetune_epochs=10),
    # CIFAR-10 without a GPU: a quarter of the width, a sixteenth of the work.
    Profile(name="laptop", width=0.25, l1_lambdas=(0.0, 1e-3, 1e-2), min_channels=4,
            schedule="cosine", nesterov=True, weight_decay=5e-4,
            multipass_ratios=(0.7, 0.83, 0.9), finetune_lr=0.1),
    # Liu et al. 2017, section 4.
    Profile(name="paper", l1_lambdas=(0.0, 1e-4), epochs=160, batch_size=64, nesterov=True,
            pruning_ratios=(0.7,), multipass_ratios=(),
            finetune_epochs=160, finetune_lr=0.1, finetune_schedule="step"),
    # For the tests: everything happens, nothing is learned; λ = 0.02 tells in twelve steps.
    Profile(name="smoke", **_DIGITS, depth=11, width=0.0625, l1_lambdas=(0.0, 0.02), min_channels=1,
            epochs=2, batch_size=250, finetune_epochs=2),
)}
# fmt: on


def typed_path(typed: str, typed_in: str = "") -> Path:
    """The absolute path of what people type, perhaps with ~ or quotes, in the folder `typed_in`."""
    # A lone " at the end is what is left of "C:\my images\" when Windows has read it.
    unquoted = re.sub(r"""^(["'])(.+)\1$|"$""", r"\2", typed.strip())
    return Path(os.path.abspath(os.path.join(typed_in, os.path.expanduser(unquoted))))


def default_profile() -> str:
    """The profile of a run that names none: LAB_PROFILE, else by whether there is a CUDA GPU."""
    return os.environ.get("LAB_PROFILE") or ("cifar10" if torch.cuda.is_available() else "quick")


def get_profile(name: str | None = None, /, **overrides) -> Profile:
    """The named profile, else the default one; `overrides` replace single values, None none.

    Where no override does, LAB_DATA counts, a folder of images as it is called where the command
    was typed (LAB_CWD); LAB_EPOCHS, for training and fine-tuning; and LAB_RUN, the run's name, else
    made of profile, data and epochs. Raises ValueError for what is unknown or wrong.
    """
    profile = name or default_profile()
    if profile not in PROFILES:
        raise ValueError(_unknown("profile", profile, PROFILES))
    values = {k: v for k, v in overrides.items() if v is not None or k not in FIELDS}
    parts = [profile]
    if folder := os.environ.get("LAB_DATA"):
        values.setdefault("data", str(typed_path(folder, os.environ.get("LAB_CWD", ""))))
    if values.get("data", PROFILES[profile].data) != PROFILES[profile].data:
        last = unicodedata.normalize("NFC", os.path.basename(os.path.abspath(str(values["data"]))))
        parts.append(re.sub(r"[^\w-]+", "-", last).strip("-")[:40] or "images")
    if epochs := os.environ.get("LAB_EPOCHS"):
        if not epochs.isdecimal() or int(epochs) < 1:
            raise ValueError(f"LAB_EPOCHS = {epochs!r}: must be a whole number of at least 1")
        parts += [] if "epochs" in values else [f"{int(epochs)}_epochs"]
        values = {"epochs": int(epochs), "finetune_epochs": int(epochs)} | values
    values.setdefault("name", os.environ.get("LAB_RUN") or "_".join(parts))
    return dataclasses.replace(PROFILES[profile], **values)
