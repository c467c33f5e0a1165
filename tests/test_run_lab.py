"""`make lab`, on notebooks of a line or two in place of the real ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from utils.results import NOTEBOOKS

ROOT = Path(__file__).resolve().parent.parent
BEGINS = """
import os, pathlib
name = {name}
pathlib.Path(os.environ["LAB_LAST_RUN"]).write_text(name + "\\n")
folder = pathlib.Path("figures", name)
folder.mkdir(parents=True, exist_ok=True)
folder.joinpath("results.json").write_text("{{}}")
"""
TELLS = """
told = {k: v for k, v in os.environ.items() if k.startswith("LAB_") and k != "LAB_LAST_RUN"}
print("told", sorted(told.items()))
"""
FOLLOWS = "import os; print('goes on with', open(os.environ['LAB_LAST_RUN']).read())"
BY_PROFILE = """
from utils.config import get_profile
profile = get_profile()
print(profile.data, profile.epochs)
"""


@pytest.fixture
def lab(tmp_path) -> Path:
    """A copy of the lab without its notebooks, in a folder whose name has a space and an ö."""
    root = tmp_path / "my söder lab"
    root.mkdir()
    for package in ("models", "utils", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    return root


def write(lab: Path, *notebooks: list[str]) -> None:
    for name, cells in zip(NOTEBOOKS, notebooks, strict=True):
        notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
        nbformat.write(notebook, lab / f"{name}.ipynb")


def make_lab(lab: Path, *arguments: str, cwd: Path | None = None, **environment: str):
    return subprocess.run(
        [sys.executable, "-m", "scripts.run_lab", *arguments],
        cwd=cwd or lab,
        env={**os.environ, "PYTHONPATH": str(lab), **environment},
        capture_output=True,
        text=True,
    )


def executed(folder: Path, name: str) -> list:
    return nbformat.read(folder / f"{name}.ipynb", as_version=4).cells


def test_a_run_name_typed_in_the_first_notebook_is_followed(lab):
    own_cell = "pass  # a student's own last cell, which prints nothing"
    first = [BEGINS.format(name="'typed'"), own_cell]
    write(lab, first, [FOLLOWS, own_cell], [FOLLOWS, "print('own')"])
    done = make_lab(lab, "--profile", "smoke")
    assert done.returncode == 0, done.stderr
    figures = lab / "figures" / "typed"
    assert {p.name for p in figures.iterdir()} == {
        *(f"{name}.ipynb" for name in NOTEBOOKS), "results.json", "README.md",
    }  # fmt: skip
    assert [p.name for p in (lab / "figures").iterdir()] == ["typed"]
    assert done.stdout.count("goes on with typed") == 2
    assert "pictures, results.json and README.md: figures/typed/" in done.stdout
    assert (lab / "checkpoints" / "last_run.txt").read_text() == "typed\n"  # for who opens one next
    assert [c.execution_count for c in executed(figures, NOTEBOOKS[2])] == [1, 2]


def test_a_cell_that_fails_is_named_and_the_executed_notebook_is_left(lab):
    fails = ["print('so far')", "raise ValueError('l1_lambda = -1: must be at least 0')", "1"]
    write(lab, [BEGINS.format(name="'begun'")], fails, ["print('never')"])
    done = make_lab(lab, "--profile", "smoke")
    assert done.returncode == 1 and "done in" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last == "vggprune.ipynb stopped: ValueError: l1_lambda = -1: must be at least 0"
    assert "so far" in done.stdout and "never" not in done.stdout
    cells = executed(lab / "figures" / "begun", "vggprune")
    assert [c.execution_count for c in cells] == [1, 2, None]
    assert cells[1].outputs[0].ename == "ValueError"
    assert not (lab / "figures" / "begun" / f"{NOTEBOOKS[2]}.ipynb").exists()
    assert f"The executed notebook: {lab}/figures/begun/vggprune.ipynb" in done.stdout


def test_what_is_typed_reaches_the_notebooks(lab, tmp_path):
    first = [BY_PROFILE, BEGINS.format(name="profile.name"), TELLS]
    write(lab, first, [FOLLOWS], [FOLLOWS])
    typed = {"LAB_DATA": "images", "LAB_EPOCHS": "3", "LAB_PROFILE": "smoke"}
    done = make_lab(lab, cwd=tmp_path, **typed)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/images 3\n" in done.stdout  # as seen from where it was typed
    assert (lab / "figures" / "smoke_images_3_epochs" / "README.md").exists()

    done = make_lab(lab, "--profile", "smoke", LAB_RUN="mine", LAB_PROFILE="laptop")
    assert done.returncode == 0, done.stderr
    assert "('LAB_PROFILE', 'smoke'), ('LAB_RUN', 'mine')" in done.stdout
    assert (lab / "figures" / "mine" / "README.md").exists()
