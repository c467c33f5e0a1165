"""Run the three notebooks top to bottom without a browser: what `make lab` calls.

The executed copies, the pictures and results.json are left in figures/<profile>/.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from utils.config import PROFILES, get_profile
from utils.results import report

NOTEBOOKS = ("sparsity_train.ipynb", "vggprune.ipynb", "train_prune_model.ipynb")
ROOT = Path(__file__).resolve().parent


class LiveClient(NotebookClient):
    """Shows on the terminal what a cell prints, while it prints it."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)


def run(name: str, target: Path) -> Path:
    """Execute the notebook `name`; write it to `target` with its outputs, of a failure too.

    The folder that its last cell names comes back: that of a run_name, if its parameters set one.
    """
    notebook = nbformat.read(ROOT / name, as_version=4)
    client = LiveClient(
        notebook,
        kernel_name="python3",
        timeout=None,
        coalesce_streams=True,  # of a progress bar only the last state is kept
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # no word about its local TCP ports
        resources={"metadata": {"path": str(ROOT)}},
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, target)
    last_cell = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    printed = "".join(output.get("text", "") for output in last_cell.outputs)
    return ROOT / re.search(r"Saved: (\S+)/\*\.png", printed).group(1)


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ and γ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    chosen = parser.parse_args().profile
    profile = get_profile(chosen)
    variables = [f'{v}="{os.environ[v]}"' for v in ("LAB_EPOCHS", "LAB_DATA") if os.environ.get(v)]
    os.environ["LAB_PROFILE"] = chosen
    os.environ["LAB_COMMAND"] = " ".join(["make lab", f"PROFILE={chosen}", *variables])
    folder = ROOT / "figures" / profile.name
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in NOTEBOOKS:
        print(f"\n══════════ {name} ══════════", flush=True)
        try:
            recorded = run(name, folder / name)
        except CellExecutionError as error:
            sys.exit(f"{name} stopped: {error.ename}: {error.evalue}\nSee {folder / name}")
        (folder / name).replace(recorded / name)
    print(f"\n══════════ done in {(time.monotonic() - began) / 60:.1f} min ══════════\n")
    print(report(recorded))
    print(f"\nThe executed notebooks, the pictures and results.json: {recorded.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
