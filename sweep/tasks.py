"""Tasks of a sweep: a task makes one network by the steps of lab.py, and its row of the table, in
a file of its own beside the checkpoints: a sweep begun again does only what is missing."""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from models.vgg import VGG
from utils import choosing
from utils.cost import macs, num_parameters
from utils.profile import FIELDS
from utils.pruning import slim
from utils.run import lab, tuning
from utils.run.identity import WITHOUT_EFFECT, Run
from utils.store.files import one_at_a_time, write_json
from utils.store.identity import fingerprint, follows_from, weights_digest
from utils.training import DivergenceError, evaluate

CELL = ("l1_lambda", "pruning_ratio", "seed")  # which row it is
COLUMNS = (
    *CELL, "realised_ratio", "macs", "parameters", "sparsity",
    "trained_accuracy", "raw_accuracy", "repaired_accuracy", "finetuned_accuracy", "reason",
)  # fmt: skip
"""Accuracies are in % of the test images; a pruning_ratio of 0 is the trained network itself.
`sparsity` is that of the trained network. `reason`: why a number is missing."""
NOT_OF_A_TASK = (*WITHOUT_EFFECT, "l1_lambdas", "pruning_ratios", "multipass_ratios")


class Task(NamedTuple):
    """One network to make, and one row of the table."""

    run: Run
    l1_lambda: float
    pruning_ratio: float = 0.0
    """0: train it. Else cut the trained one, and fine-tune."""

    @property
    def cell(self) -> tuple[float, float, int]:
        """The row's place in the table."""
        return self.l1_lambda, self.pruning_ratio, self.run.profile.seed

    @property
    def file(self) -> Path:
        return self.run.checkpoints / f"row_{self.l1_lambda:g}_{self.pruning_ratio:g}.json"

    @property
    def follows_from(self) -> str:
        """16 hex digits that stand for all that the row depends on."""
        fields = [f for f in FIELDS if f not in NOT_OF_A_TASK]  # λ and ratio are its own
        own = {"images": self.run.data["digest"], "cell": self.cell}
        return fingerprint(follows_from(self.run.profile, fields, **own))

    def row(self, **values) -> dict:
        return dict.fromkeys(COLUMNS) | dict(zip(CELL, self.cell, strict=True)) | values


def planned(runs: Iterable[Run]) -> list[Task]:
    """For each λ of each run one training, and a cut for each ratio."""
    return [
        Task(run, l1_lambda, ratio)
        for run in runs
        for l1_lambda in run.profile.l1_lambdas
        for ratio in (0.0, *run.profile.pruning_ratios)
    ]


def finished(task: Task) -> dict | None:
    """The row of `task`, if it has been done with these settings."""
    try:
        content = json.loads(task.file.read_text("utf-8"))
        return content["row"] if content["follows_from"] == task.follows_from else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole: done again
        return None


def do(task: Task) -> dict:
    """The row of `task`: read if it is there, else made. A divergence, which would come again, is
    its `reason`; what may go well next time (memory, a full disk) is raised."""
    torch.set_num_threads(1)  # as many tasks as cores run at once; and the same bits everywhere
    # A worker of a sweep that was killed goes on with its task to the end.
    with one_at_a_time(task.file):
        if row := finished(task):
            return row
        row = task.row()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the sweep has a bar of its own
                for values in _made(task):
                    row |= values
        except DivergenceError as error:
            row["reason"] = str(error)
        write_json(task.file, {"follows_from": task.follows_from, "row": row})
    return row


def _made(task: Task) -> Iterator[dict]:
    """The columns of a row, as soon as they are known."""
    data, k, ratio = lab.images_of(task.run), task.l1_lambda, task.pruning_ratio
    profile = replace(task.run.profile, l1_lambdas=(k,))
    run = replace(task.run, profile=profile)

    def measured(network: VGG) -> dict:
        return {"macs": macs(network, data.input_shape), "parameters": num_parameters(network)}

    def accuracy(network: VGG) -> float:
        return evaluate(network, data.plain_batches("test", profile.test_batch_size)).accuracy

    trained = lab.trained_networks(run, data)[k] if ratio else lab.train(run, data, k)
    plan = lab.plan_cut(run, data, trained.model, ratio)
    verdict = choosing.judge({k: trained}, {k: plan}, data.train_labels, profile.momentum)[k]
    yield {
        "realised_ratio": plan.realised_ratio,
        "sparsity": trained.history.sparsity[-1],
        "trained_accuracy": trained.history.test_accuracy[-1],
        "reason": None if verdict.works else verdict.reason,
    }
    if not ratio:
        yield measured(trained.model)
        return
    # Two ratios close together may keep the same channels, and then share their files.
    with one_at_a_time(run.checkpoints / f"kept_{plan.kept}_of_{weights_digest(trained.model)}"):
        network = lab.cut_on(run, data, trained.model, plan)
        raw = accuracy(slim(trained.model, plan))
        yield measured(network) | {"raw_accuracy": raw, "repaired_accuracy": accuracy(network)}
        if verdict.works:
            history = tuning.finetune(run, data, network).history
            yield {"finetuned_accuracy": history.test_accuracy[-1]}
