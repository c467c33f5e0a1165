"""What a hand-in must hold: its names, its numbers, notebooks executed in one run."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

NOTEBOOKS = ("sparsity_train.ipynb", "vggprune.ipynb", "train_prune_model.ipynb")
ARCHIVE = "EAI_Lab4_{student}.zip"
REPORT = "EAI_Lab4_{student}_Report.pdf"
STUDENT = r"[A-Za-z0-9_-]{1,40}"
COURSE = {"λ": (0.0, 1e-4, 1e-2), "pruning ratio": (0.5, 0.9)}
"""What the course asks for, on CIFAR-10."""

Accuracy = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
OnePerEpoch = Field(min_length=1)


class Evaluation(BaseModel):
    loss: FiniteFloat
    accuracy: Accuracy
    correct: int
    images: int


class Curves(BaseModel):
    """A training, one entry an epoch."""

    lr: list[FiniteFloat] = OnePerEpoch
    train_accuracy: list[Accuracy] = OnePerEpoch
    test_accuracy: list[Accuracy] = OnePerEpoch

    @model_validator(mode="after")
    def _same_length(self):
        lists = [value for value in dict(self).values() if isinstance(value, list)]
        if len({len(values) for values in lists}) > 1:
            raise ValueError("lists of different lengths")
        return self


class Trained(Curves):
    l1_lambda: FiniteFloat
    sparsity: list[Share] = OnePerEpoch


class Tuned(Curves):
    network: str
    pruning_ratio: Share | None = None
    test: Evaluation


class Stages(BaseModel):
    """A network around its cut; repaired: without training."""

    before: Evaluation = Field(alias="before the cut")
    raw: Evaluation = Field(alias="raw cut")
    repaired: Evaluation = Field(alias="β absorbed, BN recalibrated")


class Cut(BaseModel):
    pruning_ratio: Share
    realised_ratio: Share
    threshold: FiniteFloat
    l1_lambda: FiniteFloat
    cfg: list[Annotated[int, Field(ge=1)] | Literal["M"]]
    evaluations: Stages


class Settings(BaseModel):
    """The profile, as far as the report names it."""

    depth: int
    width: FiniteFloat
    epochs: int
    seed: int
    pruning_ratios: list[Share] = Field(min_length=1)


class Section(BaseModel):
    """What one notebook found, in the run with this id."""

    run: str = Field(pattern=r"^[0-9a-f]{16}$")
    data: str
    profile: Settings


class SparsityTrain(Section):
    runs: list[Trained] = Field(min_length=1)


class VggPrune(Section):
    cuts: list[Cut]


class Row(BaseModel):
    stage: str
    accuracy: Accuracy = Field(alias="test accuracy (%)")


class TrainPruneModel(Section):
    finetuning: list[Tuned]
    table: list[Row]

    def dense_accuracy(self) -> float:
        """Of the network trained with the weakest penalty, usually none, in %."""
        return next(row.accuracy for row in self.table if row.stage == "dense")


class Results(BaseModel):
    """results.json: every number that the report shows."""

    sparsity_train: SparsityTrain
    vggprune: VggPrune
    train_prune_model: TrainPruneModel

    @model_validator(mode="after")
    def _nothing_missing(self):
        pruned, finetuned = self.vggprune, self.train_prune_model
        for ratio in pruned.profile.pruning_ratios:
            for name, rows in (("cut", pruned.cuts), ("fine-tuning", finetuned.finetuning)):
                if ratio not in [row.pruning_ratio for row in rows]:
                    raise ValueError(f"no {name} at {100 * ratio:g}%")
        if "dense" not in [row.stage for row in finetuned.table]:
            raise ValueError("no dense network in the table")
        return self

    def cuts(self) -> list[tuple[Cut, Tuned]]:
        """Each pruning ratio of the run: its cut and its fine-tuning."""
        by_ratio = {cut.pruning_ratio: cut for cut in self.vggprune.cuts}
        tuned = {row.pruning_ratio: row for row in self.train_prune_model.finetuning}
        return [(by_ratio[r], tuned[r]) for r in self.vggprune.profile.pruning_ratios]

    def lacks(self) -> list[str]:
        """What the course asks for and this run does not have."""
        data, ratios = self.sparsity_train.data, self.vggprune.profile.pruning_ratios
        has = {"λ": [run.l1_lambda for run in self.sparsity_train.runs], "pruning ratio": ratios}
        images = [] if data.startswith("CIFAR-10") else [f"CIFAR-10 (its images: {data})"]
        return images + [f"{k} = {v:g}" for k in COURSE for v in COURSE[k] if v not in has[k]]


class Images(BaseModel):
    train: int
    test: int
    classes: list[str] = Field(min_length=2)


class Run(BaseModel):
    """run.json: which run it is, on which images. Equal settings give equal ids; two runs that also
    began in the same second are one."""

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    name: str
    began: str
    data: Images
    trained_in: str = ""


NEEDED = (*NOTEBOOKS, "run.json", "results.json")
"""The files that show what a run found."""


def inspect(files: Mapping[str, bytes]) -> tuple[Run | None, Results | None, list[str]]:
    """The contents of run.json and results.json, and all that is wrong with the NEEDED `files`."""
    problems = [f"{name}: missing" for name in NEEDED if name not in files]
    ids, began = {}, {}
    for name in NOTEBOOKS:
        if name in files:
            (ids[name], began[name]), wrong = _inspect_notebook(files[name])
            problems += [f"{name}: {what}" for what in wrong]
    run = _read(Run, "run.json", files, problems)
    results = _read(Results, "results.json", files, problems)
    ids |= {"run.json": run.id} if run else {}
    ids |= {f"results.json, {name}": section.run for name, section in results or ()}
    for name, when in began.items():
        if run and when and when != run.began:
            problems.append(f"{name}: of a run begun {when}, that of run.json began {run.began}")
    known = {name: value for name, value in ids.items() if value}
    if len(set(known.values())) > 1:
        listed = "; ".join(f"{name} of {value}" for name, value in known.items())
        problems.append(f"of several runs: {listed}")
    return run, results, problems


def _read(kind: type[BaseModel], name: str, files: Mapping[str, bytes], problems: list[str]):
    try:
        return kind.model_validate_json(files[name]) if name in files else None
    except ValidationError as error:
        for wrong in error.errors():
            problems.append(f"{name}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}")
        return None


def _in_one_go(counts: list) -> bool:
    """1, 2, 3 …; only the last cell, which hands in, may have been run again."""
    numbers = all(isinstance(count, int) for count in counts)
    expected = list(range(1, len(counts)))
    return numbers and bool(counts) and counts[:-1] == expected and counts[-1] >= len(counts)


def _inspect_notebook(content: bytes) -> tuple[tuple[str | None, str | None], list[str]]:
    """Of which run the outputs are, its id and when it began, and what is wrong with them."""
    try:
        code = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
        code = [cell for cell in code if "".join(cell["source"]).strip()]
        counts = [cell["execution_count"] for cell in code]
        outputs = [output for cell in code for output in cell["outputs"]]
        kinds = [output["output_type"] for output in outputs]
        plots = any("image/png" in output.get("data", {}) for output in outputs)
        printed = "".join("".join(output.get("text", "")) for output in outputs)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return (None, None), ["not a readable notebook"]
    runs = sorted(set(re.findall(r"Run \S+ · id ([0-9a-f]{16})\n.* · begun (.{1,40})", printed)))
    found = {
        "not executed top to bottom in one go": not _in_one_go(counts),
        "an error in its outputs": "error" in kinds,
        "no plot in it": not plots,
        "does not print its run": not runs,
        f"outputs of several runs ({'; '.join(map(', begun '.join, runs[:4]))})": len(runs) > 1,
    }
    of_run = runs[0] if len(runs) == 1 else (None, None)
    return of_run, [what for what, bad in found.items() if bad]
