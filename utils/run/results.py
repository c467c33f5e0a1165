"""figures/<run>/results.json: every number of a run, a section for each notebook."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from utils.run.identity import Run
from utils.run.machine import describe_machine
from utils.store.files import one_at_a_time, write_json
from utils.store.identity import fingerprint

FILE = "results.json"
NOTEBOOKS = ("sparsity_train", "vggprune", "train_prune_model")  # each builds on those before


def record(run: Run, notebook: str, values: dict, device: torch.device | str) -> None:
    """Set the section `notebook` of the run's results. Sections of another run, or of an earlier
    cut, are left out from then on, with a word."""
    path = run.figures / FILE
    with one_at_a_time(path):  # between reading and writing, for two notebooks may end at once
        results = read(run.figures) if path.exists() else {}
        about = {"run": run.id, "data": run.data["name"], "machine": describe_machine(device)}
        profile = asdict(run.profile) | {"data": run.data["name"]}  # not where they lie
        results[notebook] = {**about, "profile": profile, **values}
        for other in [n for n in NOTEBOOKS if n in results and n != notebook]:
            if why := not_of(run.id, results, other):
                print(f"{path}: {other}.ipynb {why}: its old results are left out, run it again")
                del results[other]
        if notebook == "train_prune_model":
            results[notebook]["cut"] = _cut(results)
        write_json(path, results)
    print(f"Saved: {run.figures}/*.png, {path}, {run.checkpoints}/*.safetensors")


def not_of(run_id: str, results: dict, notebook: str) -> str:
    """Why the section `notebook` does not belong to the run `run_id`; "" if it does."""
    section = results[notebook]
    if section.get("run") != run_id:
        return "has shown another run"
    earlier = notebook == "train_prune_model" and section.get("cut") != _cut(results)
    return "has shown the networks of an earlier cut" if earlier else ""


def _cut(results: dict) -> str:
    names = ("l1_lambda", "pruning_ratio", "min_channels", "cfg")
    cuts = results.get("vggprune", {}).get("cuts") or ()
    return fingerprint([[c.get(name) for name in names] for c in cuts if isinstance(c, dict)])


def read(folder: str | Path) -> dict:
    """The results in `folder`. Raises ValueError, naming the way out, if there are none to read."""
    path = Path(folder) / FILE
    if not path.exists():
        raise ValueError(f"{path.resolve()}: no results here; give the folder figures/<run>")
    try:
        results = json.loads(path.read_text("utf-8"))
        if not all(isinstance(results.get(name, {}), dict) for name in NOTEBOOKS):
            raise ValueError("a section is no object")
    except (ValueError, AttributeError) as error:
        what = f"not the results of a run ({error}); move it away"
        raise ValueError(f"{path.resolve()}: {what}") from None
    return results
