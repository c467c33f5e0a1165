"""What a hand-in must hold: its names, its numbers, notebooks executed in one run."""

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # as pydantic needs them before Python 3.12

from utils.profile import Profile
from utils.repair import RUNGS
from utils.run.results import NOTEBOOKS as STEMS

NOTEBOOKS = tuple(f"{name}.ipynb" for name in STEMS)
NEEDED = (*NOTEBOOKS, "run.json", "results.json")  # what shows what a run found
ARCHIVE = "EAI_Lab4_{student}.zip"
REPORT = "EAI_Lab4_{student}_Report.pdf"
STUDENT = r"[A-Za-z0-9_-]{1,40}"
COURSE = {"λ": (0.0, 1e-4, 1e-2), "pruning ratio": (0.5, 0.9)}  # asked for, on CIFAR-10


def _record(**fields: type) -> type:
    """What a record must hold, for pydantic; what else is in it is left out."""
    return TypedDict("Record", fields)


Measured = _record(loss=float, accuracy=float, correct=int, images=int)
EPOCHS = dict.fromkeys(("lr", "train_accuracy", "test_accuracy", "sparsity"), list[float])
Trained = _record(l1_lambda=float, **EPOCHS)
Tuned = _record(network=str, pruning_ratio=NotRequired[float | None], test=Measured, **EPOCHS)
Cut = _record(
    **dict.fromkeys(("pruning_ratio", "realised_ratio", "threshold", "l1_lambda"), float),
    cfg=list[int | Literal["M"]],
    evaluations=_record(**dict.fromkeys(("before the cut", RUNGS[0], RUNGS[-1]), Measured)),
)
SECTION = {"run": str, "data": str, "profile": Profile}
Sections = _record(
    sparsity_train=_record(**SECTION, runs=list[Trained]),
    vggprune=_record(**SECTION, cuts=list[Cut]),
    train_prune_model=_record(**SECTION, finetuning=list[Tuned]),
)
Results = Annotated[Sections, AfterValidator(lambda found: cuts(found) and found)]
RunFile = _record(id=str, began=str)  # equal settings give equal ids, but begin at another second


def cuts(results: Results) -> list[tuple[dict, dict]]:
    """Each pruning ratio of the run: its cut and its fine-tuning. Raises ValueError without one."""
    ratios = results["vggprune"]["profile"].pruning_ratios
    cut = {row["pruning_ratio"]: row for row in results["vggprune"]["cuts"]}
    tuned = {row.get("pruning_ratio"): row for row in results["train_prune_model"]["finetuning"]}
    for ratio in [ratio for ratio in ratios if ratio not in cut or ratio not in tuned]:
        raise ValueError(f"no {'fine-tuning' if ratio in cut else 'cut'} at {100 * ratio:g}%")
    return [(cut[ratio], tuned[ratio]) for ratio in ratios]


def lacks(results: Results) -> list[str]:
    """What the course asks for and this run does not have."""
    trained, ratios = results["sparsity_train"], results["vggprune"]["profile"].pruning_ratios
    has = {"λ": [run["l1_lambda"] for run in trained["runs"]], "pruning ratio": ratios}
    is_cifar10 = re.match(r"cifar-?10(?!\d)", trained["data"], re.IGNORECASE)
    images = [f"CIFAR-10 (its images: {trained['data']})"] * (not is_cifar10)
    return images + [f"{k} = {v:g}" for k in COURSE for v in COURSE[k] if v not in has[k]]


def inspect(files: Mapping[str, bytes]) -> tuple[RunFile | None, Results | None, list[str]]:
    """The contents of run.json and results.json, and all that is wrong with the NEEDED `files`."""
    problems = [f"{name}: missing" for name in NEEDED if name not in files]
    run = _read(RunFile, "run.json", files, problems)
    results = _read(Results, "results.json", files, problems)
    ids = {"run.json": run["id"]} if run else {}
    ids |= {f"results.json, {name}": part["run"] for name, part in (results or {}).items()}
    for name in [name for name in NOTEBOOKS if name in files]:
        runs, wrong = inspect_notebook(files[name])
        for ids[name], began in runs[:1]:
            if run and began != run["began"]:
                wrong.append(f"of a run begun {began}, run.json: begun {run['began']}")
        problems += [f"{name}: {what}" for what in wrong]
    if len(set(ids.values())) > 1:
        problems.append(f"of several runs: {'; '.join(f'{n} of {v}' for n, v in ids.items())}")
    return run, results, problems


def _read(kind: type, name: str, files: Mapping[str, bytes], problems: list[str]):
    """A file as `kind`; None, with each fault as "file: field = value: what is wrong"."""
    try:
        return TypeAdapter(kind).validate_json(files[name]) if name in files else None
    except ValidationError as error:
        for wrong in error.errors():
            value = f" = {reprlib.repr(wrong['input'])}" if wrong["type"] != "missing" else ""
            problems.append(f"{name}: {'.'.join(map(str, wrong['loc']))}{value}: {wrong['msg']}")


def inspect_notebook(content: bytes) -> tuple[list[tuple[str, str]], list[str]]:
    """The runs that its outputs are of, id and when begun of each, and what is wrong with them."""
    try:
        code = [cell for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
        code = [cell for cell in code if "".join(cell["source"]).strip()]
        outputs = [output for cell in code for output in cell["outputs"]]
        plots = ["image/png" in output.get("data", {}) for output in outputs]
        printed = "".join("".join(output.get("text", "")) for output in outputs)
        errors = [output["output_type"] == "error" for output in outputs]
        *first, last = [cell["execution_count"] for cell in code] or [None]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [], ["not a readable notebook"]
    # 1, 2, 3 …; only the last cell, which hands in, may have been run again.
    in_one_go = first == [*range(1, len(code))] and type(last) is int and last >= len(code)
    runs = sorted(set(re.findall(r"Run \S+ · id ([0-9a-f]{16})\n.* · begun (.{1,40})", printed)))
    found = {
        "not executed top to bottom in one go": not in_one_go,
        "an error in its outputs": any(errors),
        "no plot in it": not any(plots),
        "does not print its run": not runs,
        f"outputs of several runs ({'; '.join(map(', begun '.join, runs[:4]))})": len(runs) > 1,
    }
    return runs, [what for what, bad in found.items() if bad]
