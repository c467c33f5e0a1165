"""`make lab`, on notebooks of a line or two in place of the real ones."""

import json
import os
import signal
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
    assert "All of it is in figures/typed/" in said
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
    typed = """
import os, signal, time
try:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    raise SystemError("saved")
"""
    write(lab, [BEGINS.format(name="'begun'"), typed], [], [])
    # What a shell starts in the background ignores this signal, and so would this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit, match=r"sparsity_train\.ipynb stopped: SystemError: saved"):
            make_lab(monkeypatch, "--profile", "smoke")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "The executed notebook:" in capsys.readouterr().out


SAYS = """
import sys, matplotlib, models
from matplotlib import pyplot as plt
print("runs", sys.executable, models.__file__, __debug__, plt.rcParams["text.usetex"])
plt.plot([1, 2])
plt.show()
"""


def test_what_the_shell_and_configuration_say_does_not_reach_the_notebooks(
    lab, tmp_path, monkeypatch, capsys
):
    (lab / "models").mkdir()
    (lab / "models" / "__init__.py").touch()
    other = tmp_path / "other project"
    (other / "models").mkdir(parents=True)
    (other / "models" / "__init__.py").write_text("raise SystemError('another project')")
    (other / "matplotlibrc").write_text("text.usetex: True")
    kernel = other / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "broken", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    startup = other / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("raise SystemError('a start-up file')")
    settings = {
        "MPLBACKEND": "agg", "MATPLOTLIBRC": other / "matplotlibrc", "JUPYTER_PATH": other,
        "PYTHONPATH": f"{other}{os.pathsep}{ROOT}", "IPYTHONDIR": other / "ipython",
        "PYTHONOPTIMIZE": "1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    write(lab, [BEGINS.format(name="'begun'"), SAYS], [], [])
    make_lab(monkeypatch, "--profile", "smoke")
    said = capsys.readouterr().out
    assert f"runs {sys.executable} {lab}/models/__init__.py True False" in said
    _, shown = executed(lab / "figures" / "begun", NOTEBOOKS[0])
    assert any("image/png" in output.get("data", {}) for output in shown.outputs)


def test_what_a_cell_prints_between_two_pictures_stays_between_them(lab, monkeypatch):
    shows = """
from IPython.display import Image, display
import base64
dot = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
                       "WjR9awAAAABJRU5ErkJggg==")
for name in ("first", "second"):
    display(Image(dot))
    print("half", end="\\r")
    print(name)
"""
    write(lab, [BEGINS.format(name="'begun'"), shows], [], [])
    make_lab(monkeypatch, "--profile", "smoke")
    _, cell = executed(lab / "figures" / "begun", NOTEBOOKS[0])
    kinds = [output.output_type for output in cell.outputs]
    assert kinds == ["display_data", "stream", "display_data", "stream"]
    assert [o.text.strip() for o in cell.outputs if "text" in o] == ["first", "second"]


def test_a_folder_that_can_not_be_written_to_is_a_line(lab, monkeypatch):
    write(lab, [BEGINS.format(name="'begun'")], [], [])
    (lab / "checkpoints").write_text("a file in the way")
    with pytest.raises(SystemExit, match=r"checkpoints.*could not be written"):
        make_lab(monkeypatch, "--profile", "smoke")
