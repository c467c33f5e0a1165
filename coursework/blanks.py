"""The blanks of the student edition: what an empty or a wrong one says, and how a right one is kept
for what comes after."""

import inspect
import linecache
import runpy
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch

from models.vgg import VGG
from utils.run.identity import RunError
from utils.store.files import write_whole

WRITTEN = Path("coursework/copy_channels.py")
"""The student's own function, for `slim` and the notebook after."""


class Wrong(Exception):
    """What is wrong with a blank, in words: a notebook shows these instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [textwrap.fill(line, 96) for line in str(self).splitlines()]


def start() -> None:
    """Let this notebook say in words which blank is still empty, or which notebook comes first."""

    def say(shell, kind, error, trace, tb_offset=None) -> None:
        text = str(error) if isinstance(error, RunError) else still_empty(error)
        shell.showtraceback((Wrong, Wrong(text), None))

    shell = sys.modules["IPython"].get_ipython()  # who calls this runs in a notebook
    shell.set_custom_exc((NotImplementedError, RunError), say)
    print("Seven blanks are yours, in order: YOUR CODE HERE. Below each stands a check.")


def call(blank: str, written: Callable, *arguments: object) -> object:
    """What the student's function returns. Raises Wrong, naming its line, if it stops."""
    try:
        return written(*arguments)
    except NotImplementedError as error:
        raise Wrong(still_empty(error)) from None
    except Exception as error:
        line = "".join(_cell_until(error)[-1:]).strip()
        why = f"{type(error).__name__}: {error}"
        raise Wrong(f"{blank}: {written.__name__} stops at\n{line}\n{why}") from None


def still_empty(error: NotImplementedError) -> str:
    """Which blank raised `error`, and what to do."""
    titles = [line.strip("# \n") for line in _cell_until(error) if "# Blank " in line]
    if not titles:
        return str(error)
    return (
        f"{titles[-1]} is still empty.\nWrite your own in place of raise NotImplementedError(), "
        "run that cell again, then the check below it. (With pass in place of other blanks, the "
        "check of one runs by itself.)"
    )


def _cell_until(error: Exception) -> list[str]:
    """The lines of the cell that raised `error`, up to the one that did."""
    trace = error.__traceback__
    found = []
    while trace:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(sys.prefix):  # torch's own lines tell a student nothing
            found = linecache.getlines(name)[: trace.tb_lineno]
        trace = trace.tb_next
    return found


def keep(copy_channels: Callable, device: str | torch.device = "cpu") -> None:
    """Write the student's function down: `slim` in utils/pruning.py runs it from now on.

    Raises Wrong if it needs something that stands elsewhere in the notebook.
    """
    head = (
        "import torch\n\nfrom models.vgg import VGG\n\n"
        'device = torch.device("cuda" if torch.cuda.is_available() else "cpu")\n\n\n'
    )
    write_whole(WRITTEN, (head + inspect.getsource(copy_channels)).encode("utf-8"))
    one_channel, stays = VGG([1]).to(device), torch.ones(1, dtype=torch.bool, device=device)
    try:
        kept_copy_channels()(one_channel, [1], [stays])
    except NameError as error:
        raise Wrong(
            f"copy_channels is right, but what follows runs it from {WRITTEN}, by itself, and "
            f"there {error}. Import it, or define it, inside the function."
        ) from None
    print(f"{WRITTEN}: your function, for what follows")


def kept_copy_channels() -> Callable:
    """The student's own function. Raises RunError if it was not kept yet."""
    if not WRITTEN.exists():
        raise RunError(f"{WRITTEN} is missing: run vggprune.ipynb down to the last of its checks")
    return runpy.run_path(str(WRITTEN))["copy_channels"]
