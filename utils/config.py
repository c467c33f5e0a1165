"""Profile: every hyperparameter of a run, named and validated before any work starts."""

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass

from models.vgg import VGG_CFGS, scale_cfg

SCHEDULES = ("step", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Profile:
    """One set of hyperparameters. Wrong values raise a ValueError that names field and value.

    The defaults are the lab's own: SGD, lr 0.1, batch 100, 20 epochs, lr ÷ 10 at 50 % and 75 %.
    """

    name: str = "cifar10"
    data: str = "cifar10"
    """"cifar10", "digits", or a folder with train/<class>/ and test/<class>/."""
    depth: int = 19
    width: float = 1.0
    """Channels of every layer relative to VGG."""

    l1_lambdas: tuple[float, ...] = (0.0, 1e-4, 1e-2)
    """λ: one training run for each."""
    epochs: int = 20
    lr: float = 0.1
    schedule: str = "step"
    """"step": lr ÷ 10 after half and after three quarters of the epochs, as in the lab.
    "cosine": one epoch of warm-up, then down to zero."""
    batch_size: int = 100
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    crop_padding: int = 4
    """Black pixels around an image before its random crop."""
    flip: bool = True
    seed: int = 1
    precision: str = "auto"
    """"auto" lets a short timed probe choose; "float32", "bfloat16" or "float16" fixes it."""

    pruning_ratios: tuple[float, ...] = (0.5, 0.9)
    min_channels: int | float = 2
    """Channels that every layer keeps: a number, or a share of the layer."""
    multipass_ratios: tuple[float, ...] = (0.7, 0.9)
    """Cut to the first ratio, train with the penalty again, cut on to the next (Liu et al. 2017,
    section 3). () to leave it out."""

    finetune_epochs: int = 20
    finetune_lr: float = 0.05
    finetune_schedule: str = "cosine"
    distillation: float = 0.0
    """Weight of the dense network's logits in the fine-tuning loss, 0 to 1 (Hinton et al. 2015)."""

    test_batch_size: int = 1000

    def __post_init__(self) -> None:
        for name in ("l1_lambdas", *_RATIOS):
            value = getattr(self, name)
            _require(isinstance(value, list | tuple), name, value, "a list of numbers")
            object.__setattr__(self, name, tuple(value))
        for name, (test, rule) in _RULES.items():
            _require(test(getattr(self, name)), name, getattr(self, name), rule)
        for name, (test, rule) in _ENTRY_RULES.items():
            value = getattr(self, name)
            _require(len(value) > 0 or name == "multipass_ratios", name, value, "not empty")
            _require(all(test(v) for v in value), name, value, rule)
            _require(len(set(value)) == len(value), name, value, "all different")
        ascending = list(self.multipass_ratios) == sorted(self.multipass_ratios)
        _require(ascending, "multipass_ratios", self.multipass_ratios, "ascending")
        several = len(self.multipass_ratios) != 1
        _require(several, "multipass_ratios", self.multipass_ratios, "two ratios or more, or none")
        _require(not self.nesterov or self.momentum > 0, "nesterov", True, "False without momentum")

    @property
    def cfg(self) -> list[int | str]:
        """The widths of the dense network."""
        return scale_cfg(VGG_CFGS[self.depth], self.width)

    def for_finetuning(self) -> "Profile":
        """The same profile with the epochs, lr and schedule of fine-tuning."""
        return dataclasses.replace(
            self,
            epochs=self.finetune_epochs,
            lr=self.finetune_lr,
            schedule=self.finetune_schedule,
        )


def _number(v) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)


def _whole(v) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


_TEXT = (lambda v: isinstance(v, str) and v != "", "a name")
_POSITIVE = (lambda v: _number(v) and v > 0, "a number above 0")
_COUNT = (lambda v: _whole(v) and v >= 1, "a whole number of at least 1")
_SCHEDULE = (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
_FLAG = (lambda v: isinstance(v, bool), "True or False")

_RULES = {
    "name": (
        lambda v: isinstance(v, str) and v.replace("-", "").replace("_", "").isalnum(),
        "letters, digits, - and _ (it names folders)",
    ),
    "data": _TEXT,
    "depth": (lambda v: _whole(v) and v in VGG_CFGS, f"one of {sorted(VGG_CFGS)}"),
    "width": (lambda v: _number(v) and 0 < v <= 4, "a number above 0 and at most 4"),
    "epochs": _COUNT,
    "lr": _POSITIVE,
    "schedule": _SCHEDULE,
    "batch_size": (lambda v: _whole(v) and v >= 2, "a whole number of at least 2"),
    "momentum": (lambda v: _number(v) and 0 <= v < 1, "at least 0 and below 1"),
    "nesterov": _FLAG,
    "weight_decay": (lambda v: _number(v) and v >= 0, "a number of at least 0"),
    "crop_padding": (lambda v: _whole(v) and 0 <= v <= 16, "a whole number from 0 to 16"),
    "flip": _FLAG,
    "seed": (lambda v: _whole(v) and 0 <= v < 2**31, "a whole number from 0 to 2**31 - 1"),
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "min_channels": (
        lambda v: (_whole(v) and v >= 1) or (isinstance(v, float) and 0 <= v <= 1),
        "a whole number of at least 1, or a share from 0.0 to 1.0",
    ),
    "finetune_epochs": _COUNT,
    "finetune_lr": _POSITIVE,
    "finetune_schedule": _SCHEDULE,
    "distillation": (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "test_batch_size": _COUNT,
}
_RATIOS = ("pruning_ratios", "multipass_ratios")
_RATIO = (lambda v: _number(v) and 0 <= v < 1, "numbers of at least 0 and below 1")
_ENTRY_RULES = {
    "l1_lambdas": (lambda v: _number(v) and v >= 0, "finite numbers of at least 0"),
    **dict.fromkeys(_RATIOS, _RATIO),
}


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{field} = {value!r}: must be {rule}")


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        # The lab itself, on a GPU.
        Profile(),
        # scikit-learn's handwritten digits: all three regimes of λ in minutes, without a network.
        Profile(
            name="quick",
            data="digits",
            width=0.125,
            l1_lambdas=(0.0, 5e-3, 5e-2),
            epochs=22,
            finetune_epochs=10,
            batch_size=50,
            crop_padding=2,
            flip=False,
        ),
        # CIFAR-10 without a GPU: a quarter of the width, a sixteenth of the work.
        Profile(
            name="laptop",
            width=0.25,
            l1_lambdas=(0.0, 1e-3, 1e-2),
            min_channels=4,
            multipass_ratios=(0.7, 0.83, 0.9),
            finetune_lr=0.1,
        ),
        # Liu et al. 2017, section 4.
        Profile(
            name="paper",
            l1_lambdas=(0.0, 1e-4),
            epochs=160,
            batch_size=64,
            nesterov=True,
            pruning_ratios=(0.7,),
            multipass_ratios=(),
            finetune_epochs=160,
            finetune_lr=0.1,
            finetune_schedule="step",
        ),
        # For the tests: everything happens, nothing is learned.
        Profile(
            name="smoke",
            data="digits",
            width=0.0625,
            precision="float32",
            min_channels=1,
            l1_lambdas=(0.0, 5e-3),
            epochs=2,
            batch_size=250,
            crop_padding=2,
            flip=False,
            finetune_epochs=2,
        ),
    )
}


def get_profile(profile: str | None = None, /, **overrides) -> Profile:
    """The named profile, else the one that LAB_PROFILE names, else "cifar10".

    `overrides` replace single values (`name` among them: a run of its own, with its own folders);
    None leaves the profile's own. Two more environment variables count: LAB_DATA, a folder of
    images, takes the place of the profile's data; LAB_EPOCHS, a number, makes a shorter run of its
    own: that many epochs of training and of fine-tuning, under a name that says so. Raises
    ValueError for an unknown profile or field.
    """
    profile = profile or os.environ.get("LAB_PROFILE") or "cifar10"
    if profile not in PROFILES:
        raise ValueError(f"profile = {profile!r}: must be one of {', '.join(PROFILES)}")
    fields = [f.name for f in dataclasses.fields(Profile)]
    for field in overrides:
        if field not in fields:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(fields)}"
            raise ValueError(f"{field}: a profile has no such field{hint}")
    chosen = {k: v for k, v in overrides.items() if v is not None}
    if os.environ.get("LAB_DATA"):
        chosen.setdefault("data", os.environ["LAB_DATA"])
    if os.environ.get("LAB_EPOCHS"):
        epochs = os.environ["LAB_EPOCHS"]
        _require(epochs.isdecimal(), "LAB_EPOCHS", epochs, _COUNT[1])
        short = {"epochs": int(epochs), "finetune_epochs": int(epochs)}
        chosen = {"name": f"{profile}_{epochs}_epochs"} | short | chosen
    return dataclasses.replace(PROFILES[profile], **chosen)
