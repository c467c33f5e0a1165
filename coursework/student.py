"""Write the student edition, with blanks to fill in: what `make student` calls.

The notebooks in the root are the only source. With --nbgrader the teacher's edition is written
instead, as <out>/source/network_slimming: solutions, hidden tests and points, as
`nbgrader generate_assignment network_slimming` takes it. See docs/teachers.md.
"""

import argparse
import ast
import re
import sys
import textwrap
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from coursework.rubric import BLANKS, BY_HAND, POINTS, Blank
from utils.run.results import NOTEBOOKS

ROOT = Path(__file__).resolve().parent.parent
HANDED_OUT = (
    "models/*.py", "utils/**/*.py", "LICENSE", "docs/report_*",
    "requirements.txt", "requirements-export.txt", "requirements-handin.txt",
    *(f"coursework/{name}.py" for name in
      ("__init__", "blanks", "hand_in", "handed_in", "report", "selfcheck")),
)  # fmt: skip
REGION = re.compile(r"( *)### BEGIN SOLUTION\n(.*?) *### END SOLUTION(?:\n|$)", re.DOTALL)
HIDDEN = re.compile(r"\n### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS", re.DOTALL)
STUB = "# YOUR CODE HERE\nraise NotImplementedError()\n"
NBGRADER = """c = get_config()
c.Execute.timeout = None  # a cell may train
c.Execute.iopub_timeout = 60  # seconds, on a machine that is busy
"""

REDUCED = {
    "utils/sparsity.py": '''
def add_l1_subgradient(model: nn.Module, l1_lambda: float) -> None:
    """γ.grad grows by the gradient of λ·Σ|γ|, which autograd finds; you write it out yourself."""
    gammas = [bn.weight for bn in bn_layers(model)]
    penalty = l1_lambda * sum(gamma.abs().sum() for gamma in gammas)
    for gamma, gradient in zip(gammas, torch.autograd.grad(penalty, gammas), strict=True):
        gamma.grad.add_(gradient)
''',
    "utils/pruning.py": '''
def slim(model: VGG, plan: PruningPlan) -> VGG:
    """The slim network, by your own copy_channels, which vggprune.ipynb keeps once it is right."""
    from coursework.blanks import kept_copy_channels

    _check_fits(model, plan)
    return kept_copy_channels()(model, plan.cfg, plan.cfg_mask)
''',
}
"""Functions that would give a blank away, and what the student edition has in their place."""


def teachers_edition(name: str) -> NotebookNode:
    """The notebook `name` with solutions, tasks, checks, hidden tests and nbgrader's metadata."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    blanks, cells = iter([b for b in BLANKS if b.notebook == name]), []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        asked = [next(blanks) for _ in REGION.findall(cell.source)]
        if asked:
            cell.source = _with_tasks(cell.source, asked)
            number = BLANKS.index(asked[0]) + 1
            cell.metadata["nbgrader"] = _metadata(f"blank-{number}", solution=True)
            cells += map(_check_cell, asked)
        if "set_up(" in cell.source:
            start = "from coursework import blanks, selfcheck\n\nblanks.start()"
            cells.append(new_code_cell(start, id="start", metadata=_locked("start")))
    if missing := list(blanks):
        raise ValueError(f"{name}.ipynb: no solution region for {missing[0].name}")
    notebook.cells = cells + (_points() if name == NOTEBOOKS[-1] else [])
    return notebook


def students_edition(name: str) -> NotebookNode:
    """The same, with blanks in place of the solutions and without the hidden tests."""
    notebook = teachers_edition(name)
    for cell in notebook.cells:
        cell.source = REGION.sub(lambda m: textwrap.indent(STUB, m[1]), cell.source)
        cell.source = HIDDEN.sub("", cell.source).rstrip("\n")
    return notebook


def _with_tasks(source: str, asked: list[Blank]) -> str:
    """`source` with title, task and hint as comments above each solution."""
    left = iter(asked)

    def described(match: re.Match) -> str:
        blank = next(left)
        title = f"Blank {BLANKS.index(blank) + 1} of {len(BLANKS)}, {blank.name} ({POINTS} points)"
        lines = [title, f"Task: {blank.task}", f"Hint: {blank.hint}"]
        margin = match[1] + "# "
        return "".join(textwrap.fill(t, 96, initial_indent=margin, subsequent_indent=margin) + "\n"
                       for t in lines) + match[0]  # fmt: skip

    return REGION.sub(described, source)


def _check_cell(blank: Blank) -> NotebookNode:
    number, check = BLANKS.index(blank) + 1, blank.check
    if blank.name != "λ":
        hidden = check.removesuffix(")") + ", seed=2026)"
        check += f"\n### BEGIN HIDDEN TESTS\n{hidden}\n### END HIDDEN TESTS"
    if blank is BLANKS[-1]:
        check += "\nblanks.keep(copy_channels, device)  # what follows runs it, notebook 3 too"
    graded = _metadata(f"check-{number}", grade=True, locked=True, points=POINTS)
    return new_code_cell(check, id=f"check-{number}", metadata={"nbgrader": graded})


def _points() -> list[NotebookNode]:
    """The table of points, and a cell for each part that is graded by hand."""
    rows = [f"| {blank.name} (`{blank.notebook}.ipynb`) | {POINTS} |" for blank in BLANKS]
    rows += [f"| {what} | {points} |" for points, what in BY_HAND.values()]
    total = POINTS * len(BLANKS) + sum(points for points, _ in BY_HAND.values())
    table = ["## Points", "", "| for | points |", "|---|---|", *rows, f"| **all** | **{total}** |"]
    cells = [new_markdown_cell("\n".join(table), id="points", metadata=_locked("points"))]
    for name, (points, what) in BY_HAND.items():
        task = _metadata(name, locked=True, points=points, task=True)
        cells.append(new_markdown_cell(f"{what} ({points} points, graded by hand)", id=name,
                                       metadata={"nbgrader": task}))  # fmt: skip
    return cells


def _metadata(grade_id: str, **given) -> dict:
    """What nbgrader wants to know of a cell."""
    plain = {"grade": False, "solution": False, "locked": False, "task": False}
    return {"grade_id": grade_id, "schema_version": 3, **plain, **given}


def _locked(grade_id: str) -> dict:
    return {"nbgrader": _metadata(grade_id, locked=True)}


def reduced(path: str) -> str:
    """The text of a module, with its function that gives a blank away replaced."""
    source = (ROOT / path).read_text("utf-8")
    if path not in REDUCED:
        return source
    replacement = REDUCED[path].strip("\n").splitlines()
    [name] = [node.name for node in ast.parse(REDUCED[path]).body]
    [found] = [n for n in ast.parse(source).body if getattr(n, "name", "") == name]
    lines = source.splitlines()
    lines[found.lineno - 1 : found.end_lineno] = replacement
    return "\n".join(lines) + "\n"


def write(out: Path, edition=students_edition) -> None:
    """The three notebooks of `edition` and all that they need, to the new folder `out`."""
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out.resolve()}: is there already; move it away, or name another with --out")
    for path in sorted(p for pattern in HANDED_OUT for p in ROOT.glob(pattern)):
        target = out / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(reduced(path.relative_to(ROOT).as_posix()), "utf-8", newline="\n")
    for name in NOTEBOOKS:
        nbformat.write(edition(name), out / f"{name}.ipynb")


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ and γ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "student", help="a new folder (student)")
    parser.add_argument("--nbgrader", action="store_true", help="the teacher's edition instead")
    options = parser.parse_args()
    if options.nbgrader:
        folder = options.out / "source" / "network_slimming"
        write(folder, teachers_edition)
        (options.out / "nbgrader_config.py").write_text(NBGRADER, "utf-8")
    else:
        folder = options.out
        write(folder)
    print(f"{folder}: {len(BLANKS)} blanks in {len(NOTEBOOKS)} notebooks")


if __name__ == "__main__":
    main()
