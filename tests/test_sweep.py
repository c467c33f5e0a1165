"""Sweeps: what is asked for is done once, whatever is killed; what fails is a row."""

import functools
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from killers import Fake, die, fail
from processes import run
from tiny import tiny_data

from sweep import __main__ as sweep
from sweep import page, tasks, workers
from utils.images.data import ImageData
from utils.profile import Profile
from utils.pruning import plan_pruning, slim
from utils.run import lab
from utils.run.identity import Run, begin
from utils.store import checkpoint, files
from utils.store.files import file_lock
from utils.training import evaluate

FOLDER = Path("figures/smoke_sweep")
TABLE = FOLDER / "results.csv"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "load_data", lambda name: shades())
    tasks._images.cache_clear()


def shades() -> ImageData:
    """Noise, darker or brighter by its class: two epochs tell them apart."""
    noise = tiny_data(count=40)
    parts = {"classes": ("dark", "bright")}
    for split in ("train", "test"):
        labels = torch.arange(len(getattr(noise, f"{split}_labels"))) % 2
        images = getattr(noise, f"{split}_images") // 4 + 180 * labels[:, None, None, None]
        parts |= {f"{split}_labels": labels, f"{split}_images": images.to(torch.uint8)}
    return replace(noise, **parts)


def plan(lambdas=(0.0,), ratios=(0.3, 0.5), seeds=(1,), **changes) -> list[Profile]:
    tiny = {"depth": 11, "batch_size": 10, "epochs": 2, "finetune_epochs": 1}
    return [replace(p, **tiny, **changes) for p in sweep.plan("smoke", lambdas, ratios, seeds)]


def make(*args, **options) -> list[Run]:
    """A sweep of `plan(...)`, in this process."""
    runs = [begin(profile, shades(), "cpu", remember=False) for profile in plan(*args, **options)]
    sweep.collect(runs, functools.partial(map, tasks.do), FOLDER)
    return runs


def table() -> pd.DataFrame:
    return pd.read_csv(TABLE).set_index(["l1_lambda", "pruning_ratio", "seed"])


def test_a_row_is_what_the_stages_give():
    (made,) = make(lambdas=(0.0, 1e-3))
    data, profile = shades(), made.profile
    by_hand = begin(replace(profile, name="by_hand"), data, "cpu")
    dense, history = lab.train(by_hand, data, 1e-3)
    plan = plan_pruning(dense, 0.5, min_channels=profile.min_channels)
    cut = lab.cut_on(by_hand, data, dense, plan)
    row = table().loc[(1e-3, 0.5, 1)]
    accuracies = {
        "trained": history.test_accuracy[-1],
        "raw": evaluate(slim(dense, plan), data.plain_batches("test", 1000)).accuracy,
        "repaired": evaluate(cut, data.plain_batches("test", 1000)).accuracy,
        "finetuned": lab.finetune(by_hand, data, cut).history.test_accuracy[-1],
    }
    assert {name: row[f"{name}_accuracy"] for name in accuracies} == accuracies
    assert row["realised_ratio"] == plan.realised_ratio
    assert len(table()) == 2 * (1 + 2)


def test_only_what_is_missing_is_done(monkeypatch: pytest.MonkeyPatch):
    make(lambdas=(0.0,), seeds=(1,))
    trained = []
    train = lab.train
    monkeypatch.setattr(lab, "train", lambda *a: trained.append(a[2]) or train(*a))
    make(lambdas=(0.0, 1e-3), ratios=(0.3, 0.5, 0.6), seeds=(1,))
    assert trained == [1e-3]
    before = TABLE.read_bytes()
    monkeypatch.setattr(tasks, "_cut", None)
    make(lambdas=(0.0, 1e-3), ratios=(0.3, 0.5, 0.6), seeds=(1,))
    assert TABLE.read_bytes() == before
    assert not Path("checkpoints/last_run.txt").exists()  # the notebooks' own


def test_a_row_made_with_other_settings_is_made_anew():
    make(ratios=(0.5,))
    first = table()["finetuned_accuracy"].iloc[-1]
    make(ratios=(0.5,), finetune_lr=1e-9)
    assert table()["finetuned_accuracy"].iloc[-1] == table()["repaired_accuracy"].iloc[-1]
    make(ratios=(0.5,))
    assert table()["finetuned_accuracy"].iloc[-1] == first


def test_what_collapses_is_cut_but_not_fine_tuned():
    make(lambdas=(0.0, 1.0), ratios=(0.5,))
    trained, cut = table().loc[1.0]["reason"]
    assert trained.startswith("collapsed")
    assert cut == f"not fine-tuned: {trained}"
    assert table().loc[1.0]["finetuned_accuracy"].isna().all()
    assert table().loc[(1.0, 0.5, 1), ["raw_accuracy", "repaired_accuracy"]].notna().all()
    assert table().loc[0.0, "reason"].isna().all()


def test_what_diverges_is_a_row_and_the_others_go_on():
    make(lambdas=(0.0,), ratios=(0.5,), seeds=(1, 2), lr=1e30)
    trained, cut = table().loc[0.0].xs(1, level="seed")["reason"]
    assert "diverged in epoch 1" in trained and "lr = 1e+30" in trained
    assert cut == f"not trained: {trained}"
    assert len(table()) == 4


def test_a_fine_tuning_that_diverges_loses_nothing_that_was_measured():
    make(ratios=(0.5,), finetune_lr=1e30)
    row = table().loc[(0.0, 0.5, 1)]
    assert "diverged" in row["reason"] and np.isnan(row["finetuned_accuracy"])
    assert row[["macs", "raw_accuracy", "repaired_accuracy"]].notna().all()


def test_what_may_go_well_next_time_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    def full(*args, **options):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(lab, "finetune", full)
        made = make(ratios=(0.5,))
    assert table().loc[(0.0, 0.5, 1), "reason"] == "MemoryError: no room"
    page.write_page(FOLDER, made[0])
    said = "λ = 0, seed 1, 50% pruned: MemoryError: no room"
    assert said in (FOLDER / "README.md").read_text("utf-8")
    make(ratios=(0.5,))
    assert table().loc[(0.0, 0.5, 1)].notna()["finetuned_accuracy"]
    assert table()["reason"].isna().all()


def test_ratios_that_keep_the_same_channels_share_a_network():
    make(ratios=(0.5, 0.50001))
    rows = table().loc[0.0].drop(0.0)
    assert (rows.iloc[0] == rows.iloc[1])["finetuned_accuracy"]


def test_an_orphan_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """A worker of a killed sweep still holds the lock; when it lets go, its row is taken."""
    task = tasks.Task(begin(plan()[0], shades(), "cpu"), 0.0)
    row = tasks.do(task)
    monkeypatch.setattr(tasks, "_trained", None)
    orphans = file_lock(task.file).acquire()
    said = []

    class Stderr:
        def write(self, text: str) -> None:
            said.append(text)
            orphans.lock.release(force=True)

    monkeypatch.setattr("sys.stderr", Stderr())
    assert tasks.do(task) == row
    assert "waiting for it" in "".join(said)


# --- killed --------------------------------------------------------------------------------------


def sweep_and_die(folder: Path, writes: int, after: bool) -> None:
    """A sweep that is killed before or after it has written its `writes`-th file."""
    left, whole = writes, files.write_whole

    def write_whole(path: Path, content: bytes) -> None:
        nonlocal left
        left -= 1
        if left or after:
            whole(path, content)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    for module in (files, checkpoint, page):
        module.write_whole = write_whole
    tasks.load_data = lambda name: shades()
    make()


@pytest.mark.reliability
def test_killed_anywhere(tmp_path: Path, draw: random.Random, times):
    """A sweep killed at random moments and restarted: the same table, nothing finished redone"""
    make()
    for k in times(1, 50):
        folder, done, kills = tmp_path / f"killed_{k}", {}, 0
        folder.mkdir()
        while run(sweep_and_die, folder, draw.randint(2, 10), draw.random() < 0.5) < 0:
            kills += 1
            now = {f: f.stat().st_mtime_ns for f in folder.glob("checkpoints/*/row_*.json")}
            assert now | done == now
            done = now
        assert kills
        assert (folder / TABLE).read_bytes() == TABLE.read_bytes()


def test_a_task_that_kills_its_worker_each_time_is_a_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "GIVE_UP", 1)
    rows = workers.on_this_machine([Fake(0), Fake(1)], workers=2, call=die)
    assert {r["seed"]: r["reason"] for r in rows} == {0: workers.KILLED, 1: None}


def test_two_dask_workers_reached_by_an_address_and_one_of_them_killed(tmp_path: Path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(processes=True, **options) as cluster,
        workers.connect(cluster.scheduler_address) as client,
    ):
        assert workers.check_workers(client, cluster.scheduler_address) == 2
        call = functools.partial(die, once=tmp_path / "killed")
        rows = list(workers.on_cluster(client, [Fake(k) for k in range(6)], call))
        (failed,) = workers.on_cluster(client, [Fake(6)], fail)
    assert (tmp_path / "killed").exists()
    assert {r["seed"]: r["reason"] for r in rows} == dict.fromkeys(range(6))
    assert failed == Fake(6).row(reason="ValueError: no")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--profile", "fast"], "profile = 'fast'"),
        (["--lambdas", "-1"], "l1_lambdas = [-1.0]: -1.0 must be"),
        (["--lambdas", "nan"], "l1_lambdas"),
        (["--lambdas"], "l1_lambdas = []"),
        (["--ratios", "50"], "did you mean 0.5?"),
        (["--ratios", "1"], "pruning_ratios = [1.0]"),
        (["--ratios", "0"], "ratios: 0 is"),
        (
            ["--ratios", "0.99"],
            "min_channels = 1: must be lower for a pruning ratio of 0.99: it lets only 328 of 344 "
            "channels go, not 341",
        ),
        (["--seeds"], "seeds = []"),
        (["--seeds", "1", "1"], "seeds = [1, 1]"),
        (["--seeds", "-1"], "seed = -1"),
    ],
)
def test_bad_input_is_named_before_anything_starts(arguments: list[str], named: str):
    with pytest.raises(SystemExit, match=r".") as error:
        sweep.main(["--profile", "smoke", *arguments])
    assert named in str(error.value)
    assert not list(Path().iterdir())


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    monkeypatch.setenv("LAB_CLUSTER", "tcp://127.0.0.1:9")
    with pytest.raises(SystemExit, match=r"LAB_CLUSTER = 'tcp://127.0.0.1:9'"):
        sweep.main(["--profile", "smoke"])
    assert not list(Path().iterdir())


# --- what comes out ------------------------------------------------------------------------------


def test_the_pareto_front_is_what_none_beats_in_both():
    """λ = 0 has (macs, accuracy) = (1, 60), (4, 90), dense (9, 88); λ = 1 has (1, 50), (3, 95)."""
    points = [(0, 0, 9, 88), (0, 0.5, 4, 90), (0, 0.9, 1, 60), (1, 0.5, 3, 95), (1, 0.9, 1, 50)]
    rows = [
        dict.fromkeys(tasks.COLUMNS, np.nan)
        | {"l1_lambda": k, "pruning_ratio": r, "seed": s, "macs": 1e6 * m}
        | {"finetuned_accuracy" if r else "trained_accuracy": accuracy + s}
        for k, r, m, accuracy in points
        for s in (-1, 1)
    ]
    figure = page.accuracy_against_macs(pd.DataFrame(rows), "noise")
    (front,) = [line for line in figure.axes[0].lines if line.get_label() == "Pareto front"]
    assert [*zip(*front.get_data(), strict=True)] == [(1, 60), (3, 95)]


def test_the_page_shows_mean_and_deviation_and_every_picture():
    page.write_page(FOLDER, make(seeds=(1, 2))[0])
    shown = (FOLDER / "README.md").read_text("utf-8")
    values = table().loc[(0.0, 0.5), "finetuned_accuracy"]
    assert f"{values.mean():.2f} ± {values.std():.2f}" in shown
    assert all(f"({picture.name})" in shown for picture in FOLDER.glob("*.png"))


def test_the_picture_of_a_single_lambda_has_room_for_its_title_and_legend():
    one = pd.DataFrame({"l1_lambda": 0.001, "pruning_ratio": [0.0, 0.5], "trained_accuracy": 80.0,
                        "raw_accuracy": 10.0, "repaired_accuracy": 79.0,
                        "finetuned_accuracy": 81.0})  # fmt: skip
    figure = page.accuracy_against_ratio(one, "CIFAR-10")
    figure.draw_without_rendering()
    for part in (figure.texts[0], figure.legends[0]):
        box = part.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
