"""Profiles: the lab's values, and no invalid one gets through."""

import dataclasses
import math

import pytest

from utils.config import PROFILES, Profile, get_profile

NAN, INF = math.nan, math.inf

LAB = {
    "depth": 19, "width": 1.0, "data": "cifar10", "seed": 1, "epochs": 20, "lr": 0.1,
    "schedule": "step", "batch_size": 100, "test_batch_size": 1000, "momentum": 0.9,
    "nesterov": False, "weight_decay": 1e-4, "crop_padding": 4, "flip": True,
    "l1_lambdas": (0.0, 1e-4, 1e-2), "pruning_ratios": (0.5, 0.9), "finetune_epochs": 20,
}  # fmt: skip
PAPER = LAB | {
    "epochs": 160, "batch_size": 64, "nesterov": True, "l1_lambdas": (0.0, 1e-4),
    "pruning_ratios": (0.7,), "finetune_epochs": 160, "finetune_lr": 0.1,
    "finetune_schedule": "step", "distillation": 0.0,
}  # fmt: skip

INVALID = [
    ("name", ""), ("name", "../elsewhere"), ("name", "a b"), ("name", 7),
    ("data", ""), ("data", 10), ("depth", 18), ("depth", "19"), ("depth", None), ("depth", [19]),
    ("width", 0), ("width", -0.5), ("width", 5), ("width", NAN), ("width", "1"),
    ("l1_lambdas", ()), ("l1_lambdas", (-1e-4,)), ("l1_lambdas", (0.0, NAN)),
    ("l1_lambdas", (INF,)), ("l1_lambdas", (0.0, 0.0)), ("l1_lambdas", 1e-4),
    ("l1_lambdas", ("1e-4",)), ("l1_lambdas", "1e-4"), ("l1_lambdas", (True,)),
    ("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("epochs", True), ("epochs", "20"),
    ("lr", 0), ("lr", -0.1), ("lr", NAN), ("lr", INF), ("lr", "0.1"), ("lr", False),
    ("schedule", "linear"), ("schedule", None), ("schedule", ["step"]),
    ("batch_size", 0), ("batch_size", 1), ("batch_size", 100.0), ("batch_size", -100),
    ("momentum", 1), ("momentum", -0.1), ("momentum", NAN), ("nesterov", 1), ("nesterov", "no"),
    ("weight_decay", -1e-4), ("weight_decay", INF), ("crop_padding", -1), ("crop_padding", 17),
    ("crop_padding", 0.5), ("flip", 0), ("flip", None), ("seed", -1), ("seed", 2**31),
    ("seed", 1.0), ("precision", "float64"), ("precision", None),
    ("pruning_ratios", ()), ("pruning_ratios", (1,)), ("pruning_ratios", (-0.1,)),
    ("pruning_ratios", (0.5, 1.5)), ("pruning_ratios", (NAN,)), ("pruning_ratios", (0.5, 0.5)),
    ("pruning_ratios", 0.5), ("min_channels", 0), ("min_channels", -2), ("min_channels", 1.5),
    ("min_channels", NAN), ("min_channels", True), ("min_channels", "2"),
    ("multipass_ratios", (0.9, 0.7)), ("multipass_ratios", (1,)), ("multipass_ratios", 0.7),
    ("multipass_ratios", (0.7, 1)), ("multipass_ratios", (0.9,)),
    ("finetune_epochs", 0), ("finetune_epochs", 2.5), ("finetune_lr", 0), ("finetune_lr", INF),
    ("finetune_schedule", "none"), ("distillation", -0.1), ("distillation", 1.1),
    ("distillation", NAN), ("test_batch_size", 0), ("test_batch_size", None),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("LAB_PROFILE", raising=False)
    monkeypatch.delenv("LAB_DATA", raising=False)
    monkeypatch.delenv("LAB_EPOCHS", raising=False)


@pytest.mark.parametrize(("name", "values"), [("cifar10", LAB), ("paper", PAPER)])
def test_the_profiles_have_the_published_values(name, values):
    profile = get_profile(name)
    assert {field: getattr(profile, field) for field in values} == values


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_goes_by_its_name_and_passes_its_own_checks(name):
    profile = get_profile(name)
    assert profile.name == name
    assert dataclasses.replace(profile) == profile  # runs __post_init__ again
    assert len(profile.cfg) == 20 and profile.cfg.count("M") == 4


@pytest.mark.reliability
@pytest.mark.parametrize(("field", "value"), INVALID)
def test_an_invalid_setting_is_named_with_its_value(field, value):
    """invalid settings → ValueError naming the field and the value"""
    with pytest.raises(ValueError) as caught:
        Profile(**{field: value})
    assert field in str(caught.value) and repr(value) in str(caught.value)


def test_there_are_at_least_40_invalid_settings_one_for_each_field():
    assert len(INVALID) >= 40
    assert {field for field, _ in INVALID} == {f.name for f in dataclasses.fields(Profile)}


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov = True"):
        get_profile(nesterov=True, momentum=0)


def test_overrides_replace_and_none_leaves():
    profile = get_profile("quick", lr=0.2, epochs=None, l1_lambdas=[0, 1e-3])
    assert (profile.lr, profile.epochs) == (0.2, PROFILES["quick"].epochs)
    assert profile.l1_lambdas == (0, 1e-3)
    assert PROFILES["quick"].lr == 0.1  # the profile itself stays


def test_the_environment_names_profile_and_data(monkeypatch):
    assert get_profile().name == "cifar10"
    monkeypatch.setenv("LAB_PROFILE", "laptop")
    monkeypatch.setenv("LAB_DATA", "/my images")
    assert (get_profile().name, get_profile().data) == ("laptop", "/my images")
    assert get_profile("quick").name == "quick"  # what is asked for by name wins
    assert get_profile(data="digits").data == "digits"
    monkeypatch.setenv("LAB_PROFILE", "")
    monkeypatch.setenv("LAB_DATA", "")
    assert (get_profile().name, get_profile().data) == ("cifar10", "cifar10")


def test_an_unknown_profile_is_named_beside_the_known(monkeypatch):
    monkeypatch.setenv("LAB_PROFILE", "cifar100")
    with pytest.raises(ValueError, match="profile = 'cifar100'") as caught:
        get_profile()
    assert all(name in str(caught.value) for name in PROFILES)


def test_an_unknown_field_says_which_was_meant():
    with pytest.raises(ValueError, match=r"epoch: .*did you mean epochs\?"):
        get_profile(epoch=3)
    with pytest.raises(ValueError, match=r"xyz: .*there are .*batch_size"):
        get_profile(xyz=None)


def test_for_finetuning_takes_epochs_lr_and_schedule_and_nothing_else():
    before = get_profile(finetune_epochs=7, finetune_lr=0.02, finetune_schedule="cosine")
    after = before.for_finetuning()
    assert (after.epochs, after.lr, after.schedule) == (7, 0.02, "cosine")
    back = {"epochs": before.epochs, "lr": before.lr, "schedule": before.schedule}
    assert dataclasses.replace(after, **back) == before


def test_lab_epochs_makes_a_shorter_run_of_its_own(monkeypatch):
    monkeypatch.setenv("LAB_EPOCHS", "7")
    profile = get_profile("quick")
    assert profile == dataclasses.replace(
        PROFILES["quick"], name="quick_7_epochs", epochs=7, finetune_epochs=7
    )
    assert get_profile("quick", epochs=3, name="mine").name == "mine"
    assert get_profile("quick", epochs=3).epochs == 3
    for wrong in ("0", "-1", "2.5", "many"):
        monkeypatch.setenv("LAB_EPOCHS", wrong)
        with pytest.raises(ValueError, match=rf"(?i)epochs = .*{wrong}.* at least 1"):
            get_profile("quick")
