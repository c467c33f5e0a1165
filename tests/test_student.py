"""The student edition: empty, solved, and answered wrongly."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from cells import ROOT, changed, code, execute, find, lab_cells

from coursework import selfcheck, student
from coursework.blanks import BLANKS, GRADED
from coursework.selfcheck import Wrong
from models.vgg import VGG
from utils import pruning, sparsity
from utils.run.results import NOTEBOOKS

STUB = re.compile(r" *# YOUR CODE HERE\n *raise NotImplementedError\(\)(?:\n|$)")
NUMBERS = range(1, len(BLANKS) + 1)


def solutions(name: str) -> list[str]:
    return [text for cell in lab_cells(name) for _, text in student.REGION.findall(cell)]


@cache
def edition(name: str) -> list[str]:
    return code(student.students_edition(name))


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

    return [STUB.sub(fill, source) for source in edition(name)]


def namespace(cells: list[str], used_by: str) -> dict:
    """What a notebook's imports leave for one of its cells, and the device."""
    names = {node.id for node in ast.walk(ast.parse(used_by)) if isinstance(node, ast.Name)}
    space = {"__name__": "__main__", "device": torch.device("cpu"), "selfcheck": selfcheck}
    for node in ast.parse(find(cells, "set_up(")).body:
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if (alias.asname or alias.name) in names:
                exec(ast.unparse(ast.Module([node], [])), space)
    return space


def check(number: int, cells: list[str]) -> None:
    """Run the cell with blank `number`, then its check."""
    source = find(cells, f"# Blank {number} of")
    space = execute(source, namespace(cells, source))
    execute(find(cells, BLANKS[number - 1].check), space)


@pytest.fixture(autouse=True)
def kept_aside(tmp_path, monkeypatch):
    """What `keep` writes goes to a folder of the test."""
    monkeypatch.setattr(selfcheck, "WRITTEN", tmp_path / "copy_channels.py")


@pytest.mark.parametrize("number", NUMBERS)
def test_an_empty_blank_is_named_by_its_number(number):
    with pytest.raises((Wrong, NotImplementedError)) as stopped:
        check(number, answered(number, None))
    said = stopped.value
    text = str(said) if isinstance(said, Wrong) else selfcheck.still_empty(said)
    assert text.startswith(f"Blank {number} of 7, {BLANKS[number - 1].name} (5 points) is still")


def test_the_course_s_λ_and_the_solutions_put_back_pass_every_check(capsys):
    check(1, answered(1, "l1_lambdas = [0, 1e-4, 1e-2]\n"))
    for number in NUMBERS[1:]:
        solution = [text for name in NOTEBOOKS for text in solutions(name)][number - 1]
        check(number, answered(number, solution))
    said = capsys.readouterr().out
    names = [blank.name for blank in BLANKS]
    assert re.findall(r"✓ ([^:\n]*)", said) == names + names[2:]  # what is kept is checked anew
    assert said.endswith("copy_channels.py: your function, for what follows\n")


def test_the_teachers_solutions_pass_the_hidden_tests():
    for number in NUMBERS:
        cells = code(student.teachers_edition(BLANKS[number - 1].notebook))
        assert ("seed=2026" in find(cells, BLANKS[number - 1].check)) == (number > 1)
        check(number, cells)


WRONG = [
    (1, "l1_lambdas = None\n", "must be a list of numbers"),
    (1, "l1_lambdas = 1e-4\n", "must be a list"),
    (1, "l1_lambdas = [1e-4, 1e-3, 1e-2]\n", "0 is missing"),
    (1, "l1_lambdas = [0, -1e-4, 1e-2]\n", "-0.0001 is no λ. A negative"),
    (1, "l1_lambdas = [0, float('nan'), 1e-2]\n", "nan is no λ"),
    (1, "l1_lambdas = [0, '1e-4', 1e-2]\n", "'1e-4' is no λ"),
    (1, "l1_lambdas = [0, True, 1e-2]\n", "True is no λ"),
    (1, "l1_lambdas = [0, 1e-4, 10**400]\n", "too strong"),
    (1, "l1_lambdas = [0, 1e-4, 1.0]\n", "too strong"),
    (1, "l1_lambdas = [0.0]\n", "two above 0"),
    (1, "l1_lambdas = [0, 1e-4, 0.0001]\n", "there twice"),
    (1, "l1_lambdas = [0, 1e-4]\n", "two above 0"),
    (2, "        bn.weight.grad -= l1_lambda * bn.weight.detach().sign()\n", "away from 0"),
    (2, "        bn.weight.grad += l1_lambda * bn.weight.detach()\n", "L2"),
    (2, "        bn.weight.grad += l1_lambda * bn.weight.detach().abs()\n", "is not |γ|"),
    (2, "        bn.weight.grad += l1_lambda\n", "sign is forgotten"),
    (2, "        bn.weight.grad += l1_lambda * bn.weight.detach().abs().sign()\n", "forgotten"),
    (2, "        bn.weight.grad = l1_lambda * bn.weight.detach().sign()\n", "on top of it"),
    (2, "        bn.weight.grad += bn.weight.detach().sign()\n", "λ is not in it"),
    (2, "        bn.weight.grad += 0.01 * bn.weight.detach().sign()\n", "what autograd finds"),
    (2, "        bn.weight.grad += l1_lambda * (2.0 * (bn.weight.detach() >= 0) - 1)\n",
     "what autograd finds"),
    (2, "        pass\n", "nothing was added"),
    (2, "        bn.weight.grad += float('nan')\n", "what autograd finds"),
    (2, "        bn.weight.grad += float('inf') * bn.weight.detach()\n", "what autograd finds"),
    (2, "        bn.weight.grad = None\n", "can't be checked"),
    (2, "        bn.weight.grad = [l1_lambda]\n", "stops at\nbn.weight.grad = [l1_lambda]"),
    (2, "        bn.bias.grad += l1_lambda * bn.bias.detach().sign()\n", "Only γ carries"),
    (2, "        bn.weight.data -= 0.1 * l1_lambda\n", "feature.1.weight. Only γ carries"),
    (2, "        bn.running_var.zero_()\n", "feature.1.running_var. Only γ"),
    (2, "        model.classifier.weight.data *= 2\n", "classifier.weight. Only γ"),
    (2, "        model.classifier.bias.grad = None\n", "classifier.bias.grad. Only γ"),
    (3, "        out_idx = (~keep).nonzero().flatten()\n", "whose entry in cfg_mask is 0"),
    (3, "        out_idx = keep.nonzero().squeeze()\n", "stops at"),
    (3, "        out_idx = torch.arange(int(keep.sum()))\n", "holds the channels [0, 1"),
    (3, "        out_idx = keep.nonzero().flatten().flip(0)\n", "holds the channels"),
    (3, "        out_idx = kept.nonzero()\n", "NameError"),
    (3, "        out_idx = keep.nonzero().flatten()[:0]\n", "holds the channels []"),
    (3, "        out_idx = keep.nonzero().flatten() + 9\n", "stops at"),
    (3, "        out_idx = None\n", "holds the channels"),
    (3, "        out_idx = keep.nonzero().flatten()\n        keep[:] = True\n", "cfg_mask[0]"),
    (3, "        out_idx = keep.nonzero().flatten()\n        conv.weight.data[0] = 0\n",
     "the dense network was changed, too: feature.0.weight"),
    (4, "        new_bn.weight.data = bn.weight.data[out_idx].clone()\n", ".bias was not copied"),
    (4, "        new_bn.weight.data = new_bn.bias.data = bn.bias.data[out_idx]\n",
     "feature.1.weight holds numbers of feature.1.bias"),
    (4, "        new_bn.weight.data = bn.weight.data[in_idx].clone()\n", "holds the channels"),
    (4, "        new_bn.weight.data = 100 * bn.weight.data[out_idx]\n", "has nowhere"),
    (4, "        new_bn.weight.data = bn.weight.data[out_idx] + 1\n", "has nowhere"),
    (4, "        new_bn.weight.data = bn.weight.data[out_idx] * float('nan')\n", "holds nan"),
    (4, "        new_bn.weight.data = bn.weight.data[out_idx] / 0\n", "holds inf"),
    (4, "        new_bn.weight = None\n", "can't be checked"),
    (4, "        new_bn.weight.data = bn.weight.data[out_idx].tolist()\n", "stops at"),
    (5, "        new_bn.running_mean = bn.running_mean[out_idx].clone()\n",
     "feature.1.running_var was not copied"),
    (5, "        new_bn.running_mean = bn.running_mean[in_idx].clone()\n", "[0, 1, 2]"),
    (5, "        new_bn.running_mean = bn.running_mean[out_idx].double()\n", "is torch.float64"),
    (5, "        new_bn.running_mean = bn.running_mean[out_idx].to('meta')\n", "32 on meta, in"),
    (5, "        new_bn.running_mean = bn.running_mean[out_idx, None]\n", "(3, 1), not (3,)"),
    (5, "        new_bn.running_mean = bn.running_mean[out_idx].repeat(2)\n", "the shape (6,)"),
    (6, "    weight = model.classifier.weight.data[:, in_idx]\n    weight[1] = weight[1].flip(0)\n"
        "    slimmed.classifier.weight.data = weight\n", "in another order"),
    (6, "    slimmed.classifier.weight.data = model.classifier.weight.data[in_idx]\n", "stops at"),
    (6, "    n = len(in_idx)\n    slimmed.classifier.weight.data = "
        "model.classifier.weight.data[:, :n]\n", "holds the columns"),
    (7, "    pass\n", "classifier.bias was not copied"),
    (7, "    slimmed.classifier.bias.data = model.classifier.bias.data\n", ".clone()"),
    (7, "    slimmed.classifier.bias.data = model.classifier.bias.data.clone()\n"
        "    model.classifier.bias = None\n", "was changed, too: classifier.bias"),
    (7, "    return None\n", "must return the slim network, not None"),
    (7, "    return model\n", "linear bias"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "words"), WRONG)
def test_a_wrong_answer_is_told_which_line_and_why(number, answer, words):
    with pytest.raises(Wrong) as stopped:
        check(number, answered(number, answer))
    assert words in str(stopped.value)
    assert BLANKS[number - 1].name in str(stopped.value)
    if "was not copied" in words:
        assert str(stopped.value).endswith(BLANKS[number - 1].why)


def test_what_changes_after_its_own_check_is_not_kept():
    right = solutions("vggprune")[-1]
    with pytest.raises(Wrong, match=r"BN weight and bias: feature.1.bias holds"):
        check(7, answered(7, right + "    slimmed.feature[1].bias.data *= 2\n"))
    assert not selfcheck.WRITTEN.exists()


def test_what_the_students_function_needs_must_stand_inside_it(tmp_path):
    cell = tmp_path / "cell.py"
    cell.write_text("import operator\n\n\ndef copy_channels(model, cfg, cfg_mask):\n"
                    "    return operator.pos(model)\n")  # fmt: skip
    elsewhere = runpy.run_path(str(cell))["copy_channels"]
    with pytest.raises(Wrong, match=r"(?s)inside the function.* name 'operator' is not defined"):
        selfcheck.keep(elsewhere)
    assert not selfcheck.WRITTEN.exists()


def test_a_blank_left_empty_reads_as_a_sentence_in_a_notebook(monkeypatch, capsys):
    shells = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    monkeypatch.chdir(ROOT)
    shell = shells.instance()
    shell.history_manager.enabled = False
    try:
        shell.run_cell("from coursework import selfcheck\nselfcheck.start()")
        done = shell.run_cell(find(answered(1, None), "# Blank 1 of"))
        said = capsys.readouterr().out
        shell.run_cell("from utils.run.identity import RunError\nraise RunError('run 1 first')")
        first = capsys.readouterr().out
        shell.run_cell("raise NotImplementedError('of another kind')")
        other = capsys.readouterr().out
    finally:
        shells.clear_instance()
    assert not done.success  # the cells below do not run
    assert "Blank 1 of 7, λ (5 points) is still empty." in said
    assert first.strip().endswith("run 1 first")
    assert "Traceback" not in said + first
    assert "of another kind" in other and "still empty" not in other


def test_what_a_notebook_showed_is_not_handed_out(tmp_path, monkeypatch):
    shown = student.nbformat.read(ROOT / "sparsity_train.ipynb", as_version=4)
    for cell in [cell for cell in shown.cells if cell.cell_type == "code"]:
        cell.outputs = [student.nbformat.v4.new_output("stream", text="shown")]
    student.nbformat.write(shown, tmp_path / "sparsity_train.ipynb")
    monkeypatch.setattr(student, "ROOT", tmp_path)
    cells = student.students_edition("sparsity_train").cells
    assert not [cell for cell in cells if cell.get("outputs")]


def test_a_notebook_and_the_table_must_agree(monkeypatch):
    monkeypatch.setattr(student, "BLANKS", BLANKS[1:])
    with pytest.raises(ValueError, match=r"sparsity_train.ipynb has 2 solutions, .* 1 blanks"):
        student.teachers_edition("sparsity_train")


# --- the folder that is handed out ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edition") / "Bob's lab 100% a b"
    student.write(folder)
    return folder


@cache
def trees(folder: Path) -> dict[str, ast.Module]:
    """Every module and every notebook that is handed out, parsed."""
    sources = {p.relative_to(folder): p.read_text("utf-8") for p in folder.rglob("*.py")}
    for name in NOTEBOOKS:
        cells = code(student.nbformat.read(folder / f"{name}.ipynb", as_version=4))
        sources[Path(name)] = re.sub(r"^( *)[%!].*", r"\1pass", "\n".join(cells), flags=re.M)
    return {path.as_posix(): ast.parse(source) for path, source in sources.items()}


def shape(node: ast.AST) -> str:
    """How a statement or an expression reads if every variable had the same name."""
    return re.sub(r"id='\w+'", "id", ast.dump(node))


def test_no_solution_and_no_output_is_handed_out(folder):
    lines = [line for name in NOTEBOOKS for text in solutions(name)
             for line in ast.parse(student.textwrap.dedent(text)).body
             if not isinstance(line.value, ast.Constant)]  # fmt: skip
    answers = {shape(line) for line in lines} | {shape(line.value) for line in lines}
    given_away = []
    for path, tree in trees(folder).items():
        for node in ast.walk(tree):
            value = getattr(node, "value", None)
            looked_at = [node] if isinstance(node, ast.Assign | ast.AugAssign) else []
            looked_at += [value] if isinstance(value, ast.Call | ast.BinOp) else []
            if any(shape(part) in answers for part in looked_at):
                given_away.append(f"{path}: {ast.unparse(node)}")
            if re.search("(^|_)sign$", getattr(node, "attr", "")):  # λ·sign(γ) by another name
                given_away.append(f"{path}: {ast.unparse(node)}")
    assert len(lines) >= 7 and not given_away
    for name in NOTEBOOKS:
        text = (folder / f"{name}.ipynb").read_text("utf-8")
        notebook = student.nbformat.reads(text, as_version=4)
        student.nbformat.validate(notebook)
        cells = [c for c in notebook.cells if c.cell_type == "code"]
        assert not any(c.outputs or c.execution_count for c in cells)
        assert "SOLUTION" not in text and "HIDDEN" not in text and "2026" not in text


def test_every_file_that_an_import_or_a_command_reads_is_handed_out(folder):
    def parts(node: ast.AST) -> list[str]:
        """Of ROOT / "docs" / f"report_{language}.md": docs, report_*.md."""
        if isinstance(node, ast.BinOp):
            return [*parts(node.left), *parts(node.right)]
        if isinstance(node, ast.JoinedStr):
            return ["".join(getattr(v, "value", "*") if isinstance(v, ast.Constant) else "*"
                            for v in node.values)]  # fmt: skip
        return {"Constant": lambda: [node.value], "Name": lambda: []}[type(node).__name__]()

    def exists(root: Path, module: str) -> bool:
        path = root.joinpath(*module.split("."))
        return path.with_suffix(".py").exists() or (path / "__init__.py").exists()

    wanted, read, missing = set(), set(), []
    for tree in trees(folder).values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                wanted |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.BinOp) and "ROOT / 'docs' / " in ast.unparse(node):
                read |= {p.relative_to(ROOT) for p in ROOT.glob("/".join(parts(node)))}
    missing = [name for name in wanted if exists(ROOT, name) and not exists(folder, name)]
    assert not missing
    assert len(read) >= 3 and not [path for path in read if not (folder / path).exists()]


def test_makefile_and_readme_name_only_what_is_handed_out(folder):
    makefile = (folder / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w./-]+):(?!=)", makefile, re.M))
    assert {"lab", "notebook", "handin"} <= targets
    assert set(re.findall(r"^# make ([\w-]+)", makefile, re.M)) == {"lab", "notebook", "handin"}
    named = re.findall(r"^[\w./-]+:(?!=)(.*)", makefile, re.M)
    for needed in " ".join(named).split():
        assert needed in targets or (folder / needed).exists()
    readme = (folder / "README.md").read_text("utf-8")
    assert set(re.findall(r"^ +make ([\w-]+)", readme, re.M)) <= targets
    for module in re.findall(r"python -m ([a-z]\w*\.[\w.]+)", makefile + readme):
        assert (folder / f"{module.replace('.', '/')}.py").exists()
    for file in re.findall(r"[\w-]+\.(?:ipynb|txt)", readme):
        assert (folder / file).exists()


def test_the_commands_start_in_a_folder_of_any_name_without_the_lab_around_it(folder):
    script = """
import runpy, sys
for module, argument in (("utils.run.notebooks", "--help"), ("coursework.hand_in", "--run=none")):
    sys.argv = [module, "RE6121011", argument][:: 1 if argument != "--help" else 2]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        print(module, "ended with", ended.code)
import coursework.selfcheck
print(coursework.selfcheck.WRITTEN)
"""
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=alone,
                          capture_output=True, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "utils.run.notebooks ended with 0" in done.stdout
    assert re.search(r"coursework.hand_in ended with .*'none'", done.stdout)
    assert done.stdout.strip().endswith(str(folder / "coursework" / "copy_channels.py"))


def load_from(folder, path: str):
    """A module of the student's folder, beside the lab's own of the same name."""
    spec = importlib.util.spec_from_file_location(f"students_{path[-9:-3]}", folder / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_replaced_is_called_as_the_lab_s_own():
    for path, text in student.REDUCED.items():
        [replaced] = ast.parse(text).body
        [own] = [n for n in ast.parse((ROOT / path).read_text("utf-8")).body
                 if getattr(n, "name", "") == replaced.name]  # fmt: skip
        assert ast.unparse(own.args) == ast.unparse(replaced.args)


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


def test_slim_runs_what_the_student_wrote(folder):
    handed_out = load_from(folder, "utils/pruning.py")
    model = VGG([5, "M", 6]).eval()
    for bn in sparsity.bn_layers(model):
        bn.weight.data = torch.randn(bn.num_features)
    plan = pruning.plan_pruning(model, 0.5)
    images = torch.randn(2, 3, 8, 8)
    wanted = pruning.slim(model, plan)(images)
    # vggprune.ipynb asks which network to cut before there is a function to cut it with.
    torch.testing.assert_close(handed_out.slim(model, plan)(images), wanted)

    check(7, answered(7, solutions("vggprune")[-1]))
    assert handed_out.slim(model, plan).cfg == plan.cfg != model.cfg
    torch.testing.assert_close(handed_out.slim(model, plan)(images), wanted)
    with pytest.raises(ValueError, match="plan"):
        handed_out.slim(VGG([5, "M", 7]), plan)

    written = selfcheck.WRITTEN.read_text("utf-8")
    other = changed(written, "classifier.bias.data.clone()", "classifier.bias.data + 1")
    selfcheck.WRITTEN.write_text(other, "utf-8")
    torch.testing.assert_close(handed_out.slim(model, plan)(images), wanted + 1)


def test_a_folder_that_holds_work_is_left_alone(tmp_path):
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
    assert code(released) == edition(name)


def test_the_points_that_nbgrader_counts_are_those_of_the_table():
    cells = [c for name in NOTEBOOKS for c in student.teachers_edition(name).cells]
    graded = [c.metadata["nbgrader"] for c in cells if "nbgrader" in c.metadata]
    assert sum(g.get("points", 0) for g in graded) == 100 == sum(int(g.points) for g in GRADED)
    ids = [g["grade_id"] for g in graded]
    assert len(ids) == len(set(ids)) and all(c.id for c in cells)
    for g in graded:
        assert g["locked"] != g["solution"]  # only what is asked for can be written in
        assert (g["grade"] or g["task"]) == ("points" in g)
