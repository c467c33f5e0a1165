"""What a sweep found: its table, three figures and a page. Every ± is over the seeds."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sweep.tasks import CELL, COLUMNS, NOT_FINETUNED, NOT_TRAINED
from utils.plots import panels, save
from utils.run.identity import Run
from utils.run.results import compose_page, markdown
from utils.store.files import write_whole

TABLE = "results.csv"


def write_table(rows: Iterable[dict], path: Path) -> None:
    """A CSV file with COLUMNS, sorted by λ, ratio and seed; empty where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: [row[name] for name in CELL]))
    write_whole(path, text.getvalue().encode("utf-8"))


def write_page(folder: Path, run: Run) -> None:
    """The figures of the table in `folder`, and README.md that shows them. `run`: any of the sweep.

    The page is a function of the table and the settings: no date, no duration.
    """
    table = pd.read_csv(folder / TABLE)
    images, profile = run.data["name"], run.profile
    draws = [accuracy_against_macs, accuracy_against_ratio]
    if table["l1_lambda"].nunique() > 1:  # else it would be a single point
        draws.append(sparsity_against_lambda)
    for draw in draws:
        save(draw(table, images), folder / f"{draw.__name__}.png")
    repeats = table["reason"].astype(str).str.startswith((NOT_TRAINED, NOT_FINETUNED))
    reasons = [
        f"- λ = {r.l1_lambda:g}, seed {r.seed}, "
        f"{f'{100 * r.pruning_ratio:g}% pruned' if r.pruning_ratio else 'trained'}: {r.reason}"
        for r in table[table["reason"].notna() & ~repeats].itertuples()
    ]
    settings = (
        f"{images}, VGG-{profile.depth} at width {profile.width:g}, {profile.epochs} + "
        f"{profile.finetune_epochs} epochs, {table['seed'].nunique()} seeds, {profile.precision}, "
        "last epoch. "
    )
    body = [
        "Test accuracy in %, mean ± deviation over the seeds: of the trained networks, and of the "
        "slim ones after fine-tuning.",
        markdown(_means(table)),
        *(["Not done, or not gone on with:", "\n".join(reasons)] if reasons else []),
    ]
    compose_page(folder, settings, run.machine, *body, by="sweep", source=TABLE)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each λ, a column for each ratio; an en dash where no network came to its end."""

    def text(values: pd.Series) -> str:
        found = values.dropna()
        if found.empty:
            return "–"
        return f"{found.mean():.2f}" + (f" ± {found.std():.2f}" if len(found) > 1 else "")

    at = [table["l1_lambda"].map("{:g}".format).rename("λ"), table["pruning_ratio"]]
    means = _final_accuracy(table).groupby(at, sort=False).agg(text).unstack()
    return means.rename(columns=lambda r: f"{100 * r:g}% pruned" if r else "trained")


def _final_accuracy(table: pd.DataFrame) -> pd.Series:
    trained = table["pruning_ratio"] == 0
    return table["trained_accuracy"].where(trained, table["finetuned_accuracy"])


def accuracy_against_macs(table: pd.DataFrame, data: str) -> Figure:
    """One line per λ over the MACs of its fine-tuned networks, the dense ones beside them, and a
    ring around each that no other beats in both (the Pareto front of the means).

    What has a `reason`, such as a collapse, is left out: its accuracy would squeeze all others.
    """
    figure, ((ax,),) = panels(1, width=7.5, height=4.6)
    ax.grid(alpha=0.3)
    at = ["l1_lambda", "pruning_ratio"]
    sound = table.assign(accuracy=_final_accuracy(table))[table["reason"].isna()]
    means = sound.dropna(subset="accuracy").groupby(at)
    points = means.agg(macs=("macs", "mean"), mean=("accuracy", "mean"), std=("accuracy", _std))
    for k, (l1_lambda, line) in enumerate(points.groupby(level="l1_lambda")):
        dense = line.index.get_level_values("pruning_ratio") == 0
        for part, style, label in (
            (line[~dense], "o-", f"λ = {l1_lambda:g}"),
            (line[dense], "D", None),
        ):
            ax.errorbar(
                part["macs"] / 1e6, part["mean"], part["std"], fmt=style, color=f"C{k}", capsize=3,
                label=label,
            )  # fmt: skip
    ax.plot([], [], "D", color="gray", label="not fine-tuned")
    best = points.sort_values(["macs", "mean"], ascending=[True, False])
    front = best[best["mean"] > best["mean"].cummax().shift(fill_value=-np.inf)]
    ax.plot(
        front["macs"] / 1e6, front["mean"], "o", color="black", fillstyle="none", markersize=13,
        label="Pareto front",
    )  # fmt: skip
    ax.set(xscale="log", xlabel="MACs of one image (million, log scale)")
    ax.xaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=""
    )
    ax.set(ylabel="test accuracy (%)", title=f"Accuracy against work: {data}")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def accuracy_against_ratio(table: pd.DataFrame, data: str) -> Figure:
    """One panel per λ: test accuracy after the raw cut, repaired and fine-tuned."""
    lambdas = sorted(table["l1_lambda"].unique())
    # Wide enough for the title, with a single λ, too.
    wide = max(3.0, 6.4 / len(lambdas))
    figure, (axes,) = panels(len(lambdas), width=wide, height=3.3, sharey=True)
    names = {"raw_accuracy": "raw cut", "repaired_accuracy": "repaired",
             "finetuned_accuracy": "fine-tuned"}  # fmt: skip
    for ax, l1_lambda in zip(axes, lambdas, strict=True):
        rows = table[table["l1_lambda"] == l1_lambda]
        for column, name in names.items():
            _mean_line(ax, rows, "pruning_ratio", column, label=name)
        before = rows["trained_accuracy"][rows["pruning_ratio"] == 0].mean()
        ax.axhline(before, color="gray", ls=":", label="before the cut")
        ax.set(title=f"λ = {l1_lambda:g}", xlabel="channels pruned (%)", ylim=(0, 103))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"What a cut costs, and what comes back: {data}")
    return figure


def sparsity_against_lambda(table: pd.DataFrame, data: str) -> Figure:
    """Share of channels with |γ| near 0 in the trained networks, and their test accuracy."""
    figure, ((ax,),) = panels(1, width=6, height=3.8)
    ax.grid(alpha=0.3)
    dense = table[table["pruning_ratio"] == 0].assign(sparsity=lambda t: 100 * t["sparsity"])
    dense["λ"] = dense["l1_lambda"].rank(method="dense")  # evenly spaced, 0 beside the smallest
    _mean_line(ax, dense, "λ", "sparsity", label="sparsity (% of the channels)")
    _mean_line(ax, dense, "λ", "trained_accuracy", label="test accuracy (%)")
    ticks = dense.drop_duplicates("λ")
    ax.set_xticks(ticks["λ"], ticks["l1_lambda"].map("{:g}".format))
    ax.set(xlabel="λ", ylabel="%", ylim=(0, 103), title=f"What λ does: {data}")
    ax.legend()
    return figure


def _mean_line(ax: Axes, rows: pd.DataFrame, x: str, y: str, label: str) -> None:
    groups = rows.dropna(subset=y).groupby(x)[y]
    at = groups.mean().index.to_numpy() * (100 if x == "pruning_ratio" else 1)
    ax.errorbar(at, groups.mean(), groups.agg(_std), fmt="o-", capsize=3, label=label)


def _std(values: pd.Series) -> float:
    """Of the sample; 0 for a single value."""
    return values.std() if len(values) > 1 else 0.0
