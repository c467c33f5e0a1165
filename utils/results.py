"""figures/<profile>/results.json: every number of a run, with the profile and machine behind it."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from utils.config import Profile
from utils.machine import describe_machine

FILE = "results.json"


def record(
    folder: Path, section: str, values: dict, *, profile: Profile, device: torch.device | str
) -> None:
    """Set `section` of the results in `folder` (one per notebook), keeping the others."""
    path = folder / FILE
    results = read(folder) if path.exists() else {}
    results[section] = {
        "profile": asdict(profile),
        "machine": describe_machine(device),
        "command": os.environ.get("LAB_COMMAND", "the notebook, opened by hand"),
        **values,
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.replace(temporary, path)


def read(folder: Path) -> dict:
    """All results in `folder`. Raises ValueError if the file is not JSON."""
    path = folder / FILE
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); delete it") from None


def final_table(folder: Path) -> pd.DataFrame:
    """Dense → sparse → slim → finetuned, as notebook 3 recorded it."""
    return pd.DataFrame(read(folder)["train_prune_model"]["table"]).set_index("network")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the final table of a run.")
    parser.add_argument("folder", type=Path, help="figures/<profile>")
    print(final_table(parser.parse_args().folder).to_string())
