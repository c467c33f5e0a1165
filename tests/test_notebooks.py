"""The notebooks, run top to bottom and kept clean; what a page quotes is what was recorded."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from benchmarks import trials
from benchmarks.parity import compare
from utils.run.page import refresh, whole_page
from utils.run.results import NOTEBOOKS, read

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {
    "samples",
    "training_curves",
    "gamma_distributions",
    "sorted_gammas",
    "kept_channels",
    "ladder",
    "finetuning_curves",
    "summary",
}


def code_cells(path: Path) -> list:
    notebook = nbformat.read(path, as_version=4)
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def is_one_clean_run(cells: list) -> bool:
    counts = [c.execution_count for c in cells]
    failed = any(o.output_type == "error" for c in cells for o in c.outputs)
    return counts == list(range(1, len(cells) + 1)) and not failed


def run_in_a_fresh_copy(folder: Path) -> tuple[Path, str]:
    """Run the smoke profile in a copy of the lab: its place, and what it printed."""
    copy = folder / "my söder lab"  # a space and an ö
    copy.mkdir()
    for name in ("requirements.txt", "models", "utils", "coursework"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    for name in NOTEBOOKS:
        shutil.copy(ROOT / f"{name}.ipynb", copy)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LAB_")}
    nobody = "http://127.0.0.1:9"  # what asks the network for anything fails
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), nobody)
    environment["OMP_NUM_THREADS"] = "1"  # networks this small only wait for a second thread
    finished = subprocess.run(
        [sys.executable, "-m", "utils.run.notebooks", "--profile", "smoke"],
        cwd=copy, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return copy, finished.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run_in_a_fresh_copy(tmp_path_factory.mktemp("lab"))


@pytest.mark.reliability
def test_the_lab_runs_in_a_fresh_copy(lab, tmp_path_factory, times):
    """the three notebooks, top to bottom in a fresh copy"""
    for k in times(1, 20):
        if k > 0:  # the first is the one that the tests below look at
            run_in_a_fresh_copy(tmp_path_factory.mktemp("lab"))


def test_the_lab_leaves_clean_executed_copies_and_shows_and_saves_every_picture(lab):
    folder = lab[0] / "figures" / "smoke"
    executed = [code_cells(folder / f"{name}.ipynb") for name in NOTEBOOKS]
    assert all(map(is_one_clean_run, executed))
    saved = {p.stem for p in folder.glob("*.png")}
    assert saved >= PICTURES
    outputs = [output for cells in executed for cell in cells for output in cell.outputs]
    shown = sum("image/png" in output.get("data", {}) for output in outputs)
    assert shown >= len(saved)


def test_every_number_is_recorded_with_its_run_and_shown(lab):
    copy, printed = lab
    found = read(copy / "figures" / "smoke")
    run = json.loads((copy / "checkpoints" / "smoke" / "run.json").read_text("utf-8"))
    assert list(found) == [*NOTEBOOKS]
    for section in found.values():
        assert section["run"] == run["id"] and section["data"] == run["data"]["name"]
        assert section["profile"]["name"] == "smoke" and section["machine"]["torch"]
    assert whole_page(copy / "figures" / "smoke") in printed
    page = (copy / "figures" / "smoke" / "README.md").read_text("utf-8")
    assert whole_page(copy / "figures" / "smoke") in page


def test_the_network_that_smoke_cuts_was_trained_with_a_penalty(lab):
    cuts = read(lab[0] / "figures" / "smoke")["vggprune"]["cuts"]
    assert cuts and all(cut["l1_lambda"] > 0 for cut in cuts)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_are_empty_or_carry_one_clean_run(name):
    cells = code_cells(ROOT / f"{name}.ipynb")
    empty = all(c.execution_count is None and not c.outputs for c in cells)
    assert empty or is_one_clean_run(cells)
    assert (ROOT / f"{name}.ipynb").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_formulas_are_not_escaped_twice(name):
    cells = nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells
    assert not any("\\\\" in c.source for c in cells if c.cell_type == "markdown")


def test_all_notebooks_begin_with_the_same_setup():
    assert len({code_cells(ROOT / f"{name}.ipynb")[0].source for name in NOTEBOOKS}) == 1


def find_the_lab() -> list[Path]:
    """What the first cell finds, from the folder it is run in."""
    names: dict = {}
    exec(code_cells(ROOT / f"{NOTEBOOKS[0]}.ipynb")[0].source, names)
    return names["labs"]


def test_a_notebook_finds_the_lab_it_lies_in_or_says_where_to_put_it(tmp_path, monkeypatch):
    figures = tmp_path / "lab" / "figures" / "smoke"  # where an executed copy lies
    figures.mkdir(parents=True)
    (tmp_path / "lab" / "utils").mkdir()
    monkeypatch.chdir(figures)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # no Colab here
    with pytest.raises(AssertionError, match="put the whole lab there"):
        find_the_lab()
    shutil.copy(ROOT / "utils" / "step.py", tmp_path / "lab" / "utils")
    assert find_the_lab()[0] == tmp_path / "lab"


PAGES = ("README.md", "benchmarks/README.md", "tests/README.md", "docs/beside_the_report.md")


def skip_if_run_again(folder: str) -> None:
    """`make lab PROFILE=laptop` by a user writes where the published run's figures lie."""
    if [*ROOT.glob(f"checkpoints/{Path(folder).name}*/run.json")]:
        pytest.skip(f"{folder} is of a run made here, no longer the published one")


@pytest.mark.parametrize("page", PAGES)
def test_quoted_tables_are_those_of_the_recorded_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path(page).read_text("utf-8")
    for folder in re.findall(r"<!-- python -m \S+ (figures/\S+)", text):
        skip_if_run_again(folder)
    assert refresh(text) == text  # else: python -m utils.run.page PAGE


def test_the_speed_in_the_page_is_that_of_the_recorded_benchmarks():
    readme = (ROOT / "benchmarks/README.md").read_text("utf-8")
    files = sorted(ROOT.glob("benchmarks/train_speed_*.json"))
    assert files
    for file in files:
        recorded = json.loads(file.read_text("utf-8"))
        _, *slim = recorded["slim"]  # without the dense one
        cells = [
            f"{recorded['machine']['device']}: {recorded['engine']}",
            *(
                f"{row['times faster']:g} ({row['least']:g} – {row['most']:g})"
                for row in recorded["training"]
            ),
            *(f"{row['times faster']:g}" for row in slim),
        ]
        assert f"| {' | '.join(cells)} |" in readme
        fewer = " and ".join(f"{row['fewer MACs']:g}" for row in slim)
        assert f"they have {fewer} times fewer MACs" in readme


def test_the_trials_in_the_page_are_those_recorded():
    readme = (ROOT / "benchmarks/README.md").read_text("utf-8")
    files = sorted(ROOT.glob("benchmarks/trials_*.json"))
    assert files
    for file in files:
        table = trials.compare(pd.DataFrame(json.loads(file.read_text("utf-8"))["runs"]))
        for way, row in table.iterrows():
            reached = f"{row['accuracy (%)']:.1f} ± {row['± (standard deviation)']:.1f}"
            gain, errors = row["gain"], row["gain in standard errors"]
            compared = "|  |  |" if way == trials.BASE else f"| {gain:+.1f} | {errors:.1f} |"
            assert f"| {way} | {reached} {compared} {row['MACs (M)']:.2f} |" in readme


def test_the_latency_in_the_page_is_that_of_the_recorded_benchmark():
    readme = (ROOT / "benchmarks/README.md").read_text("utf-8")
    recorded = json.loads((ROOT / "benchmarks/latency_cpu.json").read_text("utf-8"))["latency"]
    times = {}
    for row in recorded:
        of = times.setdefault((row["network"], row["MACs (M)"]), {}).setdefault(row["form"], [])
        of.append(f"{row['times faster than dense eager float32']:g}")  # for 1, then for 256
    for (network, macs), forms in times.items():
        cells = [network, f"{macs:g}", *(" / ".join(both) for both in forms.values())]
        assert f"| {' | '.join(cells)} |" in readme


def test_the_parity_in_the_page_is_that_of_the_recorded_runs():
    readme = (ROOT / "benchmarks/README.md").read_text("utf-8")
    files = sorted(ROOT.glob("benchmarks/parity_*.json"))
    assert files
    for file in files:
        recorded = json.loads(file.read_text("utf-8"))
        cells = [recorded["profile"]]
        for precision in ("float32", "bfloat16"):
            runs = [r for r in recorded["runs"] if r["precision"] == precision]
            accuracies = [r["test accuracy (%)"] for r in runs]
            cells.append(f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}")
        assert f"| {' | '.join(cells)} |" in readme
        apart = compare(pd.DataFrame(recorded["runs"]).drop(columns="seed"))
        assert apart.loc["test accuracy (%)", ("standard errors apart", "")] <= 2


ACCURACIES = {
    "sparsity_train": lambda found: [run["test_accuracy"][-1] for run in found["runs"]],
    "vggprune": lambda found: [cut["raw cut"] for cut in found["cuts"]],
    "train_prune_model": lambda found: [h["test_accuracy"][-1] for h in found["finetuning"]],
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_shows_the_run_that_is_recorded_beside_its_pictures(name):
    outputs = [output for cell in code_cells(ROOT / f"{name}.ipynb") for output in cell.outputs]
    if not outputs:
        pytest.skip("committed without outputs")
    printed = "".join(output.get("text", "") for output in outputs)
    folder = re.search(r"Saved: (figures/\S+)/\*\.png", printed).group(1)
    skip_if_run_again(folder)
    recorded = read(ROOT / folder)[name]
    assert ", ".join(f"{k} {v}" for k, v in recorded["machine"].items()) in printed
    for accuracy in ACCURACIES[name](recorded):
        assert f"{accuracy:.2f} %" in printed
