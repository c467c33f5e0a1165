"""The student edition: empty, solved, and answered wrongly."""

import importlib.util
import re
import runpy
import subprocess
import sys

import pytest
import torch
from cells import changed, code, execute, find, imported, lab_cells

from coursework import blanks, student
from coursework.blanks import Wrong
from coursework.rubric import BLANKS, BY_HAND, POINTS
from models.vgg import VGG
from utils import pruning, sparsity
from utils.run.results import NOTEBOOKS

STUB = re.compile(r" *# YOUR CODE HERE\n *raise NotImplementedError\(\)\n?")
NUMBERS = range(1, len(BLANKS) + 1)


def solutions(name: str) -> list[str]:
    return [text for cell in lab_cells(name) for _, text in student.REGION.findall(cell)]


def answered(number: int, answer: str | None) -> list[str]:
    """The cells of the notebook with blank `number`, all solved but this one (None: left empty)."""
    name = BLANKS[number - 1].notebook
    numbers = [n for n in NUMBERS if BLANKS[n - 1].notebook == name]
    given = dict(zip(numbers, solutions(name), strict=True))
    if answer is not None:
        given[number] = answer
    left = iter(given.items())

    def fill(stub: re.Match) -> str:
        n, text = next(left)
        return stub[0] if n == number and answer is None else text

    return [STUB.sub(fill, source) for source in code(student.students_edition(name))]


def check(number: int, cells: list[str], monkeypatch) -> None:
    """Run the cell with blank `number`, then its check."""
    namespace = imported(cells, monkeypatch) | {"blanks": blanks}
    namespace["selfcheck"] = importlib.import_module("coursework.selfcheck")
    execute(find(cells, f"# Blank {number} of"), namespace)
    execute(find(cells, BLANKS[number - 1].check), namespace)


@pytest.fixture
def kept_aside(tmp_path, monkeypatch):
    """What `keep` writes goes to a folder of the test."""
    monkeypatch.setattr(blanks, "WRITTEN", tmp_path / "copy_channels.py")


@pytest.mark.parametrize("number", NUMBERS)
def test_an_empty_blank_is_named_by_its_number(number, monkeypatch):
    with pytest.raises((Wrong, NotImplementedError)) as stopped:
        check(number, answered(number, None), monkeypatch)
    said = stopped.value
    text = str(said) if isinstance(said, Wrong) else blanks.still_empty(said)
    assert text.startswith(f"Blank {number} of 7, {BLANKS[number - 1].name}")


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solutions_put_back_pass_every_check(number, monkeypatch, kept_aside, capsys):
    solution = [text for name in NOTEBOOKS for text in solutions(name)][number - 1]
    check(number, answered(number, solution), monkeypatch)
    assert f"✓ {BLANKS[number - 1].name}" in capsys.readouterr().out


@pytest.mark.parametrize("number", NUMBERS)
def test_the_teachers_solutions_pass_the_hidden_tests(number, monkeypatch, kept_aside):
    cells = code(student.teachers_edition(BLANKS[number - 1].notebook))
    check(number, cells, monkeypatch)


WRONG = [
    (1, "l1_lambdas = 1e-4\n", "must be a list"),
    (1, "l1_lambdas = [1e-4, 1e-2]\n", "0 is missing"),
    (1, "l1_lambdas = [0, -1e-4]\n", "negative"),
    (1, "l1_lambdas = [0.0]\n", "nothing to cut"),
    (2, "        bn.weight.grad -= l1_lambda * bn.weight.detach().sign()\n", "away from 0"),
    (2, "        bn.weight.grad += l1_lambda * bn.weight.detach()\n", "L2"),
    (2, "        bn.weight.grad += l1_lambda * bn.weight.detach().abs()\n", "is not |γ|"),
    (2, "        bn.weight.grad += l1_lambda\n", "sign is forgotten"),
    (2, "        bn.weight.grad += l1_lambda * bn.weight.detach().abs().sign()\n", "forgotten"),
    (2, "        bn.weight.grad = l1_lambda * bn.weight.detach().sign()\n", "on top of it"),
    (2, "        bn.weight.grad += bn.weight.detach().sign()\n", "λ is not in it"),
    (2, "        pass\n", "nothing was added"),
    (2, "        bn.bias.grad += l1_lambda * bn.bias.detach().sign()\n", "Only γ carries"),
    (3, "        out_idx = (~keep).nonzero().flatten()\n", "whose entry in cfg_mask is 0"),
    (3, "        out_idx = keep.nonzero().squeeze()\n", "one channel is left"),
    (3, "        out_idx = torch.arange(int(keep.sum()))\n", "holds the channels [0, 1"),
    (3, "        out_idx = kept.nonzero()\n", "NameError"),
    (4, "        new_bn.weight.data = bn.weight.data[out_idx].clone()\n", ".bias was not copied"),
    (4, "        new_bn.weight.data = new_bn.bias.data = bn.bias.data[out_idx]\n",
     "feature.1.weight holds numbers of feature.1.bias"),
    (4, "        new_bn.weight.data = bn.weight.data[in_idx].clone()\n", "holds the channels"),
    (5, "        new_bn.running_mean = bn.running_mean[out_idx].clone()\n",
     "feature.1.running_var was not copied"),
    (5, "        new_bn.running_mean = bn.running_mean[in_idx].clone()\n", "[0, 1, 2]"),
    (6, "    slimmed.classifier.weight.data = model.classifier.weight.data[in_idx]\n", "stops at"),
    (6, "    n = len(in_idx)\n    slimmed.classifier.weight.data = "
        "model.classifier.weight.data[:, :n]\n", "holds the columns"),
    (7, "    pass\n", "classifier.bias was not copied"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_which_line_and_why(number, answer, words, monkeypatch):
    with pytest.raises(Wrong) as stopped:
        check(number, answered(number, answer), monkeypatch)
    assert words in str(stopped.value)
    assert BLANKS[number - 1].name in str(stopped.value)


def test_a_blank_left_empty_reads_as_a_sentence_in_a_notebook(monkeypatch, capsys):
    shells = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    monkeypatch.chdir(student.ROOT)
    shell = shells.instance()
    shell.history_manager.enabled = False
    try:
        shell.run_cell("from coursework import blanks\nblanks.start()")
        done = shell.run_cell(find(answered(1, None), "# Blank 1 of"))
    finally:
        shells.clear_instance()
    said = capsys.readouterr().out
    assert not done.success  # the cells below do not run
    assert "Blank 1 of 7, λ (5 points) is still empty." in said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edition") / "student"
    student.write(folder)
    return folder


def load_from(folder, path: str):
    """A module of the student's folder, beside the lab's own of the same name."""
    spec = importlib.util.spec_from_file_location(f"students_{path[-9:-3]}", folder / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_solution_and_no_output_is_handed_out(folder):
    answers = [line.strip() for n in NOTEBOOKS for t in solutions(n) for line in t.split("\n")]
    texts = {p: p.read_text("utf-8") for p in folder.rglob("*") if p.suffix in (".py", ".ipynb")}
    assert not [p for p, text in texts.items() for a in filter(None, answers) if a in text]
    assert not [p for p, text in texts.items() if "SOLUTION" in text or "HIDDEN" in text]
    for name in NOTEBOOKS:
        notebook = student.nbformat.read(folder / f"{name}.ipynb", as_version=4)
        student.nbformat.validate(notebook)
        assert not any(c.outputs for c in notebook.cells if c.cell_type == "code")


def test_the_folder_runs_without_the_lab_around_it(folder):
    modules = "models.vgg, utils.run.lab, utils.plots, coursework.selfcheck, utils.run.notebooks"
    done = subprocess.run([sys.executable, "-c", f"import {modules}"], cwd=folder,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_penalty_that_is_handed_out_equals_the_lab_s(folder):
    found, wanted = VGG([4, "M", 3]), VGG([4, "M", 3])
    wanted.load_state_dict(found.state_dict())
    for model in (found, wanted):
        for k, bn in enumerate(sparsity.bn_layers(model)):
            bn.weight.data = torch.linspace(-1, 1, bn.num_features + k)[: bn.num_features]
            bn.weight.grad = torch.ones_like(bn.weight)
    load_from(folder, "utils/sparsity.py").add_l1_subgradient(found, 0.01)
    sparsity.add_l1_subgradient(wanted, 0.01)
    for one, other in zip(sparsity.bn_layers(found), sparsity.bn_layers(wanted), strict=True):
        assert torch.equal(one.weight.grad, other.weight.grad)


def test_slim_runs_what_the_student_wrote(folder, monkeypatch, kept_aside):
    handed_out = load_from(folder, "utils/pruning.py")
    model = VGG([5, "M", 6]).eval()
    for bn in sparsity.bn_layers(model):
        bn.weight.data = torch.randn(bn.num_features)
    plan = pruning.plan_pruning(model, 0.5)
    with pytest.raises(blanks.RunError, match=r"run vggprune\.ipynb"):
        handed_out.slim(model, plan)

    check(7, answered(7, solutions("vggprune")[-1]), monkeypatch)
    images = torch.randn(2, 3, 8, 8)
    wanted = pruning.slim(model, plan)(images)
    torch.testing.assert_close(handed_out.slim(model, plan)(images), wanted)

    written = blanks.WRITTEN.read_text("utf-8")
    blanks.WRITTEN.write_text(changed(written, "classifier.bias.data.clone()",
                                      "classifier.bias.data + 1"), "utf-8")  # fmt: skip
    torch.testing.assert_close(handed_out.slim(model, plan)(images), wanted + 1)


def test_what_the_students_function_needs_must_stand_inside_it(tmp_path, monkeypatch, kept_aside):
    cell = tmp_path / "cell.py"
    cell.write_text("import operator\n\n\ndef copy_channels(model, cfg, cfg_mask):\n"
                    "    return operator.pos(model)\n")  # fmt: skip
    elsewhere = runpy.run_path(str(cell))["copy_channels"]
    with pytest.raises(Wrong, match=r"name 'operator' is not defined.* inside the function"):
        blanks.keep(elsewhere)


def test_a_folder_that_holds_work_is_left_alone(folder, tmp_path):
    (tmp_path / "work.ipynb").write_text("mine", "utf-8")
    with pytest.raises(SystemExit, match="is there already"):
        student.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["work.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nbgrader_makes_the_same_release_of_the_teachers_edition(name):
    preprocessors = pytest.importorskip("nbgrader.preprocessors")
    formats = pytest.importorskip("nbgrader.nbgraderformat")
    released = student.teachers_edition(name)
    formats.MetadataValidator().validate_nb(released)
    for step in ("ClearSolutions", "ClearHiddenTests", "CheckCellMetadata"):
        released, _ = getattr(preprocessors, step)().preprocess(released, {})
    assert code(released) == code(student.students_edition(name))


def test_the_points_that_nbgrader_counts_are_those_of_the_rubric():
    cells = [c for name in NOTEBOOKS for c in student.teachers_edition(name).cells]
    points = [c.metadata.get("nbgrader", {}).get("points", 0) for c in cells]
    assert sum(points) == 100 == POINTS * len(BLANKS) + sum(p for p, _ in BY_HAND.values())
