"""A run has one identity: written down once, read ever after, and what is foreign is named."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_data, tiny_profile

from utils.images.data import ImageData
from utils.profile import Profile
from utils.run import identity
from utils.run.identity import RunError, begin, open_run


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def profile(**changes) -> Profile:
    fields = {"name": "first", "pruning_ratios": (0.5, 0.9), "min_channels": 1}
    return tiny_profile(**fields | changes)


def begun(images: ImageData | None = None, **changes) -> identity.Run:
    return begin(profile(**changes), images or tiny_data(), "cpu")


def content(name: str = "first") -> dict:
    return json.loads(Path("checkpoints", name, "run.json").read_text("utf-8"))


# --- beginning -----------------------------------------------------------------------------------


def test_a_run_is_written_down_and_read_by_the_notebooks_that_follow():
    data = tiny_data()
    run = begun()
    assert open_run() == open_run("first") == run
    assert run.profile == profile() and run.name == "first"
    assert run.data == {
        "name": "noise", "digest": data.digest, "classes": ["a", "b", "c"], "train": 26, "test": 10,
    }  # fmt: skip
    assert run.machine["torch"] and run.began
    assert len(run.id) == 16 and int(run.id, 16) and content()["id"] == run.id
    assert {run.id, "noise", "26", "float32"} <= {*str(run).replace(",", " ").split()}
    assert (run.checkpoints, run.figures) == (Path("checkpoints/first"), Path("figures/first"))


def test_begun_again_it_goes_on_as_it_was():
    run = begun()
    before = Path("checkpoints/first/run.json").read_bytes()
    assert begun() == run
    assert Path("checkpoints/first/run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.2}, ["lr = 0.1, now 0.2"]),
        ({"seed": 7}, ["seed = 1, now 7"]),
        ({"batch_size": 9}, ["batch_size = 10, now 9"]),
        ({"epochs": 4}, ["epochs = 3, now 4"]),
        ({"width": 0.5}, ["width = 0.0625, now 0.5"]),
        ({"precision": "bfloat16"}, ["precision = 'float32', now 'bfloat16'"]),
        ({"lr": 0.2, "seed": 7}, ["lr = 0.1, now 0.2", "seed = 1, now 7"]),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v[0].split()[0],
)
def test_a_changed_setting_is_named_and_nothing_is_written(changes, said):
    begun()
    before = Path("checkpoints/first/run.json").read_bytes()
    with pytest.raises(RunError) as caught:
        begun(**changes)
    assert all(part.replace("'", "") in str(caught.value).replace("'", "") for part in said)
    assert os.path.abspath("checkpoints/first/run.json") in str(caught.value)
    assert "run_name" in str(caught.value)
    assert Path("checkpoints/first/run.json").read_bytes() == before
    assert begun(**changes, name="second").name == "second"


def test_other_images_are_named_whatever_they_are_called():
    begun()
    other = tiny_data(seed=9)
    with pytest.raises(RunError, match=rf"images = '\w{{16}}', now '{other.digest}'"):
        begun(other)
    moved = dataclasses.replace(tiny_data(), name="elsewhere")
    assert begun(moved, data="/another/folder").data["name"] == "noise"


def test_what_no_weight_depends_on_may_change():
    run = begun()
    changes = {"test_batch_size": 7, "cuda_graph": False, "data": "/moved"}
    assert begun(**changes).id == run.id
    opened = open_run().profile  # what the notebooks that follow work with
    assert {name: getattr(opened, name) for name in changes} == changes
    assert open_run().began == run.began


def test_a_lambda_may_be_added_and_the_run_is_then_another():
    run = begun(l1_lambdas=(0.0, 0.1))
    more = begun(l1_lambdas=(0.0, 0.1, 0.2))
    assert more.id != run.id and open_run() == more
    assert more.trained_file(0.1) == run.trained_file(0.1) and more.began == run.began


def test_adding_a_lambda_keeps_what_the_notebooks_after_it_decided():
    begun()
    decided = {"min_channels": 2, "finetune_epochs": 7}
    open_run(**decided)
    begun(l1_lambdas=(0.0, 0.1, 0.2))
    found = open_run().profile
    assert {name: getattr(found, name) for name in decided} == decided


def test_what_works_beside_the_notebooks_is_cut_as_it_asks_and_changes_nothing_for_them():
    run = begun()
    asked = profile(min_channels=2, finetune_epochs=7)
    assert begin(asked, tiny_data(), "cpu", remember=False) == dataclasses.replace(
        run, profile=asked
    )
    assert open_run() == run


def test_the_precision_is_decided_once(monkeypatch):
    hardware = iter([True, False])  # which is asked but once for each run
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": next(hardware)})
    assert begun(precision="auto").profile.precision == "bfloat16"
    assert begun(precision="auto").profile.precision == "bfloat16"
    assert open_run().profile.precision == "bfloat16"
    assert begun(precision="auto", name="second").profile.precision == "float32"


# --- opening -------------------------------------------------------------------------------------


def test_an_unknown_run_is_named_with_those_there_are():
    with pytest.raises(RunError, match=r"no run yet \(/.*last_run.txt is missing\)"):
        open_run()
    with pytest.raises(RunError, match=r"run_name = 'laptop': no such run \(there is none yet\)"):
        open_run("laptop")
    begun()
    begun(name="second")
    with pytest.raises(RunError, match=r"run_name = 'laptop': no such run .*first, second"):
        open_run("laptop")


def test_the_run_that_was_last_used_is_opened():
    begun()
    begun(name="second")
    assert open_run().name == "second"
    open_run("first")
    assert open_run().name == "first"


def test_two_labs_at_once_each_follow_their_own_last_run(monkeypatch, tmp_path):
    begun()
    monkeypatch.setenv("LAB_LAST_RUN", str(tmp_path / "mine.txt"))
    begun(name="second")
    assert open_run().name == "second"
    monkeypatch.delenv("LAB_LAST_RUN")
    assert open_run().name == "first"


def test_what_a_notebook_decides_reaches_those_after_it():
    begun()
    open_run(pruning_ratios=[0.3], min_channels=2)
    open_run(finetune_epochs=5, distillation=None)
    last = open_run()
    assert (last.profile.pruning_ratios, last.profile.min_channels) == ((0.3,), 2)
    assert (last.profile.finetune_epochs, last.profile.distillation) == (5, 0.5)
    assert last.id == begun().id  # the trained networks are the same
    assert "(0.3,)" in last.table("cut").to_string()
    with pytest.raises(ValueError, match=r"pruning_ratios = \[30\]"):
        open_run(pruning_ratios=[30])


@pytest.mark.parametrize("field", ["lr", "seed", "epochs", "l1_lambdas", "precision"])
def test_what_was_decided_in_training_is_not_decided_again(field):
    run = begun()
    with pytest.raises(RunError, match=rf"{field}: was decided when the run was trained"):
        open_run(**{field: getattr(run.profile, field)})


@pytest.mark.parametrize("damage", ["", "[]", "null", "{", '{"id": "0"}', b"\xff\xfe"])
def test_a_damaged_run_is_named_and_left_alone(damage):
    begun()
    file = Path("checkpoints/first/run.json")
    file.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    before = file.read_bytes()
    for read in (open_run, begun):
        with pytest.raises(RunError, match=r"/checkpoints/first/run\.json: not readable .*move"):
            read()
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"profile": {"lr": 0.3}}, "its id does not fit"),
        ({"data": {"digest": "0" * 16}}, "its id does not fit"),
        ({"profile": {"lr": "0.3"}}, "lr = '0.3'"),
        ({"profile": {"name": "second"}}, "of the run 'second'"),
    ],
)
def test_a_run_that_was_changed_by_hand_is_named(change, said):
    begun()
    changed = content()
    for part, values in change.items():
        changed[part] |= values
    Path("checkpoints/first/run.json").write_text(json.dumps(changed), "utf-8")
    with pytest.raises(RunError, match=rf"not readable \(.*{said}"):
        open_run("first")


# --- the same networks, cut in another way -------------------------------------------------------


def test_save_as_cuts_the_same_networks_and_leaves_the_run_as_it_was():
    run = begun()
    before = Path("checkpoints/first/run.json").read_bytes()
    cut = open_run("first", save_as="floor_2", min_channels=2)
    assert open_run() == cut and cut.profile.min_channels == 2
    assert cut.trained_file(0.1) == run.trained_file(0.1) and cut.id == run.id
    assert cut.checkpoints != run.checkpoints and cut.figures != run.figures
    assert Path("checkpoints/first/run.json").read_bytes() == before
    again = open_run(None, save_as="floor_2", min_channels=2)  # the notebook is run once more
    assert again == cut
    kept = open_run("floor_2", finetune_epochs=7)  # as the notebook after it decides
    assert open_run("first", save_as="floor_2") == kept
    cut = kept
    other = open_run(None, save_as="floor_1", min_channels=1)
    assert other.trained_in == "first" and open_run("floor_2") == cut
    assert "cuts the networks of the run first" in str(other)
    begun(l1_lambdas=(0.0, 0.1, 0.2))  # one λ more: it is still a run of the same networks
    assert open_run("first", save_as="floor_2").profile.l1_lambdas == (0.0, 0.1, 0.2)
    assert open_run(save_as="third").profile.min_channels == run.profile.min_channels
    with pytest.raises(RunError, match="the networks of the run first"):
        begun(name="floor_2", min_channels=2)
    Path("checkpoints/first").rename("elsewhere")
    with pytest.raises(RunError, match="'first': no such run"):
        open_run("floor_2", save_as="fourth")


def test_save_as_never_overwrites_a_run_of_other_networks():
    begun()
    begun(name="second", seed=7)
    open_run("second", save_as="second_cut")
    before = {p: p.read_bytes() for p in Path("checkpoints").rglob("run.json")}
    for taken in ("second", "second_cut"):
        with pytest.raises(RunError, match=f"save_as = '{taken}': a run of other networks"):
            open_run("first", save_as=taken)
    with pytest.raises(RunError, match="save_as = 'second'"):
        open_run("second_cut", save_as="second")
    assert before == {p: p.read_bytes() for p in Path("checkpoints").rglob("run.json")}
