"""figures/<run>/results.json: every number of a run, and the tables that show them.

python -m utils.run.results figures/quick        # print the tables, and write its README.md
python -m utils.run.results README.md            # make the tables quoted in a file anew
"""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from models.vgg import widths
from utils.run.identity import Run
from utils.run.machine import describe_machine
from utils.store.files import file_lock, json_digest, write_json, write_whole

FILE = "results.json"
NOTEBOOKS = ("sparsity_train", "vggprune", "train_prune_model")
"""The sections of the file, one per notebook, each of which builds on those before it."""
FORMATS = {
    "λ": "{:g}",
    "sparsity": "{:.3f}",
    "median |γ|": "{:.1e}",
    "parameters": "{:,}",
    **dict.fromkeys(("file (kB)", "ONNX float32 (kB)", "ONNX int8 (kB)"), "{:,.0f}"),
}
"""How a column is written where it is not as usual: floats with two places, all else as it is."""
QUOTED = re.compile(
    r"(<!-- python -m utils\.run\.results (\S+) (\w+) -->\n)(?:(?!<!--).)*(<!-- end -->)", re.S
)


def record(run: Run, notebook: str, values: dict, device: torch.device | str) -> None:
    """Set the section `notebook` of the run's results, keeping those of the same run.

    Sections of another run, or of an earlier cut, are left out from then on, with a word.
    """
    path = run.figures / FILE
    with file_lock(path):  # between reading and writing, for two notebooks may end at once
        results = read(run.figures) if path.exists() else {}
        results[notebook] = {
            "run": run.id,
            "profile": asdict(run.profile),
            "data": run.data["name"],
            "machine": describe_machine(device),
            **values,
        }
        for other in [n for n in NOTEBOOKS if n in results and n != notebook]:
            if why := foreign(results, other, run.id):
                print(f"{path}: {other}.ipynb {why}: its old results are left out, run it again")
                del results[other]
        if notebook == "train_prune_model":
            results[notebook]["cut"] = _cut(results)
        write_json(path, results)


def foreign(results: dict, notebook: str, run_id: str) -> str:
    """Why the section `notebook` does not belong to the run `run_id`; "" if it does."""
    section = results[notebook]
    if section.get("run") != run_id:
        return "has shown another run"
    if notebook == "train_prune_model" and section.get("cut") != _cut(results):
        return "has shown the networks of an earlier cut"
    return ""


def _cut(results: dict) -> str:
    cuts = results.get("vggprune", {}).get("cuts")
    names = ("l1_lambda", "pruning_ratio", "min_channels", "cfg")
    said = [[c.get(name) for name in names] for c in cuts or () if isinstance(c, dict)]
    return json_digest(said)


def _folder(path: str | Path) -> Path:
    """`path`, or the folder it lies in if it is the file itself."""
    return Path(path).parent if Path(path).name == FILE else Path(path)


def read(folder: str | Path) -> dict:
    """The results in `folder`. Raises ValueError, naming the way out, if there are none to read."""
    path = _folder(folder) / FILE
    if not path.exists():
        raise ValueError(f"{path.resolve()}: no results here; give the folder figures/<run>")
    try:
        results = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.resolve()}: not readable as JSON ({error}); move it away"
        ) from None
    sound = isinstance(results, dict) and all(
        isinstance(results[name], dict) for name in results.keys() & {*NOTEBOOKS}
    )
    if not sound:
        raise ValueError(f"{path.resolve()}: not the results of a run; move it away")
    return results


def formatted(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table of text, each column in its format, indexed by the first; "" for nothing."""

    def text(column: str, value: object) -> str:
        if value is None or value == "":
            return ""
        form = FORMATS.get(column, "{:.2f}" if isinstance(value, float) else "{}")
        return form.format(value)

    columns = list(dict.fromkeys(c for row in rows for c in row))
    texts = [{c: text(c, row.get(c)) for c in columns} for row in rows]
    return pd.DataFrame(texts, columns=columns).set_index(columns[0])


def tables(results: dict) -> dict[str, pd.DataFrame]:
    """The tables of a run: training, cuts, networks, latency, finetuned, ways; none for what has
    not run.

    Raises ValueError if a section lacks what its table shows.
    """
    try:
        rows = _rows(*(results.get(name, {}) for name in NOTEBOOKS))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{FILE}: a section lacks {error}; run its notebook again") from None
    return {name: formatted(found) for name, found in rows.items() if found}


def _rows(trained: dict, cut: dict, tuned: dict) -> dict[str, list[dict]]:
    rungs = ("before the cut", "raw cut", "β absorbed", "BN recalibrated",
             "β absorbed, BN recalibrated")  # fmt: skip
    latency: dict[str, dict] = {}
    for s in tuned.get("speed", []):
        row = latency.setdefault(s["network"], {"network": s["network"]})
        row[f"{s['runtime']}, {s['images']} (ms)"] = s["ms"]
    return {
        "training": [
            {
                "λ": r["l1_lambda"],
                "training accuracy (%)": r["train_accuracy"][-1],
                "test accuracy (%)": r["test_accuracy"][-1],
                "sparsity": r["sparsity"][-1],
            }
            for r in trained.get("runs", [])
        ],
        "cuts": [
            {"pruned": f"{100 * c['pruning_ratio']:g}%", "λ": c["l1_lambda"]}
            | {name: c[name] for name in rungs}
            for c in cut.get("cuts", [])
        ],
        "networks": [
            {k: v for k, v in row.items() if k != "stage" and not k.endswith("(kB)")}
            for row in tuned.get("table", [])
        ],
        "latency": list(latency.values()),
        "finetuned": [
            {
                "network": r["network"],
                "training accuracy (%)": r["train_accuracy"][-1],
                "test accuracy (%)": r["test_accuracy"][-1],
                "channels kept in each layer": " ".join(map(str, widths(r["cfg"]))),
            }
            for r in tuned.get("finetuning", [])
        ],
        "ways": tuned.get("ways", []),
    }


def report(folder: str | Path) -> str:
    """What the notebooks found, as tables in Markdown; what is missing or foreign is said."""
    results = read(folder)
    # A run that cuts what another trained (save_as) has no section of the first notebook.
    run_id = next((results[name].get("run") for name in NOTEBOOKS if name in results), None)
    said = []
    for name in NOTEBOOKS:
        why = foreign(results, name, run_id) if name in results else "has not run"
        if why:
            said.append(f"{name}.ipynb {why}.")
            results.pop(name, None)
    return "\n\n".join([*map(markdown, tables(results).values()), *said])


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown that also reads well as plain text; figures to the right."""
    align = ("left", *["right"] * len(table.columns))
    return table.to_markdown(colalign=align, disable_numparse=True)


def refresh(text: str) -> str:
    """`text` with every quoted table made anew from the results that its marker names.

    Raises ValueError where there is no such table.
    """

    def quote(match: re.Match) -> str:
        found = tables(read(match[2]))
        if match[3] not in found:
            raise ValueError(f"{match[2]}: no table {match[3]!r}, there are {', '.join(found)}")
        return f"{match[1]}\n{markdown(found[match[3]])}\n\n{match[4]}"

    return QUOTED.sub(quote, text)


def write_page(folder: Path) -> None:
    """README.md in `folder`: whose results these are, the tables, the pictures."""
    results = read(folder)
    section = next((results[name] for name in reversed(NOTEBOOKS) if name in results), {})
    profile, machine = section.get("profile", {}), section.get("machine", {})
    settings = (
        f"{section.get('data')}, VGG-{profile.get('depth')} at width {profile.get('width')}, "
        f"{profile.get('epochs')} + {profile.get('finetune_epochs')} epochs, seed "
        f"{profile.get('seed')}, {profile.get('precision')}, last epoch. "
    )
    compose_page(folder, settings, machine, report(folder), by="utils.run.results", source=FILE)


def compose_page(
    folder: Path, settings: str, machine: dict, *body: str, by: str, source: str
) -> None:
    """README.md in `folder`: settings, machine, `body`, every picture there, and who wrote it."""
    lines = [
        f"# {folder.name}",
        settings + ", ".join(f"{name} {value}" for name, value in machine.items()),
        *body,
        *(f"![{p.stem.replace('_', ' ')}]({p.name})" for p in sorted(folder.glob("*.png"))),
        f"*Written by `python -m {by}`, from {source}.*",
    ]
    write_whole(folder / "README.md", ("\n\n".join(lines) + "\n").encode("utf-8"))


def main(argument: str) -> None:
    path = Path(argument)
    if path.suffix == ".md":
        write_whole(path, refresh(path.read_text("utf-8")).encode("utf-8"))
    else:
        folder = _folder(path)
        write_page(folder)
        print(report(folder))


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # λ, on Windows too
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(str(error))
