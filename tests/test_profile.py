"""Profiles: the lab's values, plain ones, and no invalid one gets through."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.profile import PROFILES, Profile, default_profile, get_profile

NAN, INF = math.nan, math.inf

LAB = {
    "depth": 19, "width": 1.0, "data": "cifar10", "seed": 1, "epochs": 20, "lr": 0.1,
    "schedule": "step", "batch_size": 100, "test_batch_size": 1000, "momentum": 0.9,
    "nesterov": False, "weight_decay": 1e-4, "crop_padding": 4, "flip": True,
    "l1_lambdas": (0.0, 1e-4, 1e-3, 1e-2), "pruning_ratios": (0.5, 0.9), "finetune_epochs": 20,
}  # fmt: skip
CIFAR10 = LAB | {  # why: benchmarks/README.md
    "schedule": "cosine", "nesterov": True, "weight_decay": 5e-4, "finetune_schedule": "cosine",
    "finetune_lr": 0.1, "finetune_weight_decay": 5e-4,
    "l1_lambdas": (0.0, 1e-4, 5e-4, 1e-3, 1e-2),
}  # fmt: skip
PAPER = LAB | {
    "epochs": 160, "batch_size": 64, "nesterov": True, "l1_lambdas": (0.0, 1e-4),
    "pruning_ratios": (0.7,), "finetune_epochs": 160, "finetune_lr": 0.1,
    "finetune_schedule": "step", "distillation": 0.0,
}  # fmt: skip

INVALID = [
    ("name", ""), ("name", "../elsewhere"), ("name", "a b"), ("name", 7), ("name", "a\n"),
    ("name", "網" * 67), ("l1_lambdas", (1e-3, 1.0000001e-3)),
    ("data", ""), ("data", 10), ("depth", 18), ("depth", "19"), ("depth", None), ("depth", [19]),
    ("width", 0), ("width", -0.5), ("width", 5), ("width", NAN), ("width", "1"),
    ("l1_lambdas", ()), ("l1_lambdas", (-1e-4,)), ("l1_lambdas", (0.0, NAN)),
    ("l1_lambdas", (INF,)), ("l1_lambdas", (0.0, 0.0)), ("l1_lambdas", 1e-4),
    ("l1_lambdas", ("1e-4",)), ("l1_lambdas", "1e-4"), ("l1_lambdas", (True,)),
    ("l1_lambdas", (0.0, -0.0)), ("l1_lambdas", (1e-3, 1e-3)),
    ("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("epochs", True), ("epochs", "20"),
    ("lr", 0), ("lr", -0.1), ("lr", NAN), ("lr", INF), ("lr", "0.1"), ("lr", False),
    ("schedule", "linear"), ("schedule", None), ("schedule", ["step"]),
    ("batch_size", 0), ("batch_size", 1), ("batch_size", 100.0), ("batch_size", -100),
    ("momentum", 1), ("momentum", -0.1), ("momentum", NAN), ("nesterov", 1), ("nesterov", "no"),
    ("weight_decay", -1e-4), ("weight_decay", INF), ("crop_padding", -1), ("crop_padding", 17),
    ("crop_padding", 0.5), ("flip", 0), ("flip", None), ("seed", -1), ("seed", 2**31),
    ("seed", 1.0), ("precision", "float64"), ("precision", None), ("cuda_graph", 1),
    ("pruning_ratios", ()), ("pruning_ratios", (1,)), ("pruning_ratios", (-0.1,)),
    ("pruning_ratios", (0.5, 1.5)), ("pruning_ratios", (NAN,)), ("pruning_ratios", (0.5, 0.5)),
    ("pruning_ratios", 0.5), ("pruning_ratios", [50, 90]),
    ("multiple_of", 0), ("multiple_of", 16.0), ("finetune_weight_decay", -1e-4),
    ("min_channels", 0), ("min_channels", -2), ("min_channels", 1.5), ("min_channels", 1.0),
    ("min_channels", 0.02), ("min_channels", NAN), ("min_channels", True), ("min_channels", "2"),
    ("multipass_ratios", (0.9, 0.7)), ("multipass_ratios", (1,)), ("multipass_ratios", 0.7),
    ("multipass_ratios", (0.7, 1)), ("multipass_ratios", (0.9,)),
    ("multipass_ratios", (0.7, 0.7)),
    ("finetune_epochs", 0), ("finetune_epochs", 2.5), ("finetune_lr", 0), ("finetune_lr", INF),
    ("finetune_schedule", "none"), ("distillation", -0.1), ("distillation", 1.1),
    ("distillation", NAN), ("test_batch_size", 0), ("test_batch_size", None),
]  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A machine without a GPU where nothing of the lab is set; a test sets what it needs."""
    for name in ("LAB_PROFILE", "LAB_DATA", "LAB_EPOCHS", "LAB_RUN", "LAB_CWD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return monkeypatch.setenv


@pytest.mark.parametrize(
    ("profile", "values"),
    [(Profile(), LAB), (PROFILES["cifar10"], CIFAR10), (PROFILES["paper"], PAPER)],
)
def test_the_profiles_have_the_published_values(profile, values):
    assert {field: getattr(profile, field) for field in values} == values


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_goes_by_its_name_and_comes_back_from_json(name):
    profile = get_profile(name)
    assert profile.name == name
    assert profile.cfg.count("M") == 4
    written = json.dumps(dataclasses.asdict(profile), allow_nan=False)
    assert Profile(**json.loads(written)) == profile


@pytest.mark.reliability
@pytest.mark.parametrize(("field", "value"), INVALID)
def test_an_invalid_setting_is_named_with_its_value(field, value):
    """invalid settings → ValueError naming the field and the value"""
    with pytest.raises(ValueError) as caught:
        Profile(**{field: value})
    for line in str(caught.value).splitlines():
        assert line.startswith(f"{field} = {value!r}: ") and "must" in line and len(line) < 150


def test_there_is_an_invalid_setting_for_each_field():
    assert {field for field, _ in INVALID} == {f.name for f in dataclasses.fields(Profile)}


def test_every_wrong_field_has_a_line_of_its_own():
    with pytest.raises(ValueError) as caught:
        get_profile("quick", lr=-1, epochs="5", schedule="linear", flip=False)
    assert str(caught.value).splitlines() == [
        "epochs = '5': must be a valid integer",
        "lr = -1: must be greater than 0",
        "schedule = 'linear': must be 'step' or 'cosine'",
    ]


def test_a_floor_that_forbids_a_cut_is_named_before_anything_is_trained():
    # laptop has 1,376 channels; at 90 % 138 stay, at 63 % 509. Two of its 16 layers have 16.
    for floor, ratios in ((9, (0.5, 0.9)), (35, (0.63,))):
        with pytest.raises(ValueError, match=rf"min_channels = {floor}: must be lower .* go, not"):
            get_profile("laptop", min_channels=floor, pruning_ratios=ratios)
    for floor, ratios in ((8, (0.5, 0.9)), (34, (0.63,))):
        assert get_profile("laptop", min_channels=floor, pruning_ratios=ratios).cfg
    tiny = {"width": 1 / 16, "min_channels": 2}  # 344 channels, of which 32 are to stay
    assert Profile(**tiny, pruning_ratios=(312 / 344,))
    with pytest.raises(ValueError, match="lets 312 channels go, not 313"):
        Profile(**tiny, pruning_ratios=(313 / 344,))


def test_a_floor_that_nobody_typed_is_held_against_the_cut_too():
    with pytest.raises(ValueError, match="min_channels = 2: must be lower for a pruning ratio"):
        Profile(pruning_ratios=(0.999,))


def test_a_percentage_is_taken_for_what_it_is():
    with pytest.raises(ValueError, match=r"\[50, 90\]: 50 must .* below 1; did you mean 0\.5\?"):
        get_profile(pruning_ratios=[50, 90])


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov = True"):
        get_profile(nesterov=True, momentum=0)


whole = st.integers(1, 1000)
share = st.floats(0, 0.99)


@given(lambdas=st.lists(share, min_size=1, max_size=4, unique_by="{:g}".format), n=whole, lr=whole)
def test_numbers_of_numpy_become_plain_numbers(lambdas, n, lr):
    array = np.array(lambdas)
    plain = Profile(l1_lambdas=lambdas, epochs=n, lr=lr, flip=False)
    for given_as in (array, list(array), tuple(array)):
        profile = Profile(
            l1_lambdas=given_as, epochs=np.int64(n), lr=np.float64(lr), flip=np.bool_(False)
        )
        assert profile == plain and hash(profile) == hash(plain)
        assert repr(profile) == repr(plain)  # np.float64(0.5) equals 0.5, but is written otherwise
    assert type(plain.lr) is float and all(type(v) is float for v in plain.l1_lambdas)


def test_overrides_replace_and_none_leaves():
    profile = get_profile("quick", lr=0.2, epochs=None, l1_lambdas=[0, 1e-3])
    assert (profile.lr, profile.epochs) == (0.2, PROFILES["quick"].epochs)
    assert profile.l1_lambdas == (0, 1e-3)
    assert PROFILES["quick"].lr == 0.1  # the profile itself stays


def test_without_a_name_the_gpu_decides(environment, monkeypatch):
    assert default_profile() == "quick"
    assert get_profile() == PROFILES["quick"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert default_profile() == "cifar10"
    assert get_profile() == PROFILES["cifar10"]
    environment("LAB_PROFILE", "laptop")
    assert default_profile() == "laptop"
    assert get_profile() == PROFILES["laptop"]
    assert get_profile("paper") == PROFILES["paper"]  # what is asked for by name wins
    environment("LAB_PROFILE", "")
    assert get_profile().name == "cifar10"


def test_an_unknown_profile_or_field_says_which_was_meant(environment):
    environment("LAB_PROFILE", "Cifar100")
    with pytest.raises(ValueError, match=r"profile = 'Cifar100': .* did you mean cifar10\?") as it:
        get_profile()
    assert all(name in str(it.value) for name in PROFILES)
    with pytest.raises(ValueError, match=r"'epoch': .*batch_size.* did you mean epochs\?"):
        get_profile("quick", epoch=None)


def test_fine_tuning_has_four_settings_of_its_own_and_shares_the_others():
    own = {"epochs": 7, "lr": 0.02, "schedule": "cosine", "weight_decay": 3e-4}
    before = get_profile(**{f"finetune_{name}": value for name, value in own.items()})
    after = before.for_finetuning()
    assert {name: getattr(after, name) for name in own} == own
    back = {name: getattr(before, name) for name in own}
    assert dataclasses.replace(after, **back) == before


@pytest.mark.parametrize(
    ("typed", "folder", "run"),
    [
        ("digits", "work/digits", "quick_digits"),  # a folder, not the built-in digits
        ('"my images"', "work/my images", "quick_my-images"),
        ("'../x.y/'", "x.y", "quick_x-y"),
        (".", "work", "quick_work"),
        ("~/fotos", "home/fotos", "quick_fotos"),
        ("cafe\u0301 ", "work/cafe\u0301", "quick_caf\u00e9"),  # e and its accent in two characters
        ("???", "work/???", "quick_images"),
    ],
)
def test_own_images_are_a_folder_and_name_the_run(environment, tmp_path, typed, folder, run):
    environment("HOME", str(tmp_path / "home"))
    environment("USERPROFILE", str(tmp_path / "home"))
    environment("LAB_CWD", str(tmp_path / "work"))
    environment("LAB_DATA", typed)
    profile = get_profile("quick")
    assert (profile.data, profile.name) == (str(tmp_path / folder), run)


def test_a_folder_is_seen_from_the_working_directory(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment("LAB_DATA", "images")
    assert get_profile("quick").data == str(tmp_path / "images")
    assert get_profile("cifar10", data="digits").name == "cifar10_digits"
    environment("LAB_DATA", "")
    assert get_profile("quick") == PROFILES["quick"]


def test_lab_epochs_makes_a_shorter_run_of_its_own(environment):
    environment("LAB_EPOCHS", "7")
    assert get_profile("quick") == dataclasses.replace(
        PROFILES["quick"], name="quick_7_epochs", epochs=7, finetune_epochs=7
    )
    assert get_profile("quick", epochs=3).epochs == 3
    environment("LAB_DATA", "/images")
    assert get_profile("quick").name == "quick_images_7_epochs"
    environment("LAB_RUN", "trial")
    assert get_profile("quick").name == "trial"
    assert get_profile("quick", name="mine").name == "mine"
    for wrong in ("0", "-1", "2.5", "many"):
        environment("LAB_EPOCHS", wrong)
        with pytest.raises(ValueError, match=rf"LAB_EPOCHS = '{wrong}': .* at least 1"):
            get_profile("quick")
