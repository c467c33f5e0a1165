"""Write the student edition of the notebooks in the root, with blanks to fill in: `make student`.

With --nbgrader: what `nbgrader generate_assignment network_slimming` takes (docs/teachers.md)."""

import argparse
import re
import sys
import textwrap
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from coursework.blanks import BLANKS, GRADED, Graded
from utils.run.results import NOTEBOOKS

ROOT = Path(__file__).resolve().parent.parent
HANDED_OUT = (
    "models/*.py", "utils/**/*.py", "coursework/*.py", "coursework/blanks.ini", "LICENSE",
    "requirements.txt", "requirements-export.txt", "requirements-handin.txt",
    "docs/report_*.md", "docs/report_*.json",
)  # fmt: skip
TEACHERS = ("check.py", "student.py", "copy_channels.py")  # of coursework/
TARGETS = ("lab", "notebook", "handin")  # the others need what stays with the teacher
REGION = re.compile(r"( *)### BEGIN SOLUTION\n(.*?) *### END SOLUTION(?:\n|$)", re.DOTALL)
HIDDEN = re.compile(r"\n### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS", re.DOTALL)
STUB = "# YOUR CODE HERE\nraise NotImplementedError()\n"
COURSE = {"λ": "l1_lambdas = [0, 1e-4, 1e-2]\n"}  # the notebook in the root has None, the profile's
NBGRADER = "c = get_config()\nc.Execute.timeout = None\nc.Execute.iopub_timeout = 60\n"
REDUCED = {  # in place of functions that would give a blank away
    "utils/sparsity.py": '''def add_l1_subgradient(model: nn.Module, l1_lambda: float) -> None:
    """γ.grad grows by the gradient of λ·Σ|γ|, which autograd finds; you write it out yourself."""
    (l1_lambda * sum(bn.weight.abs().sum() for bn in bn_layers(model))).backward()
''',
    "utils/pruning.py": '''def slim(model: VGG, plan: PruningPlan) -> VGG:
    """The slim network, by your own copy_channels; until that is kept, the masked one."""
    from coursework.selfcheck import kept_copy_channels

    device = model.classifier.weight.device
    cfg_mask = [keep.to(device) for keep in masks_for(model, plan)]
    own = kept_copy_channels(device)
    return own(model, plan.cfg, cfg_mask) if own else mask(model, plan)
''',
}


def teachers_edition(name: str) -> NotebookNode:
    """The notebook `name` with solutions, tasks, checks, hidden tests and nbgrader's metadata.
    Raises ValueError unless it has one solution for each of its blanks."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    blanks = [blank for blank in BLANKS if blank.notebook == name]
    if (n := sum(len(REGION.findall(cell.source)) for cell in notebook.cells)) != len(blanks):
        raise ValueError(f"{name}.ipynb has {n} solutions, blanks.ini {len(blanks)} blanks for it")
    left, cells = iter(blanks), []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "set_up(" in cell.source:
            cell.source += "\n\nfrom coursework import selfcheck\n\nselfcheck.start()"
        if asked := [next(left) for _ in REGION.findall(cell.source)]:
            tasks = map(_task, asked, REGION.finditer(cell.source))
            cell.source = REGION.sub(lambda _, tasks=tasks: next(tasks), cell.source)
            _for_nbgrader(cell, f"blank-{BLANKS.index(asked[0]) + 1}", solution=True)
            cells += map(_graded_cell, asked)
    by_hand = [graded for graded in GRADED if graded.notebook == name and not graded.check]
    notebook.cells = [*cells, *map(_graded_cell, by_hand)]
    return notebook


def students_edition(name: str) -> NotebookNode:
    """The same, with blanks in place of the solutions and without the hidden tests."""
    notebook = teachers_edition(name)
    for cell in notebook.cells:
        cell.source = REGION.sub(lambda m: textwrap.indent(STUB, m[1]), cell.source)
        cell.source = HIDDEN.sub("", cell.source).rstrip("\n")
    return notebook


def _task(blank: Graded, region: re.Match) -> str:
    """A solution with title, task and hint as comments above it."""
    number, margin = BLANKS.index(blank) + 1, f"{region[1]}# "
    title = f"Blank {number} of {len(BLANKS)}, {blank.name} ({blank.points} points)"
    lines = [title, f"Task: {blank.task}", f"Hint: {blank.hint}"]
    wrapped = "\n".join(textwrap.fill(line, 92 - len(margin)) for line in lines)
    solution = region[0].replace(region[2], COURSE.get(blank.name, region[2]))
    return f"{textwrap.indent(wrapped, margin)}\n{solution}"


def _graded_cell(graded: Graded) -> NotebookNode:
    """Its check, with a hidden one of another seed if it takes one; or what is graded by hand."""
    points = int(graded.points)
    if not graded.check:
        cell = new_markdown_cell(f"{graded.task} ({points} points, graded by hand)")
        return _for_nbgrader(cell, graded.name, task=True, points=points)
    lines = [f"selfcheck.{graded.check}"]
    if "device" in graded.check:
        hidden = f"{lines[0][:-1]}, seed=2026)"
        lines += ["### BEGIN HIDDEN TESTS", hidden, "### END HIDDEN TESTS"]
    if graded == BLANKS[-1]:
        lines += ["selfcheck.keep(copy_channels, device)  # what follows runs it, notebook 3 too"]
    cell, number = new_code_cell("\n".join(lines)), BLANKS.index(graded) + 1
    return _for_nbgrader(cell, f"check-{number}", grade=True, points=points)


def _for_nbgrader(cell: NotebookNode, grade_id: str, solution=False, **given) -> NotebookNode:
    """The cell with what nbgrader wants to know of it; all but a solution is locked."""
    what = {"grade": False, "task": False, "solution": solution, "locked": not solution, **given}
    cell.metadata["nbgrader"] = what | {"grade_id": grade_id, "schema_version": 3}
    cell.id = grade_id
    return cell


def reduced(path: Path) -> str:
    """The text of a file, with functions that give a blank away replaced."""
    source, instead = path.read_text("utf-8"), REDUCED.get(path.relative_to(ROOT).as_posix(), "")
    whole = rf"^{re.escape(instead.split('(')[0])}\(.*?(?=\n\n\n|\Z)"
    own = re.search(whole, source, re.M | re.S) if instead else None
    return source.replace(own[0], instead.rstrip()) if own else source


def makefile() -> str:
    """The lab's own Makefile, with `TARGETS` only and the environments that they need."""
    others = rf"(?!({'|'.join(TARGETS)})\b)[\w-]+"
    dropped = re.compile(rf"^(\.PHONY|(\.venv/)?{others}):(?!=)", re.M)
    paragraphs = (ROOT / "Makefile").read_text("utf-8").split("\n\n")
    text = "\n\n".join(p for p in paragraphs if not dropped.search(p))
    return re.sub(rf"^# make {others} .*\n", "", text, flags=re.M)


def write(out: Path, edition=students_edition) -> None:
    """The three notebooks of `edition` and all that they need, to the new folder `out`."""
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out.resolve()}: is there already; move it away, or name another with --out")
    paths = [p for pattern in HANDED_OUT for p in ROOT.glob(pattern) if p.name not in TEACHERS]
    texts = {path.relative_to(ROOT): reduced(path) for path in sorted(paths)}
    texts |= {"Makefile": makefile(), "README.md": (ROOT / "docs/student.md").read_text("utf-8")}
    texts |= {f"{name}.ipynb": nbformat.writes(edition(name)) + "\n" for name in NOTEBOOKS}
    for path, text in texts.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(text, "utf-8", newline="\n")


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ and γ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "student", help="a new folder (student)")
    parser.add_argument("--nbgrader", action="store_true", help="the teacher's edition instead")
    options = parser.parse_args()
    folder = options.out / "source" / "network_slimming" if options.nbgrader else options.out
    write(folder, teachers_edition if options.nbgrader else students_edition)
    if options.nbgrader:
        (options.out / "nbgrader_config.py").write_text(NBGRADER, "utf-8")
    print(f"{folder}: {len(BLANKS)} blanks in {len(NOTEBOOKS)} notebooks")


if __name__ == "__main__":
    main()
