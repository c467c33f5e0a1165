"""`make lab`, on notebooks of a line or two in place of the real ones."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from utils.run import notebooks
from utils.run.results import NOTEBOOKS

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
from utils.profile import get_profile
profile = get_profile()
print(profile.data, profile.epochs)
"""


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """The root of a lab without notebooks, in a folder whose name has a space and an ö."""
    root = tmp_path / "my söder lab"
    root.mkdir()
    monkeypatch.setattr(notebooks, "ROOT", root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernels find utils there
    monkeypatch.chdir(root)
    return root


def write(lab: Path, *notebooks: list[str]) -> None:
    for name, cells in zip(NOTEBOOKS, notebooks, strict=True):
        notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
        nbformat.write(notebook, lab / f"{name}.ipynb")


def make_lab(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run_lab", *arguments])
    notebooks.main()


def executed(folder: Path, name: str) -> list:
    return nbformat.read(folder / f"{name}.ipynb", as_version=4).cells


def test_a_run_name_typed_in_the_first_notebook_is_followed(lab, monkeypatch, capsys):
    own_cell = "pass  # a student's own last cell, which prints nothing"
    first = [BEGINS.format(name="'typed'"), own_cell]
    write(lab, first, [FOLLOWS, own_cell], [FOLLOWS, "print('own')"])
    make_lab(monkeypatch, "--profile", "smoke")
    figures = lab / "figures" / "typed"
    assert {p.name for p in figures.iterdir()} == {
        *(f"{name}.ipynb" for name in NOTEBOOKS), "results.json", "README.md",
    }  # fmt: skip
    assert [p.name for p in (lab / "figures").iterdir()] == ["typed"]
    said = capsys.readouterr().out
    assert said.count("goes on with typed") == 2
    assert "pictures, results.json and README.md: figures/typed/" in said
    assert (lab / "checkpoints" / "last_run.txt").read_text() == "typed\n"  # for who opens one next
    assert [c.execution_count for c in executed(figures, NOTEBOOKS[2])] == [1, 2]


def test_a_cell_that_fails_is_named_and_the_executed_notebook_is_left(lab, monkeypatch, capsys):
    fails = ["print('so far')", "raise ValueError('l1_lambda = -1: must be at least 0')", "1"]
    write(lab, [BEGINS.format(name="'begun'")], fails, ["print('never')"])
    with pytest.raises(SystemExit) as caught:
        make_lab(monkeypatch, "--profile", "smoke")
    assert caught.value.code == (
        "vggprune.ipynb stopped: ValueError: l1_lambda = -1: must be at least 0"
    )
    said = capsys.readouterr().out
    assert "so far" in said and "never" not in said and "done in" not in said
    cells = executed(lab / "figures" / "begun", "vggprune")
    assert [c.execution_count for c in cells] == [1, 2, None]
    assert cells[1].outputs[0].ename == "ValueError"
    assert not (lab / "figures" / "begun" / f"{NOTEBOOKS[2]}.ipynb").exists()
    assert f"The executed notebook: {lab}/figures/begun/vggprune.ipynb" in said


def test_what_is_typed_reaches_the_notebooks(lab, tmp_path, monkeypatch, capsys):
    first = [BY_PROFILE, BEGINS.format(name="profile.name"), TELLS]
    write(lab, first, [FOLLOWS], [FOLLOWS])
    for name, value in {"DATA": "images", "EPOCHS": "3", "PROFILE": "laptop"}.items():
        monkeypatch.setenv(f"LAB_{name}", value)
    monkeypatch.chdir(tmp_path)
    make_lab(monkeypatch, "--profile", "smoke")  # what is typed goes before the environment
    said = capsys.readouterr().out
    assert f"{tmp_path}/images 3\n" in said  # as seen from where it was typed
    assert "('LAB_PROFILE', 'smoke')" in said
    assert (lab / "figures" / "smoke_images_3_epochs" / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [
        ("LAB_PROFILE", "laptob", "did you mean laptop"),
        ("LAB_EPOCHS", "many", "LAB_EPOCHS = 'many'"),
    ],
)
def test_what_is_mistyped_is_named_in_a_line(lab, monkeypatch, name, typed, said):
    monkeypatch.setenv(name, typed)
    with pytest.raises(SystemExit, match=said):
        make_lab(monkeypatch)


def test_a_run_name_of_the_command_reaches_the_notebooks(lab, monkeypatch):
    monkeypatch.setenv("LAB_RUN", "mine")
    write(lab, [BEGINS.format(name="os.environ['LAB_RUN']")], [], [])
    make_lab(monkeypatch)
    assert (lab / "figures" / "mine" / "README.md").exists()


def test_ctrl_c_stops_the_cell_that_runs_as_the_stop_button_does(lab, monkeypatch, capsys):
    typed = "import os, signal, time; print('begun'); os.kill(os.getppid(), signal.SIGINT)"
    waits = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemError('saved')"
    write(lab, [BEGINS.format(name="'begun'"), typed + "\n" + waits], [], [])
    with pytest.raises(SystemExit, match=r"sparsity_train\.ipynb stopped: SystemError: saved"):
        make_lab(monkeypatch, "--profile", "smoke")
    assert "The executed notebook:" in capsys.readouterr().out
