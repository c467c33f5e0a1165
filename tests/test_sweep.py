"""Sweeps: what is asked for is done once, whatever is killed; every number of a row has its place.

Most tests make their networks by hand (`by_hand`), with a different number at every place.
"""

import re
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from unittest.mock import MagicMock

import pandas as pd
import pytest
import torch
from killers import begun, jobs, work
from tiny import tiny_data

from models.vgg import VGG
from sweep import __main__ as sweep
from sweep import cluster, page, tasks
from utils.cost import macs
from utils.images.sources import load_data
from utils.pruning import plan_pruning, slim
from utils.run import lab, tuning
from utils.run.identity import Run, begin
from utils.run.workers import Killed, in_workers
from utils.sparsity import bn_layers
from utils.store import files
from utils.store.checkpoint import History
from utils.store.files import one_at_a_time
from utils.store.identity import weights_digest
from utils.training import DivergenceError, evaluate

FOLDER = Path("figures/smoke_sweep")
TABLE = FOLDER / "results.csv"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "load_data", lambda name: tiny_data())
    lab._loaded.cache_clear()


def in_here(call, jobs, *, workers):
    """in_workers, in this process."""
    for key, job in jobs.items():
        try:
            yield key, call(job)
        except Exception as error:
            yield key, error


def trained_by_hand(run: Run, data, l1_lambda: float) -> lab.Trained:
    """A network that nothing has trained, and the two epochs it is said to have had."""
    torch.manual_seed(run.profile.seed)
    model = VGG(run.profile.cfg, num_classes=len(data.classes)).eval()
    k = run.profile.seed + 100 * l1_lambda
    history = History([0.1, 0.01], [2.0, 1.0], [70 + k, 80 + k], [2.1, 1.1], [50 + k, 60 + k],
                      [0.11 + k / 100, 0.22 + k / 100])  # fmt: skip
    return lab.Trained(model, history)


def tuned_by_hand(run: Run, data, network: VGG) -> lab.Trained:
    k = run.profile.seed + 100 * run.profile.l1_lambdas[0] + len(str(network.cfg)) / 100
    return lab.Trained(network, History([0.1] * 2, [1.0] * 2, [9.0] * 2, [1.0] * 2, [8.0, 7.0 + k]))


@pytest.fixture
def by_hand(monkeypatch) -> list:
    """No training: hand-made networks and histories. What was trained is in the list."""
    trained = []

    def train(run: Run, data, l1_lambda: float) -> lab.Trained:
        trained.append((l1_lambda, run.profile.seed))
        return trained_by_hand(run, data, l1_lambda)

    set_by_hand(monkeypatch.setattr, train)
    return trained


def set_by_hand(set_attribute, train=trained_by_hand) -> None:
    set_attribute(sweep, "in_workers", in_here)
    set_attribute(lab, "train", train)
    set_attribute(
        lab, "trained_networks",
        lambda run, data: {k: trained_by_hand(run, data, k) for k in run.profile.l1_lambdas},
    )  # fmt: skip
    set_attribute(tuning, "finetune", tuned_by_hand)


def begin_runs(lambdas=(0.0,), ratios=(0.3, 0.5), seeds=(1,), **changes) -> list[Run]:
    tiny = {"depth": 11, "batch_size": 10, "epochs": 2, "finetune_epochs": 1}
    profiles = [replace(p, **tiny | changes) for p in sweep.plan("smoke", lambdas, ratios, seeds)]
    return [begin(profile, tiny_data(), "cpu", remember=False) for profile in profiles]


def make(*args, **options) -> list[Run]:
    """A sweep of `begin_runs(...)`."""
    runs = begin_runs(*args, **options)
    sweep.collect(tasks.planned(runs), 1, FOLDER)
    return runs


def table() -> pd.DataFrame:
    return pd.read_csv(TABLE).set_index(["l1_lambda", "pruning_ratio", "seed"])


def test_a_sweep_through_processes_gives_what_the_steps_give(monkeypatch):
    """The one real sweep; begun again after its training, it cuts in a process of its own."""
    monkeypatch.setenv("LAB_EPOCHS", "1")
    monkeypatch.setenv("LAB_RUN", "real")
    monkeypatch.setattr(sweep, "workers_for", lambda device: 1)
    monkeypatch.setattr(lab, "load_data", load_data)
    arguments = ["--profile", "smoke", "--lambdas", "0", "--ratios", "0.5", "--seeds", "7"]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "in_workers", in_here)
        patch.setattr(lab, "cut_on", lambda *cut: 1 / 0)
        sweep.main(arguments)
    results = Path("figures/real_sweep/results.csv")
    assert pd.read_csv(results)["reason"][1] == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(lab, "train", None)
    sweep.main(arguments)
    row = pd.read_csv(results).iloc[1]
    data = load_data("digits")
    made = begin(*sweep.plan("smoke", [0], [0.5], [7]), data, "cpu", remember=False)
    dense, history = lab.trained_networks(made, data)[0.0]
    assert row["trained_accuracy"] == history.test_accuracy[-1]
    cut = slim(dense, plan_pruning(dense, 0.5))
    assert row["raw_accuracy"] == evaluate(cut, data.plain_batches("test", 1000)).accuracy
    assert pd.isna(row["reason"]) == pd.notna(row["finetuned_accuracy"])
    assert not Path("checkpoints/last_run.txt").exists()  # the notebooks' own
    assert results.with_name("README.md").exists()


def test_each_number_is_in_its_column_and_of_the_last_epoch(by_hand, monkeypatch):
    """Seed 3, λ = 0.01: k = 4 in `trained_by_hand`."""
    (made,) = begin_runs(lambdas=(0.01,), ratios=(0.5,), seeds=(3,), min_channels=4)
    data = tiny_data()
    dense, _ = trained_by_hand(made, data, 0.01)
    plan = plan_pruning(dense, 0.5, min_channels=4)
    slimmed = lab.cut_on(made, data, dense, plan)
    accuracies = {weights_digest(slim(dense, plan)): 31.0, weights_digest(slimmed): 42.0}

    def by_network(network: VGG, batches) -> SimpleNamespace:
        assert torch.cat([labels for _, labels in batches]).equal(data.test_labels)
        return SimpleNamespace(accuracy=accuracies[weights_digest(network)])

    monkeypatch.setattr(tasks, "evaluate", by_network)
    sweep.collect(tasks.planned([made]), 1, FOLDER)
    assert by_hand == [(0.01, 3)]
    dense_row, cut_row = table().loc[(0.01, 0.0, 3)], table().loc[(0.01, 0.5, 3)]
    for row, network in ((dense_row, dense), (cut_row, slimmed)):
        assert row["trained_accuracy"] == 64 and row["sparsity"] == pytest.approx(0.26)
        assert row["parameters"] == sum(p.numel() for p in network.parameters())
        assert row["macs"] == macs(network)
    assert dense_row["realised_ratio"] == 0 and dense_row["raw_accuracy":].isna().all()
    assert cut_row["realised_ratio"] == pytest.approx(1 - plan.kept / plan.total)
    assert (cut_row["raw_accuracy"], cut_row["repaired_accuracy"]) == (31, 42)
    assert cut_row["finetuned_accuracy"] == pytest.approx(11 + len(str(plan.cfg)) / 100)
    assert table()["reason"].isna().all()


def handed_out(monkeypatch) -> list:
    """The cells that workers are given, a list for each time."""
    times = []

    def record(call, jobs, *, workers):
        times.append([*jobs])
        return in_here(call, jobs, workers=workers)

    monkeypatch.setattr(sweep, "in_workers", record)
    return times


def test_only_what_is_missing_is_handed_out(by_hand, monkeypatch):
    make(lambdas=(0.0,), ratios=(0.3,), seeds=(1,))
    given = handed_out(monkeypatch)
    make(lambdas=(0.0, 0.01), ratios=(0.3, 0.6), seeds=(1, 2))
    trained = [(0.01, 0.0, 1), (0.0, 0.0, 2), (0.01, 0.0, 2)]
    cuts = [(k, r, s) for s in (1, 2) for k in (0.0, 0.01) for r in (0.3, 0.6)]
    assert given == [trained, cuts[1:]]
    before = TABLE.read_bytes()
    make(lambdas=(0.0, 0.01), ratios=(0.3, 0.6), seeds=(1, 2))
    assert given[2:] == [[], []] and TABLE.read_bytes() == before
    assert by_hand == [(0.0, 1), (0.01, 1), (0.0, 2), (0.01, 2)]


@pytest.mark.parametrize(
    "changed",
    [{"finetune_lr": 0.3}, {"min_channels": 2}, {"lr": 0.3}, {"finetune_epochs": 3}, {"width": 0.1},
     {"precision": "bfloat16"}, {"data": "digest"}, {"l1_lambda": 0.1}, {"pruning_ratio": 0.6}],
    ids=str,
)  # fmt: skip
def test_a_row_of_another_task_is_not_taken(changed: dict):
    (made,) = begin_runs(ratios=(0.5,))
    task = tasks.Task(made, 0.0, 0.5)
    files.write_json(task.file, {"follows_from": task.follows_from, "row": {"macs": 1}})
    assert tasks.finished(task) == {"macs": 1}
    if "data" in changed:
        other = task._replace(run=replace(made, data=made.data | {"digest": "other"}))
    elif changed.keys() & {*task._fields}:
        other = task._replace(**changed)
    else:
        other = task._replace(run=replace(made, profile=replace(made.profile, **changed)))
    other.file.write_bytes(task.file.read_bytes())
    assert tasks.finished(other) is None


def test_ratios_that_keep_the_same_channels_share_a_network(by_hand):
    (made,) = make(ratios=(0.5, 0.50001))
    rows = table().loc[0.0].drop(0.0)
    assert (rows.iloc[0] == rows.iloc[1])["finetuned_accuracy"]
    assert len([*made.checkpoints.glob("cut_*")]) == 1


def test_a_task_that_another_worker_is_at_is_waited_for(monkeypatch, by_hand):
    """A worker of a killed sweep still holds the lock; when it lets go, its row is taken."""
    task = tasks.Task(begin_runs()[0], 0.0)
    row = tasks.do(task)
    monkeypatch.setattr(tasks, "_made", None)
    with ThreadPoolExecutor() as pool, one_at_a_time(task.file):
        waits = pool.submit(tasks.do, task)
        with pytest.raises(TimeoutError):
            waits.result(0.1)
    assert waits.result(60) == row


def test_a_training_that_diverges_is_a_row_and_the_others_go_on(by_hand, monkeypatch):
    def train(run: Run, data, l1_lambda: float) -> lab.Trained:
        if run.profile.seed == 1:
            raise DivergenceError("diverged in epoch 1")
        return trained_by_hand(run, data, l1_lambda)

    monkeypatch.setattr(lab, "train", train)
    given = handed_out(monkeypatch)
    make(ratios=(0.5,), seeds=(1, 2))
    reasons = table()["reason"].loc[0.0].to_dict()
    assert reasons.pop((0.0, 1)) == "diverged in epoch 1"
    assert all(pd.isna(reason) for reason in reasons.values()) and len(reasons) == 2
    make(ratios=(0.5,), seeds=(1, 2))  # it would diverge again: not tried again
    assert given == [[(0.0, 0.0, 1), (0.0, 0.0, 2)], [(0.0, 0.5, 2)], [], []]


def test_what_collapses_is_cut_but_not_fine_tuned(by_hand, monkeypatch):
    def collapsed(run: Run, data, l1_lambda: float) -> lab.Trained:
        trained = trained_by_hand(run, data, l1_lambda)
        for bn in bn_layers(trained.model):
            bn.weight.data.zero_()
        return trained

    monkeypatch.setattr(lab, "train", collapsed)
    monkeypatch.setattr(lab, "trained_networks", lambda run, _: {0.01: collapsed(run, _, 0.01)})
    monkeypatch.setattr(tuning, "finetune", None)
    make(lambdas=(0.01,), ratios=(0.5,))
    trained, cut = table()["reason"]
    assert trained.startswith("collapsed") and cut == trained
    assert table()[["raw_accuracy", "repaired_accuracy"]].iloc[1].notna().all()


@pytest.mark.parametrize(
    ("error", "reason", "tried_again"),
    [(MemoryError("no room"), "MemoryError: no room", True),
     (DivergenceError("diverged"), "diverged", False)],
)  # fmt: skip
def test_a_fine_tuning_that_fails(error, reason, tried_again, by_hand, monkeypatch):
    def fails(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "finetune", fails)
        (made,) = make(ratios=(0.5,))
    row = table().loc[(0.0, 0.5, 1)]
    assert row["reason"] == reason and pd.isna(row["finetuned_accuracy"])
    if not tried_again:  # what was measured is kept
        assert row[["macs", "raw_accuracy", "repaired_accuracy"]].notna().all()
    page.write_page(FOLDER, made)
    assert f"- λ = 0, seed 1, 50% pruned: {reason}" in (FOLDER / "README.md").read_text("utf-8")
    make(ratios=(0.5,))
    assert table()["finetuned_accuracy"].notna().sum() == tried_again


def test_images_that_changed_since_the_sweep_began_are_no_row(by_hand, monkeypatch):
    runs = begin_runs()
    monkeypatch.setattr(lab, "load_data", lambda name: tiny_data(seed=1))
    sweep.collect(tasks.planned(runs), 1, FOLDER)
    reason = table().loc[(0.0, 0.0, 1), "reason"]
    assert tiny_data().digest in reason and tiny_data(seed=1).digest in reason
    assert "put the former back" in reason
    assert not by_hand and not [*runs[0].checkpoints.glob("row_*")]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--profile", "fast"], "profile = 'fast'"),
        (["--lambdas", "-1"], "l1_lambdas = [-1.0]: -1.0 must be"),
        (["--ratios", "50"], "did you mean 0.5?"),
        (["--ratios", "0.99"], "min_channels = 1: must be lower for a pruning ratio of 0.99"),
        (["--seeds", "-1"], "seed = -1"),
    ],
)
def test_bad_input_is_named_before_anything_starts(arguments: list[str], named: str):
    with pytest.raises(SystemExit, match=r".") as error:
        sweep.main(["--profile", "smoke", *arguments])
    assert named in str(error.value)
    assert not list(Path().iterdir())


def test_a_cluster_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.setenv("LAB_CLUSTER", "tcp://here:8786")
    with pytest.raises(SystemExit, match=r"'tcp://here:8786': needs the package distributed"):
        sweep.main(["--profile", "smoke"])
    assert not list(Path().iterdir())


class Silent(BaseHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://127.0.0.1:{silent}", "no answer in 1 s"),
        ("tls://127.0.0.1:{web}", "ssl_context"),
        ("http://127.0.0.1:{web}", "unknown address scheme 'http'"),
        ("tcp://127.0.0.1:8787", "8787 is its dashboard's port"),
        ("tcp://127.0.0.1:9", "no scheduler to work with"),
    ],
)
def test_an_address_without_a_scheduler_is_one_line(address, said, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Silent) as web,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = address.format(web=web.server_port, silent=silent.getsockname()[1])
        monkeypatch.setenv("LAB_CLUSTER", address)
        with pytest.raises(SystemExit) as stopped:
            sweep.main(["--profile", "smoke"])
        web.shutdown()
    line = str(stopped.value)
    assert line.startswith(f"LAB_CLUSTER = {address!r}: ") and said in line
    assert "python -m dask scheduler" in line and "\n" not in line
    assert not list(Path().iterdir())


def test_two_dask_workers_reached_by_an_address(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    notes = tmp_path / "notes"
    notes.mkdir()
    with distributed.LocalCluster(processes=True, **options) as here:
        (worker, *_) = here.scheduler_info["workers"]
        with pytest.raises(ValueError, match="it is the address of a Worker"):
            cluster.cluster(worker).__enter__()
        with cluster.cluster(here.scheduler_address) as (pool, count):
            assert count == 2
            asked = jobs(notes, a="", b="", killed_once="kill once", killer="kill", fails="fail")
            found = dict(in_workers(work, asked, workers=pool))
    assert isinstance(found["killer"], Killed) and repr(found["fails"]) == "ValueError('no')"
    assert all(isinstance(found[name], tuple) for name in ("a", "b", "killed_once"))
    assert begun(notes)["killed_once"] >= 2  # what it lost with a worker, Dask does again


def test_workers_that_can_not_do_the_tasks_are_named():
    elsewhere = SimpleNamespace(
        run=lambda read, note, on_error: {"a": read(note), "b": FileNotFoundError("no note")},
        nthreads=lambda: {"a": 4, "b": 1},
    )
    said = cluster._wrong(elsewhere)
    assert "b does not work in this folder (no note)" in said and "a has 4 threads" in said
    assert "a does not" not in said and "b has" not in said
    none = SimpleNamespace(run=lambda *_, on_error: {}, nthreads=dict)
    assert cluster._wrong(none) == "no worker yet"


def test_the_forecast_by_hand(by_hand, monkeypatch):
    """3 trainings of 5 epochs, one done; 6 cuts of 2 epochs, two done; 4 workers; 30 s an epoch:
    5 epochs for the 2 trainings, 2 for the 4 cuts: 3.5 minutes."""
    options = {"ratios": (0.3, 0.5), "epochs": 5, "finetune_epochs": 2}
    make(seeds=(1,), **options)
    planned = tasks.planned(begin_runs(seeds=(1, 2, 3), **options))
    monkeypatch.setattr(sweep, "seconds_per_epoch", lambda *_: 30.0)
    said = sweep.forecast(planned, tiny_data(), 4)
    assert "at most 4 min with 4 worker(s)" in said
    assert "3 to train (1 done), 5 epochs each" in said
    assert "6 to cut (2 done), 2 epochs each" in said
    assert "at most 9 min with 1 worker(s)" in sweep.forecast(planned, tiny_data(), 1)


def test_the_bar_begins_with_what_is_done(by_hand, monkeypatch):
    monkeypatch.setattr(sweep, "tqdm", bar := MagicMock())
    make(seeds=(1,), ratios=(0.5,))
    make(seeds=(1, 2), ratios=(0.5,))
    begun = [(call.kwargs["total"], call.kwargs["initial"]) for call in bar.call_args_list]
    assert begun == [(2, 0), (4, 2)]
    assert bar.return_value.__enter__.return_value.update.call_count == 4


CELLS = [(k, ratio) for k in (0.0, 0.02) for ratio in (0.0, 0.5, 0.9)]
NUMBERS = dict(zip(CELLS, (  # three seeds of each
    (90.1, 91.4, 95.9), (80.2, 83.9, 81.3), (60.7, 66.1, 61.8),
    (88.8, 87.1, 82.3), (85.6, 86.7, 89.9), (70.4, 77.7, 71.2),
), strict=True))  # fmt: skip
MACS = dict(zip(NUMBERS, (9, 4, 1.5, 9, 3, 1), strict=True))


def rows_by_hand() -> list[dict]:
    (made,) = begin_runs(lambdas=(0.0, 0.02), ratios=(0.5, 0.9), seeds=(5,))
    rows = []
    for (l1_lambda, ratio), accuracies in reversed(NUMBERS.items()):
        for seed, accuracy in zip((4, 5, 6), accuracies, strict=True):
            run = replace(made, profile=replace(made.profile, seed=seed))
            task = tasks.Task(run, l1_lambda, ratio)
            trained = NUMBERS[l1_lambda, 0.0][seed - 4]
            row = {"trained_accuracy": trained, "sparsity": (trained - 80 + seed) / 100,
                   "macs": int(1e6 * MACS[l1_lambda, ratio]), "realised_ratio": ratio}  # fmt: skip
            if ratio:
                row |= {"raw_accuracy": accuracy - 50, "repaired_accuracy": accuracy - 20 - seed}
                row["finetuned_accuracy"] = accuracy
            rows.append(task.row(**row))
    return rows


def frame() -> pd.DataFrame:
    page.write_table(rows_by_hand(), TABLE)
    return page.read_table(TABLE)


def test_the_table_has_every_value_in_its_place_and_nothing_for_none():
    page.write_table(rows_by_hand(), TABLE)
    head, *lines = TABLE.read_text("utf-8").splitlines()
    assert head.split(",") == [*tasks.COLUMNS]
    assert lines[0] == "0.0,0.0,4,0.0,9000000,,0.14099999999999993,90.1,,,,"
    assert (
        lines[4] == "0.0,0.5,5,0.5,4000000,,0.16400000000000006,91.4,33.900000000000006,"
        "58.900000000000006,83.9,"
    )
    cells = [(float(k), float(r), int(s)) for k, r, s, *_ in (x.split(",") for x in lines)]
    assert cells == sorted(cells) and len(cells) == 18


def test_the_page_has_mean_and_deviation_of_each_cell():
    (made,) = begin_runs(lambdas=(0.0, 0.02), ratios=(0.5, 0.9), seeds=(5,))
    page.write_table(rows_by_hand(), TABLE)
    page.write_page(FOLDER, replace(made, profile=replace(made.profile, epochs=7)))
    shown = (FOLDER / "README.md").read_text("utf-8")
    for l1_lambda in (0.0, 0.02):
        (line,) = re.findall(rf"^\| {l1_lambda:g} +\|(.*)\|$", shown, re.M)
        cells = [NUMBERS[l1_lambda, ratio] for ratio in (0.0, 0.5, 0.9)]
        expected = [f"{mean(cell):.2f} ± {stdev(cell):.2f}" for cell in cells]
        assert [cell.strip() for cell in line.split("|")] == expected
    assert re.search(r"\| λ +\| +trained \| +50% pruned \| +90% pruned \|", shown)
    assert "noise, VGG-11 at width 0.0625, 7 + 1 epochs, 3 seeds, float32, last epoch." in shown
    pictures = {picture.name for picture in FOLDER.glob("*.png")}
    assert len(pictures) == 3 and all(f"({name})" in shown for name in pictures)


def test_a_cell_says_how_few_networks_it_has():
    rows = [r for r in rows_by_hand() if (r["l1_lambda"], r["pruning_ratio"]) != (0.0, 0.9)]
    lost, single = rows_by_hand()[0].copy(), rows_by_hand()[1].copy()
    lost.update(l1_lambda=0.0, finetuned_accuracy=None, reason="diverged")
    rows = [r for r in rows if r["l1_lambda"] == 0.0] + [lost]
    page.write_table(rows, TABLE)
    means = page._means(page.read_table(TABLE))
    assert means.loc["0", "90% pruned"] == "–"
    page.write_table([*rows, single | {"l1_lambda": 0.0}], TABLE)
    assert page._means(page.read_table(TABLE)).loc["0", "90% pruned"] == "77.70"


def bars(ax) -> dict[str, tuple]:
    """x, y and half the length of each error bar of the lines that have a label."""
    found = {}
    for container in ax.containers:
        line, _, (segments,) = container
        halves = [(end[1, 1] - end[0, 1]) / 2 for end in segments.get_segments()]
        found[container.get_label()] = ([*line.get_xdata()], [*line.get_ydata()], halves)
    return found


def over_seeds(x: list, values: list[tuple]) -> tuple:
    means, deviations = [mean(v) for v in values], [stdev(v) for v in values]
    return tuple(map(pytest.approx, (x, means, deviations)))


def test_accuracy_against_macs_shows_means_deviations_and_the_front():
    figure = page.accuracy_against_macs(frame(), "noise")
    (ax,) = figure.axes
    for k in (0.0, 0.02):
        cells = [(k, 0.0), (k, 0.5), (k, 0.9)]
        shown = over_seeds([MACS[c] for c in cells], [NUMBERS[c] for c in cells])
        assert bars(ax)[f"λ = {k:g}"] == shown
    (front,) = [line for line in ax.lines if line.get_label() == "Pareto front"]
    best = [(0.02, 0.9), (0.02, 0.5), (0.0, 0.0)]
    assert [*front.get_xdata()] == [MACS[cell] for cell in best]
    assert front.get_ydata() == pytest.approx([mean(NUMBERS[cell]) for cell in best])
    assert "noise" in ax.get_title() and "million" in ax.get_xlabel() and "%" in ax.get_ylabel()
    rows = frame().assign(reason=lambda t: t["l1_lambda"].map({0.0: None, 0.02: "collapsed"}))
    (ax,) = page.accuracy_against_macs(rows, "noise").axes
    assert "λ = 0.02" not in ax.get_legend_handles_labels()[1]


def test_accuracy_against_ratio_shows_each_step():
    figure = page.accuracy_against_ratio(frame(), "noise")
    steps = {"raw cut": lambda a, s: a - 50, "repaired": lambda a, s: a - 20 - s,
             "fine-tuned": lambda a, s: a}  # fmt: skip
    for ax, l1_lambda in zip(figure.axes, (0.0, 0.02), strict=True):
        assert ax.get_title() == f"λ = {l1_lambda:g}"
        cells = [NUMBERS[l1_lambda, ratio] for ratio in (0.5, 0.9)]
        for label, step in steps.items():
            values = [[*map(step, cell, (4, 5, 6))] for cell in cells]
            assert bars(ax)[label] == over_seeds([50, 90], values)
        (before,) = [line for line in ax.lines if line.get_label() == "before the cut"]
        assert before.get_ydata() == pytest.approx(2 * [mean(NUMBERS[l1_lambda, 0.0])])


def test_sparsity_against_lambda_shows_shares_as_percentages():
    (ax,) = page.sparsity_against_lambda(frame(), "noise").axes
    trained = [NUMBERS[k, 0.0] for k in (0.0, 0.02)]
    sparsity = [[a - 80 + s for a, s in zip(v, (4, 5, 6), strict=True)] for v in trained]
    assert bars(ax)["sparsity (% of the channels)"] == over_seeds([1, 2], sparsity)
    assert bars(ax)["test accuracy (%)"] == over_seeds([1, 2], trained)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "0.02"]


def test_the_picture_of_a_single_lambda_has_room_for_its_title_and_legend():
    rows = frame()
    figure = page.accuracy_against_ratio(rows[rows["l1_lambda"] == 0.0], "$5_to_$10")
    figure.draw_without_rendering()
    for part in (figure.texts[0], figure.legends[0]):
        box = part.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
