"""The notebooks' own code cells, run one by one in this process."""

import linecache
from pathlib import Path

import nbformat
import torch

ROOT = Path(__file__).resolve().parent.parent


def code(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def lab_cells(name: str) -> list[str]:
    return code(nbformat.read(ROOT / f"{name}.ipynb", as_version=4))


def find(cells: list[str], mark: str) -> str:
    """The one cell with `mark` in it."""
    [found] = [source for source in cells if mark in source]
    return found


def changed(source: str, right: str, wrong: str) -> str:
    assert right in source
    return source.replace(right, wrong)


def execute(source: str, namespace: dict) -> dict:
    """Run a cell as IPython does: its lines can be looked up when it fails."""
    file = f"<cell {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)
    return namespace


def imported(cells: list[str], monkeypatch) -> dict:
    """What the notebook's second cell leaves, its imports, and the device of the cells after it."""
    monkeypatch.chdir(ROOT)
    names = {"labs": [ROOT], "device": torch.device("cpu")}
    return execute(find(cells, "set_up(labs)"), names)
