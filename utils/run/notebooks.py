"""Run the three notebooks top to bottom without a browser: what `make lab` calls.

The executed copies, the pictures, results.json and a page of them are left in figures/<run>/.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import nbformat
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from utils.profile import PROFILES, get_profile
from utils.run.identity import LAST_RUN
from utils.run.results import NOTEBOOKS, report, write_page
from utils.store.files import write_whole

ROOT = Path(__file__).resolve().parents[2]


class LiveClient(NotebookClient):
    """Shows on the terminal what a cell prints, while it prints it."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)


def execute(name: str, target: Path) -> None:
    """Execute the notebook `name`; write it to `target` with its outputs, of a failure too."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    client = LiveClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        record_timing=False,
        coalesce_streams=True,  # of a progress bar only the last state is kept
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # no word about its local TCP ports
        resources={"metadata": {"path": str(ROOT)}},
    )
    try:
        with ThreadPoolExecutor(1) as beside:
            done = beside.submit(client.execute)
            while not done.done():
                try:
                    wait([done], timeout=1)  # without end it could not be interrupted on Windows
                except KeyboardInterrupt:  # the cell stops as at the stop button
                    if client.km and client.km.has_kernel:
                        run_sync(client.km.interrupt_kernel)()
            done.result()
    finally:
        nbformat.write(notebook, target)


def run_all(folder: Path) -> Path:
    """All three, one after the other; the folder of the run that the first of them began, which
    before it has begun is `folder`.

    Exits with the cell's own error if one fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        # The notebooks pass the run on in a file of this process's own: others may run meanwhile.
        last_run = Path(temporary) / "last_run.txt"
        os.environ["LAB_LAST_RUN"] = str(last_run)
        for name in NOTEBOOKS:
            print(f"\n══════════ {name}.ipynb ══════════", flush=True)
            target = Path(temporary) / f"{name}.ipynb"
            try:
                execute(name, target)
            except CellExecutionError as error:
                sys.exit(f"{name}.ipynb stopped: {error.ename}: {error.evalue}")
            except DeadKernelError:
                sys.exit(f"{name}.ipynb: its kernel died, as it does when memory runs out")
            finally:
                if last_run.exists():
                    folder = ROOT / "figures" / last_run.read_text("utf-8").strip()
                    write_whole(ROOT / LAST_RUN, last_run.read_bytes())  # for who opens one next
                if target.exists():
                    write_whole(folder / target.name, target.read_bytes())
                    print(f"\nThe executed notebook: {folder / target.name}")
    return folder


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ and γ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("LAB_PROFILE") or "quick"  # whose images need no network
    parser.add_argument("--profile", default=default, choices=PROFILES)
    profile = parser.parse_args().profile
    began = time.monotonic()
    os.environ["LAB_PROFILE"] = profile
    os.environ.setdefault("LAB_CWD", os.getcwd())  # where LAB_DATA was typed
    try:
        folder = ROOT / "figures" / get_profile(profile).name
    except ValueError as error:  # PROFILE, RUN or LAB_EPOCHS was mistyped
        sys.exit(str(error))
    folder = run_all(folder)
    write_page(folder)
    print(f"\n══════════ done in {(time.monotonic() - began) / 60:.1f} min ══════════\n")
    print(report(folder))
    print(f"\nNotebooks, pictures, results.json and README.md: {folder.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
