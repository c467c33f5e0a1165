"""Handing in: a synthetic run is packed and looked over; damaged and hostile archives are named."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from models.vgg import VGG
from scripts.hand_in import ROOT
from utils.checkpoint import Checkpoint, save

pytest.importorskip("fpdf", reason="pip install -r requirements-handin.txt")

ID = "0123456789abcdef"
CFG = [4, 4, "M", 8, 8, "M", 16, 16, "M", 32, 32, "M", 32, 32]
NOTEBOOKS = ("sparsity_train.ipynb", "vggprune.ipynb", "train_prune_model.ipynb")
PIXEL = "iVBORw0KGgo="


def notebook(counts: tuple = (1, 2), run: str = ID, outputs: tuple = ()) -> str:
    cells = [v4.new_code_cell("x = 1", execution_count=n) for n in counts]
    cells[0].outputs = [v4.new_output("stream", text=f"Run demo · id {run}\n"), *outputs]
    cells[-1].outputs.append(v4.new_output("display_data", data={"image/png": PIXEL}))
    return nbformat.writes(v4.new_notebook(cells=cells))


def measured(correct: int) -> dict:
    return {"loss": 0.2777, "accuracy": correct / 100, "correct": correct, "images": 10_000}


def results() -> dict:
    shared = {"run": ID, "data": "CIFAR-10", "machine": {}, "command": "make lab"}
    profile = {"depth": 13, "width": 0.0625, "epochs": 3, "seed": 1, "pruning_ratios": [0.5, 0.9]}
    curves = {"lr": [0.1, 0.1, 0.01], "train_loss": [2.0, 1.0, 0.5], "test_loss": [2.0, 1.0, 0.6]}
    curves |= {"train_accuracy": [30.0, 60.0, 93.5], "test_accuracy": [28.0, 58.0, 91.25]}
    runs = [
        {"l1_lambda": l1_lambda, **curves, "sparsity": [0.0, sparse / 2, sparse]}
        for l1_lambda, sparse in ((0.0, 0.0), (1e-4, 0.55), (1e-2, 0.97))
    ]
    rungs = {
        "before the cut": 9125,
        "raw cut": 1000,
        "β absorbed": 1010,
        "BN recalibrated": 8800,
        "β absorbed, BN recalibrated": 8811,
    }
    cuts = [
        {
            "pruning_ratio": ratio,
            "realised_ratio": ratio,
            "threshold": 0.0123,
            "min_channels": 1,
            "l1_lambda": 1e-4,
            "cfg": [v if v == "M" else max(1, round(v * (1 - ratio))) for v in CFG],
            **{name: correct / 100 for name, correct in rungs.items()},
            "evaluations": {name: measured(correct) for name, correct in rungs.items()},
        }
        for ratio in (0.5, 0.9)
    ]
    tuned = [
        {"network": "50% pruned", "pruning_ratio": 0.5, **curves, "test": measured(9261)},
        {"network": "90% pruned", "pruning_ratio": 0.9, **curves, "test": measured(8642)},
        {"network": "90% in passes", **curves, "test": measured(8700)},
    ]
    shared["profile"] = profile
    return {
        "sparsity_train": {**shared, "runs": runs},
        "vggprune": {**shared, "cuts": cuts},
        "train_prune_model": {**shared, "finetuning": tuned, "table": []},
    }


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """The lab's folder with a finished run "demo"."""
    root = tmp_path / "lab"
    for folder in ("models", "utils"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "requirements.txt", root)
    figures, checkpoints = root / "figures" / "demo", root / "checkpoints" / "demo"
    figures.mkdir(parents=True)
    for name in NOTEBOOKS:
        (figures / name).write_text(notebook(), "utf-8")
    (figures / "results.json").write_text(json.dumps(results()), "utf-8")
    history = {"train_accuracy": [30.0, 60.0, 93.5]}
    for l1_lambda in (0.0, 1e-4, 1e-2):
        network = VGG(CFG)
        checkpoint = Checkpoint("trained", CFG, network.state_dict(), history=history)
        save(checkpoints / f"trained_lambda_{l1_lambda:g}.pt", checkpoint)
    data = {"name": "CIFAR-10", "train": 50_000, "test": 10_000, "classes": list("abcdefghij")}
    (checkpoints / "run.json").write_text(json.dumps({"id": ID, "name": "demo", "data": data}))
    return root
