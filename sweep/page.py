"""What a sweep found: its table, three figures and a page. Every ± is over the seeds."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sweep.tasks import CELL, COLUMNS
from utils.plots import panels, save, style, text
from utils.run.identity import Run
from utils.run.page import compose_page, markdown
from utils.store.files import write_whole

TABLE = "results.csv"
STEPS = {
    "raw_accuracy": "raw cut", "repaired_accuracy": "repaired", "finetuned_accuracy": "fine-tuned"
}  # fmt: skip


def write_table(rows: Iterable[dict], path: Path) -> None:
    """A CSV file with COLUMNS, sorted by λ, ratio and seed; empty where there is no value."""
    table = pd.DataFrame(list(rows), columns=COLUMNS, dtype=object).sort_values(list(CELL))
    write_whole(path, table.to_csv(index=False, lineterminator="\n").encode("utf-8"))


def read_table(path: Path) -> pd.DataFrame:
    """The table, with each network's own `accuracy` beside it, and shares in %."""
    table = pd.read_csv(path)
    trained = table["pruning_ratio"] == 0
    final = table["trained_accuracy"].where(trained, table["finetuned_accuracy"])
    shares = {"pruned": 100 * table["pruning_ratio"], "sparse": 100 * table["sparsity"]}
    return table.assign(accuracy=final, **shares)


def write_page(folder: Path, run: Run) -> None:
    """The figures of the table in `folder`, and README.md that shows them: no date, no duration, so
    the same table makes the same page. `run`: any of the sweep."""
    table, images, profile = read_table(folder / TABLE), run.data["name"], run.profile
    for draw in (accuracy_against_macs, accuracy_against_ratio, sparsity_against_lambda):
        save(draw(table, images), folder / f"{draw.__name__}.png")
    said = table.dropna(subset="reason").drop_duplicates(["l1_lambda", "seed", "reason"])
    reasons = [
        f"- λ = {r.l1_lambda:g}, seed {r.seed}, {r.pruned:g}% pruned: {r.reason}"
        for r in said.itertuples()
    ]
    epochs, seeds = f"{profile.epochs} + {profile.finetune_epochs}", table["seed"].nunique()
    settings = f"{images}, VGG-{profile.depth} at width {profile.width:g}, {epochs} epochs, "
    settings += f"{seeds} seeds, {profile.precision}, last epoch. "
    body = [
        "Test accuracy in %, mean ± deviation over the seeds; of slim networks after fine-tuning.",
        markdown(_means(table)),
        *(["Not done, or not gone on with:", "\n".join(reasons)] if reasons else []),
    ]
    compose_page(folder, settings, run.machine, *body, by="sweep", source=TABLE)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each λ, a column for each ratio; an en dash where no network came to its end."""

    def cell(values: pd.Series) -> str:
        deviation = f" ± {values.std():.2f}" if values.count() > 1 else ""
        return f"{values.mean():.2f}{deviation}" if values.count() else "–"

    at = [table["l1_lambda"].map("{:g}".format).rename("λ"), table["pruned"]]
    means = table.groupby(at, sort=False)["accuracy"].agg(cell).unstack(fill_value="–")
    return means.rename(columns=lambda p: f"{p:g}% pruned" if p else "trained")


def _mean_lines(ax: Axes, rows: pd.DataFrame, x: str, **labels: str) -> None:
    """A line for each column that `labels` names: mean and deviation over the seeds."""
    for y, label in labels.items():
        groups = rows.dropna(subset=y).groupby(["l1_lambda", "pruning_ratio"])
        (at, mean), deviation = groups[[x, y]].mean().to_numpy().T, groups[y].std().fillna(0)
        ax.errorbar(at, mean, deviation, fmt="o-", capsize=3, label=label)
    ax.grid(alpha=0.3)


@style()
def accuracy_against_macs(table: pd.DataFrame, data: str) -> Figure:
    """One line per λ over the MACs of its networks, and a ring around each that no other beats in
    both. What has a `reason`, such as a collapse, is left out: it would squeeze all others."""
    figure, ((ax,),) = panels(1, width=7.5, height=4.6)
    sound = table[table["reason"].isna()].assign(macs=lambda t: t["macs"] / 1e6)
    for l1_lambda, rows in sound.groupby("l1_lambda"):
        _mean_lines(ax, rows, "macs", accuracy=f"λ = {l1_lambda:g}")
    points = sound.groupby(["l1_lambda", "pruning_ratio"])[["macs", "accuracy"]].mean()
    dense = points.query("pruning_ratio == 0")
    ax.plot(*dense.to_numpy().T, "wD", markeredgecolor="gray", label="not fine-tuned")
    best = points.sort_values(["macs", "accuracy"], ascending=[True, False])
    front = best[best["accuracy"] > best["accuracy"].cummax().shift(fill_value=-1)]
    ax.plot(*front.to_numpy().T, "ko", fillstyle="none", markersize=13, label="Pareto front")
    ax.set(xscale="log", xlabel="MACs of one image (million, log scale)")
    ax.set(ylabel="test accuracy (%)", title=f"Accuracy against work: {text(data)}")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@style()
def accuracy_against_ratio(table: pd.DataFrame, data: str) -> Figure:
    """One panel per λ: test accuracy after the raw cut, repaired and fine-tuned."""
    by_lambda = table.groupby("l1_lambda")
    wide = max(3.0, 6.4 / len(by_lambda))  # a title's room, with a single λ, too
    figure, (axes,) = panels(len(by_lambda), width=wide, height=3.3, sharey=True)
    for ax, (l1_lambda, rows) in zip(axes, by_lambda, strict=True):
        _mean_lines(ax, rows, "pruned", **STEPS)
        before = rows["trained_accuracy"][rows["pruned"] == 0].mean()
        ax.axhline(before, color="gray", ls=":", label="before the cut")
        ax.set(title=f"λ = {l1_lambda:g}", xlabel="channels pruned (%)", ylim=(0, 103))
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"What a cut costs, and what comes back: {text(data)}")
    return figure


@style()
def sparsity_against_lambda(table: pd.DataFrame, data: str) -> Figure:
    """Share of channels with |γ| near 0 in the trained networks, and their test accuracy."""
    figure, ((ax,),) = panels(1, width=6, height=3.8)
    dense = table[table["pruned"] == 0].assign(at=lambda t: t["l1_lambda"].rank(method="dense"))
    labels = {"sparse": "sparsity (% of the channels)", "accuracy": "test accuracy (%)"}
    _mean_lines(ax, dense, "at", **labels)
    ticks = dense.drop_duplicates("at")  # evenly spaced, 0 beside the smallest
    ax.set_xticks(ticks["at"], ticks["l1_lambda"].map("{:g}".format))
    ax.set(xlabel="λ", ylabel="%", ylim=(0, 103), title=f"What λ does: {text(data)}")
    ax.legend()
    return figure
