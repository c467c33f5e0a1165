"""Run the three notebooks without a browser; all that comes out is left in figures/<run>/."""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from utils.profile import PROFILES, get_profile
from utils.run.identity import LAST_RUN
from utils.run.page import whole_page, write_page
from utils.run.results import NOTEBOOKS
from utils.store.files import write_whole

ROOT = Path(__file__).resolve().parents[2]


class OwnKernel(AsyncKernelManager):
    """This very interpreter, whatever kernels are installed under the name python3."""

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = ["--log-level=ERROR", "-f", "{connection_file}"]  # no word about its TCP ports
        argv = [sys.executable, "-m", "ipykernel_launcher", *quiet]
        return KernelSpec(argv=argv, language="python")


class LiveClient(NotebookClient):
    """Shows on the terminal what a cell prints, while it prints it."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)


@contextlib.contextmanager
def plain_environment() -> Iterator[dict[str, str]]:
    """The environment of a kernel: the user's, with the lab's folder first on Python's path, and
    without settings of Python, matplotlib and IPython, which would change how a notebook runs."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MPL"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as empty:
        Path(empty, "matplotlibrc").touch()
        yield kept | {"PYTHONPATH": path, "MATPLOTLIBRC": empty, "IPYTHONDIR": empty}


def execute(name: str, target: Path) -> None:
    """Execute the notebook `name`; write it to `target` with its outputs, of a failure too."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    how = {"timeout": None, "record_timing": False, "resources": {"metadata": {"path": str(ROOT)}}}
    client = LiveClient(notebook, kernel_manager_class=OwnKernel, **how)
    try:
        with plain_environment() as environment, ThreadPoolExecutor(1) as beside:
            done = beside.submit(client.execute, env=environment)
            while not done.done():
                try:
                    wait([done], timeout=1)  # without end it could not be interrupted on Windows
                except KeyboardInterrupt:  # the cell stops as at the stop button
                    if client.km and client.km.has_kernel:
                        run_sync(client.km.interrupt_kernel)()
            done.result()
    finally:
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # a bar's last state
        nbformat.write(notebook, target)


def run_all(folder: Path) -> Path:
    """All three; the folder of the run that the first of them begins, until then `folder`. Exits
    with the cell's own error if one fails."""
    with tempfile.TemporaryDirectory() as temporary:
        last_run = Path(temporary, "last_run.txt")  # this process's own: others may run meanwhile
        os.environ["LAB_LAST_RUN"] = str(last_run)
        for name in NOTEBOOKS:
            print(f"\n══════════ {name}.ipynb ══════════", flush=True)
            target, stopped = Path(temporary, f"{name}.ipynb"), ""
            try:
                execute(name, target)
            except CellExecutionError as error:
                stopped = f"{name}.ipynb stopped: {error.ename}: {error.evalue}"
            except DeadKernelError:
                stopped = f"{name}.ipynb: its kernel died, as it does when memory runs out"
            if last_run.exists():
                folder = ROOT / "figures" / last_run.read_text("utf-8").strip()
                write_whole(ROOT / LAST_RUN, last_run.read_bytes())  # for who opens one next
            write_whole(folder / target.name, target.read_bytes())
            print(f"\nThe executed notebook: {folder / target.name}")
            if stopped:
                sys.exit(stopped)
    return folder


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ and γ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("LAB_PROFILE") or "quick"  # whose images need no network
    parser.add_argument("--profile", default=default, choices=PROFILES)
    os.environ["LAB_PROFILE"], began = parser.parse_args().profile, time.monotonic()
    os.environ.setdefault("LAB_CWD", os.getcwd())  # where LAB_DATA was typed
    try:
        folder = run_all(ROOT / "figures" / get_profile().name)
        write_page(folder)
    except (ValueError, OSError) as error:  # a mistyped setting; a folder that can't be written to
        sys.exit(str(error))
    print(f"\n══════════ done in {(time.monotonic() - began) / 60:.1f} min ══════════\n")
    print(f"{whole_page(folder)}\n\nAll of it is in {folder.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
