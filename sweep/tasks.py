"""Many runs: every λ with every seed is trained once; its ratios are cut from it and fine-tuned.

A task makes one network by calls of lab.py, and its row of the table. The row lies in a file of
its own beside the checkpoints, so a sweep called again does only what is missing.
"""

import contextlib
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from utils.cost import macs, num_parameters
from utils.images.data import ImageData
from utils.images.sources import load_data
from utils.profile import Profile
from utils.pruning import plan_pruning, slim
from utils.run import choosing, lab
from utils.run.identity import Run
from utils.run.machine import pick_device
from utils.store.files import alone, json_digest, write_json
from utils.store.resume import weights_digest
from utils.training import DivergenceError, evaluate

CELL = ("l1_lambda", "pruning_ratio", "seed")
"""The columns that say which row it is."""
COLUMNS = (
    *CELL, "realised_ratio", "macs", "parameters", "sparsity",
    "trained_accuracy", "raw_accuracy", "repaired_accuracy", "finetuned_accuracy", "reason",
)  # fmt: skip
"""Of the table; accuracies are in % of the test images, sparsity is that of the trained network.
A pruning_ratio of 0 is the trained network itself. `reason`: why a number is missing."""
NOT_TRAINED, NOT_FINETUNED = "not trained: ", "not fine-tuned: "
"""What the `reason` of a cut begins with that only repeats what is wrong with its training."""
HandOut = Callable[[list["Task"]], Iterator[dict]]
"""Has tasks done, and yields their rows as they come."""
DONE_ELSEWHERE = ("l1_lambdas", "pruning_ratios", "multipass_ratios")
"""Fields of a profile on which a task does not depend: it has a λ and a ratio of its own."""


class Task(NamedTuple):
    """One network to make, and one row of the table."""

    run: Run
    l1_lambda: float
    pruning_ratio: float = 0.0
    """0: train it. Else cut the trained one, and fine-tune."""

    @property
    def file(self) -> Path:
        return self.run.checkpoints / f"row_{self.l1_lambda:g}_{self.pruning_ratio:g}.json"

    @property
    def follows_from(self) -> str:
        """16 hex digits that stand for all that the row depends on."""
        settings = {k: v for k, v in self.run.settings.items() if k not in DONE_ELSEWHERE}
        facts = [settings, self.run.data["digest"], self.l1_lambda, self.pruning_ratio]
        return json_digest(facts)

    @property
    def cell(self) -> tuple[float, float, int]:
        """The row's place in the table."""
        return self.l1_lambda, self.pruning_ratio, self.run.profile.seed

    @property
    def name(self) -> str:
        """The same for the same work, and for no other."""
        return f"{self.run.name} {self.file.stem} {self.follows_from}"

    def row(self, **values) -> dict:
        return dict.fromkeys(COLUMNS) | dict(zip(CELL, self.cell, strict=True)) | values


def trainings(runs: Iterable[Run]) -> list[Task]:
    """A task for each λ of each run."""
    return [Task(run, l1_lambda) for run in runs for l1_lambda in run.profile.l1_lambdas]


def cuts(training: Task) -> list[Task]:
    """The tasks that share the network of `training`: one for each ratio."""
    return [training._replace(pruning_ratio=r) for r in training.run.profile.pruning_ratios]


def planned(runs: Iterable[Run]) -> list[Task]:
    """Every task of a sweep."""
    return [task for first in trainings(runs) for task in (first, *cuts(first))]


def finished(task: Task) -> dict | None:
    """The row of `task`, if it has been done with these settings."""
    try:
        content = json.loads(task.file.read_text("utf-8"))
        return content["row"] if content["follows_from"] == task.follows_from else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole: done again
        return None


def do(task: Task) -> dict:
    """The row of `task`: read if it is there, else made by the stages of the notebooks.

    What goes wrong is the row's `reason`. A divergence would come again, so it is kept; what may go
    well next time (memory, a full disk) is not.
    """
    torch.set_num_threads(1)  # as many tasks as cores run at once; and the same bits everywhere
    # A worker of a sweep that was killed goes on with its task to the end.
    with alone(task.file):
        if row := finished(task):
            return row
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the sweep has a bar of its own
                try:
                    row = _cut(task) if task.pruning_ratio else _trained(task)
                except DivergenceError as error:
                    row = task.row(reason=str(error))
            write_json(task.file, {"follows_from": task.follows_from, "row": row})
        except Exception as error:
            return task.row(reason=f"{type(error).__name__}: {error}")
    return row


def _trained(task: Task) -> dict:
    data = _images(task.run.profile.data)
    trained = lab.train(task.run, data, task.l1_lambda)
    return _measured(task, trained, trained.model) | {
        "realised_ratio": 0.0,
        "reason": _why_useless(task, data, trained),
    }


def _cut(task: Task) -> dict:
    data = _images(task.run.profile.data)
    profile = replace(task.run.profile, l1_lambdas=(task.l1_lambda,))
    run = replace(task.run, profile=profile)
    trained = lab.trained_networks(run, data)[task.l1_lambda]
    plan = plan_pruning(trained.model, task.pruning_ratio, min_channels=profile.min_channels)
    # Two ratios close together may keep the same channels, and then share their files.
    with alone(run.checkpoints / f"kept_{plan.kept}_of_{weights_digest(trained.model)}"):
        slimmed = lab.cut_on(run, data, trained.model, plan)
        row = _measured(task, trained, slimmed) | {
            "realised_ratio": plan.realised_ratio,
            "raw_accuracy": _accuracy(slim(trained.model, plan), data, profile),
            "repaired_accuracy": _accuracy(slimmed, data, profile),
        }
        if why := _why_useless(task, data, trained):
            return row | {"reason": NOT_FINETUNED + why}
        try:
            history = lab.finetune(run, data, slimmed).history
        except DivergenceError as error:
            return row | {"reason": str(error)}
    return row | {"finetuned_accuracy": history.test_accuracy[-1]}


def _why_useless(task: Task, data: ImageData, trained: lab.Trained) -> str | None:
    networks = {task.l1_lambda: trained}
    verdict = choosing.judge(task.run, data, networks, task.pruning_ratio)[task.l1_lambda]
    return None if verdict.works else verdict.reason


def _measured(task: Task, trained: lab.Trained, network: torch.nn.Module) -> dict:
    return task.row(
        macs=macs(network),
        parameters=num_parameters(network),
        sparsity=trained.history.sparsity[-1],
        trained_accuracy=trained.history.test_accuracy[-1],
    )


def _accuracy(network: torch.nn.Module, data: ImageData, profile: Profile) -> float:
    return evaluate(network, data.plain_batches("test", profile.test_batch_size)).accuracy


@functools.lru_cache(maxsize=1)
def _images(name: str) -> ImageData:
    """The images, read once by each worker."""
    return load_data(name).to(pick_device())


def missing_rows(runs: Iterable[Run], hand_out: HandOut) -> Iterator[dict]:
    """The rows that no file has yet, as they come: the trained networks, then all that is cut."""
    first = trainings(runs)
    done = [finished(task) for task in first]
    rows = [row for row in done if row]
    for row in hand_out([task for task, row in zip(first, done, strict=True) if not row]):
        rows.append(row)
        yield row
    failed = {(r["l1_lambda"], r["seed"]): r["reason"] for r in rows if r["macs"] is None}
    tasks = []
    for task in itertools.chain.from_iterable(map(cuts, first)):
        if why := failed.get((task.l1_lambda, task.run.profile.seed)):
            yield task.row(reason=NOT_TRAINED + why)
        elif not finished(task):
            tasks.append(task)
    yield from hand_out(tasks)
