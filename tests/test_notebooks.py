"""The notebooks: run top to bottom, kept clean, short cells."""

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
from run_lab import NOTEBOOKS

from benchmarks.parity import compare
from utils.results import read, report

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
    for name in (*NOTEBOOKS, "run_lab.py", "requirements.txt", "models", "utils"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LAB_")}
    nobody = "http://127.0.0.1:9"  # what asks the network for anything fails
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), nobody)
    finished = subprocess.run(
        [sys.executable, "run_lab.py", "--profile", "smoke"],
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


def test_the_lab_runs_top_to_bottom_and_leaves_clean_executed_copies(lab):
    copy, _ = lab
    for name in NOTEBOOKS:
        assert is_one_clean_run(code_cells(copy / "figures" / "smoke" / name))


def test_every_picture_is_shown_and_saved(lab):
    copy, _ = lab
    folder = copy / "figures" / "smoke"
    assert {p.stem for p in folder.glob("*.png")} == PICTURES
    shown = sum(
        "image/png" in output.get("data", {})
        for name in NOTEBOOKS
        for cell in code_cells(folder / name)
        for output in cell.outputs
    )
    assert shown == len(PICTURES)  # each once


def test_every_number_is_recorded_with_profile_machine_and_command(lab):
    copy, printed = lab
    results = json.loads((copy / "figures" / "smoke" / "results.json").read_text("utf-8"))
    assert list(results) == [Path(name).stem for name in NOTEBOOKS]
    for section in results.values():
        assert section["profile"]["name"] == "smoke"
        assert section["machine"]["torch"]
        assert section["command"] == "make lab PROFILE=smoke"
    for row in results["train_prune_model"]["table"]:
        assert row["network"] in printed  # the final table is shown at the end


def test_a_second_run_trains_nothing_again(lab):
    copy, _ = lab
    before = {p: p.stat().st_mtime_ns for p in (copy / "checkpoints").rglob("trained_*.pt")}
    assert len(before) == 2
    again = subprocess.run(
        [sys.executable, "-c",
         "import run_lab; from pathlib import Path; "
         "run_lab.run('sparsity_train.ipynb', Path('again.ipynb'))"],
        cwd=copy, env={**os.environ, "LAB_PROFILE": "smoke"}, capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    assert "2 of 2 epochs were done before" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_are_empty_or_carry_one_clean_run(name):
    cells = code_cells(ROOT / name)
    empty = all(c.execution_count is None and not c.outputs for c in cells)
    assert empty or is_one_clean_run(cells)
    assert (ROOT / name).stat().st_size < 1_000_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_are_short(name):
    lines = [len(c.source.splitlines()) for c in code_cells(ROOT / name)]
    assert max(lines) <= 25
    assert statistics.median(lines) <= 16


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_formulas_are_not_escaped_twice(name):
    cells = nbformat.read(ROOT / name, as_version=4).cells
    assert not any("\\\\" in c.source for c in cells if c.cell_type == "markdown")


def test_all_notebooks_begin_with_the_same_setup():
    assert len({code_cells(ROOT / name)[0].source for name in NOTEBOOKS}) == 1


def test_a_notebook_started_elsewhere_says_where_to_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(FileNotFoundError, match="start Jupyter in it"):
        exec(code_cells(ROOT / NOTEBOOKS[0])[0].source, {})


def test_the_tables_of_the_readme_are_those_of_the_recorded_run():
    readme = (ROOT / "README.md").read_text("utf-8")
    quoted = re.findall(
        r"<!-- python -m utils.results (\S+) -->\n\n(.*?)\n\n<!-- end -->", readme, re.S
    )
    assert quoted
    for folder, tables in quoted:
        assert tables == report(ROOT / folder)


def test_the_speed_in_the_readme_is_that_of_the_recorded_benchmarks():
    readme = (ROOT / "README.md").read_text("utf-8")
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


def test_the_parity_in_the_readme_is_that_of_the_recorded_runs():
    readme = (ROOT / "README.md").read_text("utf-8")
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
    "sparsity_train": lambda found: [a for run in found["runs"] for a in run["test_accuracy"]],
    "vggprune": lambda found: [cut["raw cut"] for cut in found["cuts"]],
    "train_prune_model": lambda found: [h["test_accuracy"][-1] for h in found["finetuning"]],
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_shows_the_run_that_is_recorded_beside_its_pictures(name):
    outputs = [output for cell in code_cells(ROOT / name) for output in cell.outputs]
    if not outputs:
        pytest.skip("committed without outputs")
    printed = "".join(output.get("text", "") for output in outputs)
    folder = re.search(r"Saved: (figures/\S+)/\*\.png", printed).group(1)
    recorded = read(ROOT / folder)[Path(name).stem]
    assert str(recorded["machine"]) in printed
    for accuracy in ACCURACIES[Path(name).stem](recorded):
        assert f"{accuracy:.2f} %" in printed
