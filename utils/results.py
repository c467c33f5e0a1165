"""figures/<profile>/results.json: every number of a run, with the profile and machine behind it."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from utils.checkpoint import file_lock, write_whole
from utils.config import Profile
from utils.machine import describe_machine

FILE = "results.json"


def record(
    folder: Path, section: str, values: dict, *, profile: Profile, device: torch.device | str
) -> None:
    """Set `section` of the results in `folder` (one per notebook), keeping the others."""
    path = folder / FILE
    with file_lock(path):  # between reading and writing, for two notebooks may end at once
        results = read(folder) if path.exists() else {}
        results[section] = {
            "profile": asdict(profile),
            "machine": describe_machine(device),
            "command": os.environ.get("LAB_COMMAND", "the notebook, opened by hand"),
            **values,
        }
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        write_whole(path, text.encode("utf-8"))


def read(folder: Path) -> dict:
    """All results in `folder`. Raises ValueError if the file is not JSON."""
    path = folder / FILE
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); delete it") from None


def report(folder: Path) -> str:
    """What the notebooks found, as tables in Markdown; none for a notebook that has not run."""
    results = read(folder)

    def rows(section: str, values: str) -> list[dict]:
        return results.get(section, {}).get(values, [])

    trained = [
        {
            "λ": f"{run['l1_lambda']:g}",
            "training accuracy (%)": f"{run['train_accuracy'][-1]:.2f}",
            "test accuracy (%)": f"{run['test_accuracy'][-1]:.2f}",
            "sparsity": f"{run['sparsity'][-1]:.3f}",
        }
        for run in rows("sparsity_train", "runs")
    ]
    rungs = (
        "before the cut", "raw cut", "β absorbed", "BN recalibrated", "β absorbed, BN recalibrated"
    )  # fmt: skip
    cuts = [
        {"pruned": f"{100 * cut['pruning_ratio']:g}%"}
        | {rung: f"{cut[rung]:.2f}" for rung in rungs}
        for cut in rows("vggprune", "cuts")
    ]
    networks = [
        {
            "network": row["network"],
            "raw cut (%)": f"{row['raw cut (%)']:.2f}" if row.get("raw cut (%)") else "",
            "test accuracy (%)": f"{row['test accuracy (%)']:.2f}",
            "parameters": f"{row['parameters']:,}",
            "MACs (M)": f"{row['MACs (M)']:.2f}",
            "file (kB)": f"{row['file (kB)']:,}",
            "batch of 1 (ms)": f"{row['batch of 1 (ms)']:.2f}",
            "batch of 256 (ms)": f"{row['batch of 256 (ms)']:.1f}",
        }
        for row in rows("train_prune_model", "table")
    ]
    ingredients = [
        {
            "fine-tuned in other ways": row["network"],
            "schedule": row["schedule"],
            "distillation": f"{row['distillation']:g}",
            "right after the cut (%)": f"{row['right after the cut (%)']:.2f}",
            "fine-tuned (%)": f"{row['fine-tuned (%)']:.2f}",
        }
        for row in rows("train_prune_model", "ingredients")
    ]
    tables = (trained, cuts, networks, ingredients)
    return "\n\n".join(_markdown(table) for table in tables if table)


def _markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a table that reads well as Markdown and as plain text; figures to the right."""
    columns = list(rows[0])
    width = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    first, *others = columns
    lines = [
        [first.ljust(width[first]), *(c.rjust(width[c]) for c in others)],
        ["-" * width[first], *("-" * (width[c] - 1) + ":" for c in others)],
        *(
            [row[first].ljust(width[first]), *(row[c].rjust(width[c]) for c in others)]
            for row in rows
        ),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the tables of a run.")
    parser.add_argument("folder", type=Path, help="figures/<profile>")
    print(report(parser.parse_args().folder))
