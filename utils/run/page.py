"""The tables of results.json, and the page in a run's folder that shows them.

python -m utils.run.page figures/quick        # print the tables, and write its README.md
python -m utils.run.page README.md            # make the tables quoted in a file anew
"""

import re
import sys
from pathlib import Path

import pandas as pd

from models.vgg import widths
from utils.repair import RUNGS
from utils.run.deployment import IMAGES, INT8, gains
from utils.run.results import FILE, NOTEBOOKS, not_of, read
from utils.store.files import write_whole

FORMATS = {"λ": "{:g}", "sparsity": "{:.3f}", "median |γ|": "{:.1e}", "parameters": "{:,}"}
FORMATS |= dict.fromkeys(("file (kB)", "ONNX float32 (kB)", "ONNX int8 (kB)"), "{:,.0f}")
MARKER = r"(<!-- python -m utils\.run\.page (\S+) (\w+) -->\n)"
QUOTED = re.compile(MARKER + r"(?:(?!<!--).)*(<!-- end -->)", re.S)
SETTINGS = "{data}, VGG-{depth} at width {width}, {epochs} + {finetune_epochs} epochs, "
SETTINGS += "seed {seed}, {precision}, last epoch. "
REPORT = {  # test accuracy in % on CIFAR-10 in the coursework report that this lab starts from
    "50% pruned": {"report: right after": "10.0", "report: fine-tuned": "92.6"},
    "90% pruned": {"report: right after": "10.0", "report: fine-tuned": "87.1"},
}


def _beside_the_report(cuts: list[dict], tuned: dict) -> list[dict]:
    """A row for each ratio of the report that the run has fine-tuned."""
    ended = [row for row in tuned.get("table", []) if row["stage"] == "finetuned"]
    ended = {row["network"].rpartition(", ")[2]: row for row in ended}
    in_int8 = [row for row in gains(tuned.get("speed", [])) if row["runtime"] == INT8]
    times = {row["network"]: " / ".join(row[f"{n}, in all"] for n in IMAGES) for row in in_int8}
    cut = {f"{100 * c['pruning_ratio']:g}% pruned": c for c in cuts}
    rows = []
    for name in [name for name in cut if name in REPORT and name in ended]:
        row = {"channels cut": name.removesuffix(" pruned"), **REPORT[name]}
        row |= {"ours: right after": cut[name][RUNGS[0]], "repaired": cut[name][RUNGS[-1]]}
        row |= {"fine-tuned": ended[name]["test accuracy (%)"]}
        row |= {column: ended[name][column] for column in ("parameters", "MACs (M)")}
        rows.append(row | {"faster, 1 / 256 images": times.get(name)})
    return rows


def formatted(rows: list[dict]) -> pd.DataFrame:
    """Rows as text, indexed by the first column: as FORMATS says, else floats with two places."""

    def text(column: str, value: object) -> str:
        form = FORMATS.get(column, "{:.2f}" if isinstance(value, float) else "{}")
        return "" if value is None else form.format(value)

    table = pd.DataFrame([{k: text(k, v) for k, v in row.items()} for row in rows]).fillna("")
    return table.set_index(table.columns[0]) if rows else table


def tables(results: dict) -> dict[str, pd.DataFrame]:
    """The tables, by name, of what has run. Raises ValueError if a section lacks what one shows."""
    try:
        rows = _rows(*(results.get(name, {}) for name in NOTEBOOKS))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{FILE}: a section lacks {error}; run its notebook again") from None
    return {name: formatted(found) for name, found in rows.items() if found}


def _rows(trained: dict, cut: dict, tuned: dict) -> dict[str, list[dict]]:
    latency: dict[str, dict] = {}
    for s in tuned.get("speed", []):
        row = latency.setdefault(s["network"], {"network": s["network"]})
        row[f"{s['runtime']}, {s['images']} (ms)"] = s["ms"]
    cuts = cut.get("cuts", [])
    return {
        "training": [
            {"λ": r["l1_lambda"], **_last(r), "sparsity": r["sparsity"][-1]}
            | {k: r[k] for k in ("median |γ|",) if k in r}
            for r in trained.get("runs", [])
        ],
        "cuts": [
            {"pruned": f"{100 * c['pruning_ratio']:g}%", "λ": c["l1_lambda"]}
            | {name: c[name] for name in ("before the cut", *RUNGS)}
            for c in cuts
        ],
        "networks": [
            {k: v for k, v in row.items() if k != "stage" and not k.endswith("(kB)")}
            for row in tuned.get("table", [])
        ],
        "latency": [*latency.values()],
        "finetuned": [
            {"network": r["network"], **_last(r)}
            | {"channels kept in each layer": " ".join(map(str, widths(r["cfg"])))}
            for r in tuned.get("finetuning", [])
        ],
        "ways": tuned.get("ways", []),
        "beside": _beside_the_report(cuts, tuned) if cut.get("data") == "CIFAR-10" else [],
    }


def _last(history: dict) -> dict[str, float]:
    """The accuracies of the last epoch."""
    parts = {"training": "train_accuracy", "test": "test_accuracy"}
    return {f"{part} accuracy (%)": history[column][-1] for part, column in parts.items()}


def whole_page(folder: str | Path) -> str:
    """What the notebooks found, as tables in Markdown; what is missing or another run's is said."""
    results = read(folder)
    # A run that cuts what another trained (save_as) has no section of the first notebook.
    run_id = next((results[name].get("run") for name in NOTEBOOKS if name in results), None)
    said = []
    for name in NOTEBOOKS:
        if why := not_of(run_id, results, name) if name in results else "has not run":
            said.append(f"{name}.ipynb {why}.")
            results.pop(name, None)
    shown = [markdown(table) for name, table in tables(results).items() if name != "beside"]
    return "\n\n".join([*shown, *said])


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown that also reads well as plain text; figures to the right."""
    align = ("left", *["right"] * len(table.columns))
    return table.to_markdown(colalign=align, disable_numparse=True)


def refresh(text: str) -> str:
    """`text` with each table made anew that a marker names; ValueError where there is none such."""

    def quote(match: re.Match) -> str:
        found = tables(read(match[2]))
        if match[3] not in found:
            raise ValueError(f"{match[2]}: no table {match[3]!r}, there are {', '.join(found)}")
        return f"{match[1]}\n{markdown(found[match[3]])}\n\n{match[4]}"

    return QUOTED.sub(quote, text)


def write_page(folder: Path) -> None:
    """README.md in `folder`: whose results these are, the tables, the pictures."""
    results = read(folder)
    last = next((results[name] for name in reversed(NOTEBOOKS) if name in results), {})
    said = SETTINGS.format(**last["profile"] | {"data": last["data"]}) if last else ""
    about = {"by": "utils.run.page", "source": FILE}
    compose_page(folder, said, last.get("machine", {}), whole_page(folder), **about)


def compose_page(folder: Path, settings: str, machine: dict, *body: str, by: str, source: str):
    """README.md in `folder`: settings, machine, `body`, every picture there, and who wrote it."""
    lines = [
        f"# {folder.name}",
        settings + ", ".join(f"{name} {value}" for name, value in machine.items()),
        *body,
        *(f"![{p.stem.replace('_', ' ')}]({p.name})" for p in sorted(folder.glob("*.png"))),
        f"*Written by `python -m {by}`, from {source}.*",
    ]
    write_whole(folder / "README.md", ("\n\n".join(lines) + "\n").encode("utf-8"))


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # λ, on Windows too
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = Path(sys.argv[1])
    try:
        if path.suffix == ".md":
            write_whole(path, refresh(path.read_text("utf-8")).encode("utf-8"))
        else:
            write_page(path)
            print(whole_page(path))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
