"""Each figure of the lab: numbers in, Figure out."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

TRAIN, TEST, SPARSITY = "tab:blue", "tab:green", "tab:orange"
LINES = ("-", "-.", ":")


def save(figure: Figure, path: Path) -> Figure:
    """Write the figure as a PNG and hand it on, so that a cell can end with this call."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return figure


def panels(n: int, rows: int = 1, width: float = 3.6, height: float = 3.2, **options):
    """A figure with `rows` × `n` panels as an array, closed for pyplot: the caller shows it."""
    figure, axes = plt.subplots(
        rows, n, figsize=(width * n, height * rows), layout="constrained", squeeze=False, **options
    )
    plt.close(figure)
    return figure, axes


def _along_epochs(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.3)


def sample_images(
    images: np.ndarray, labels: Sequence[int], classes: Sequence[str], title: str
) -> Figure:
    """A grid of images, uint8 (n, 3, h, w), ten a row, each with its class above."""
    columns = 10
    rows = -(-len(images) // columns)
    figure, axes = panels(columns, rows, width=1.0, height=1.2)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, label in zip(axes.flat, images, labels, strict=False):
        ax.imshow(np.transpose(image, (1, 2, 0)))
        ax.set_title(classes[label], fontsize=9)
    figure.suptitle(title)
    return figure


def training_curves(histories: Mapping[float, Mapping[str, list[float]]], data: str) -> Figure:
    """One panel per λ: training and test accuracy in % on the left, sparsity on the right."""
    figure, axes = panels(len(histories), sharex=True, sharey=True, width=4.4, height=3.8)
    for ax, (l1_lambda, history) in zip(axes[0], histories.items(), strict=True):
        rates = history["lr"]
        epochs = range(1, len(rates) + 1)
        ax.plot(epochs, history["train_accuracy"], color=TRAIN, label="training accuracy")
        ax.plot(epochs, history["test_accuracy"], color=TEST, label="test accuracy")
        for epoch in [k for k in epochs[:-1] if np.isclose(rates[k], rates[k - 1] / 10)]:
            ax.axvline(epoch + 0.5, color="gray", linewidth=1, linestyle=":", label="lr drops")
        ax.set(title=f"λ = {l1_lambda:g}", ylim=(-3, 103))  # 0 beside the frame
        _along_epochs(ax)
        right = ax.twinx()
        share = 100 * np.asarray(history["sparsity"])
        right.plot(epochs, share, color=SPARSITY, linestyle="--", label="sparsity")
        right.set_ylim(-3, 103)
        right.tick_params(axis="y", colors=SPARSITY)
        if ax is axes[0][-1]:
            right.set_ylabel("sparsity (% of the channels)", color=SPARSITY)
    axes[0][0].set_ylabel("accuracy (%)")
    lines = {line.get_label(): line for line in [*axes[0][-1].get_lines(), *right.get_lines()]}
    figure.legend(handles=[*lines.values()], loc="outside lower center", ncols=4)
    figure.suptitle(f"Accuracy and sparsity while training on {data}")
    return figure


def gamma_distributions(gammas: Mapping[float, np.ndarray], data: str) -> Figure:
    """γ for each λ: on one shared axis above; below, where many are small, these on their own."""
    figure, axes = panels(len(gammas), rows=2, width=4.4, height=3.0)
    # A few huge γ, as a collapsed network can have, must not squeeze all others into one bar.
    reaches = [4 * np.quantile(np.abs(gamma), 0.975) for gamma in gammas.values()]
    bulks = [g.clip(-reach, reach) for g, reach in zip(gammas.values(), reaches, strict=True)]
    low, high = min(bulk.min() for bulk in bulks), max(bulk.max() for bulk in bulks)
    step = (high - low) / 60 or 1 / 60
    # Zero lies in the middle of a bar, not at the side of one.
    shared = (np.arange(np.floor(low / step), np.ceil(high / step) + 2) - 0.5) * step
    for column, (l1_lambda, gamma) in enumerate(gammas.items()):
        top, bottom = axes[0][column], axes[1][column]
        top.hist(gamma.clip(shared[0], shared[-1]), bins=shared, color=TRAIN)
        outside = np.sum((gamma < shared[0]) | (gamma > shared[-1]))
        note = f" (outermost bars: {outside} beyond)" if outside else ""
        top.set(
            title=f"λ = {l1_lambda:g}{note}", xlabel="scaling factor γ",
            yscale="log", ylim=(0.7, 2 * len(gamma)),
        )  # fmt: skip
        top.grid(alpha=0.3)
        # Below, the scale that holds the smaller half of this network's own γ and their vicinity.
        reach = 4 * float(np.median(np.abs(gamma)))
        if reach > max(-low, high) / 4:
            bottom.text(0.5, 0.5, f"λ = {l1_lambda:g}: few γ are small", ha="center", va="center")
            bottom.axis("off")
            continue
        reach = min(reach, float(np.abs(gamma).max())) or 1e-12
        zoomed = gamma[np.abs(gamma) <= reach]
        bottom.hist(zoomed, bins=np.linspace(-reach, reach, 62), color=SPARSITY)
        bottom.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
        bottom.set(
            title=f"λ = {l1_lambda:g}: {len(zoomed) / len(gamma):.0%} have |γ| ≤ {reach:.2g}",
            xlabel="scaling factor γ",
        )
        bottom.grid(alpha=0.3)
        bottom.set_ylabel("channels\neach λ on its own axes")
    axes[0][0].set_ylabel("channels (log scale)\nsame axes for all λ")
    figure.suptitle(f"Scaling factors γ after training on {data}")
    return figure


def sorted_gammas(
    gammas: Mapping[float, np.ndarray], cuts: Mapping[float, tuple[float, float]], title: str
) -> Figure:
    """|γ| of all channels in ascending order for each λ. `cuts`: for each pruning ratio the λ whose
    network is cut, and the threshold."""
    figure, axes = panels(1, width=7.5, height=3.8)
    ax = axes[0][0]
    for (l1_lambda, gamma), style in zip(gammas.items(), itertools.cycle(LINES), strict=False):
        ordered = np.sort(np.abs(gamma))
        percent = np.arange(1, len(ordered) + 1) / len(ordered) * 100
        ax.plot(percent, ordered, color="black", linestyle=style, label=f"λ = {l1_lambda:g}")
    for (ratio, (l1_lambda, threshold)), color in zip(
        cuts.items(), itertools.cycle(plt.cm.tab10.colors[1:]), strict=False
    ):
        # Along the threshold to where the cut falls, and down.
        ax.plot(
            [0, 100 * ratio, 100 * ratio], [threshold, threshold, 0], color=color, linestyle="--",
            label=f"{100 * ratio:g}% of λ = {l1_lambda:g}: threshold {threshold:.2g}",
        )  # fmt: skip
    ax.set(
        yscale="log",
        xlabel="channels, from the smallest |γ| to the largest (%)",
        ylabel="|γ| (log scale; below 1e-6 not shown)",
        title=title,
        xlim=(0, 100),
    )
    ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-6))  # what is smaller is off all the same
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def kept_channels(widths: Sequence[int], kept: Mapping[float, Sequence[int]], title: str) -> Figure:
    """One panel per pruning ratio: channels of each layer, and how many of them stay."""
    figure, axes = panels(len(kept), sharey=True, width=5.0, height=3.4)
    layers = np.arange(1, len(widths) + 1)
    for ax, (ratio, counts) in zip(axes[0], kept.items(), strict=True):
        ax.bar(layers, widths, color="lightgray", label="before the cut")
        ax.bar(layers, counts, color=TRAIN, label="kept")
        for layer, count in zip(layers, counts, strict=True):
            ax.annotate(str(count), (layer, count), ha="center", va="bottom", fontsize=7)
        ax.set(
            title=f"{100 * ratio:g}% pruned: {sum(counts):,} of {sum(widths):,} channels stay",
            xlabel="convolution",
            xticks=layers,
        )
        ax.tick_params(axis="x", labelsize=7)
    axes[0][0].set_ylabel("channels")
    axes[0][0].legend()
    figure.suptitle(title)
    return figure


def ladder(
    curves: Mapping[float, Mapping[str, Sequence[float]]],
    ratios: Sequence[float],
    uncut: Mapping[float, float],
    data: str,
) -> Figure:
    """One panel per λ: test accuracy in % right after the cut against the pruning ratio."""
    figure, axes = panels(len(curves), sharey=True, width=5.0, height=3.8)
    percent = 100 * np.asarray(ratios)
    for ax, (l1_lambda, steps) in zip(axes[0], curves.items(), strict=True):
        ax.axhline(uncut[l1_lambda], color="gray", linestyle=":", label="before the cut")
        for (name, accuracies), marker in zip(steps.items(), itertools.cycle("osD^"), strict=False):
            # Hollow: lines that coincide stay visible.
            ax.plot(percent, accuracies, marker=marker, fillstyle="none", label=name)
        ax.set(
            title=f"λ = {l1_lambda:g}", xlabel="channels pruned (%)", xticks=percent, ylim=(0, 103)
        )
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy after the cut (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"What a cut costs, and what can be recovered without training: {data}")
    return figure


def finetuning_curves(
    histories: Mapping[str, Mapping[str, list[float]]],
    right_after: Mapping[str, float],
    dense_accuracy: float,
    data: str,
) -> Figure:
    """One panel per slim network, three a row: accuracy in % over the epochs, from the cut on."""
    columns = min(3, len(histories))
    rows = -(-len(histories) // columns)
    figure, axes = panels(columns, rows, sharey=True, width=3.4, height=2.9)
    for ax in axes.flat[len(histories) :]:
        ax.axis("off")
    for ax, (name, history) in zip(axes.flat, histories.items(), strict=False):
        epochs = range(1, len(history["lr"]) + 1)
        ax.plot(epochs, history["train_accuracy"], color=TRAIN, label="training")
        test = [right_after[name], *history["test_accuracy"]]
        ax.plot(range(len(test)), test, color=TEST, label="test (epoch 0: before)")
        ax.axhline(dense_accuracy, color="gray", linestyle=":", label="dense network, test")
        ax.plot(0, test[0], color=TEST, marker="o", clip_on=False)
        ax.set(title=f"{name}: test {test[-1]:.2f} %", xlim=(0, len(epochs)))
        _along_epochs(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy (%)")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns)  # no wider than the panels
    figure.suptitle(f"Fine-tuning the slim networks on {data}")
    return figure


class LiveCurve:
    """Accuracy and sparsity of a training under way, drawn anew in place after each epoch.

    Call it with the history so far. `before`: the test accuracy in % at epoch 0, if there is one.
    """

    def __init__(self, title: str, before: float | None = None) -> None:
        from IPython.display import display  # only a notebook has a place to draw it

        self.title, self.before = title, before
        # Shown before anything is printed: an output in between would cut the progress bar in two.
        self.shown = display(self._drawn([], [], []), display_id=True)

    def __call__(self, history) -> None:
        curves = history.train_accuracy, history.test_accuracy, history.sparsity
        self.shown.update(self._drawn(*curves))

    def _drawn(self, train: list[float], test: list[float], sparsity: list[float]) -> Figure:
        figure, ((ax,),) = panels(1, width=6.2, height=2.4)
        epochs = range(1, len(train) + 1)
        ax.plot(epochs, train, color=TRAIN, marker=".", label="training accuracy")
        start = [] if self.before is None else [self.before]
        tested = [*start, *test]
        ax.plot(
            range(1 - len(start), len(test) + 1), tested, color=TEST, marker=".",
            label="test accuracy",
        )  # fmt: skip
        share = 100 * np.asarray(sparsity)
        ax.plot(epochs, share, color=SPARSITY, linestyle="--", label="sparsity")
        ax.set(title=self.title, ylabel="share (%)", ylim=(-3, 103))
        _along_epochs(ax)
        figure.legend(loc="outside right center", fontsize=8)
        return figure


def accuracy_against_latency(points: Sequence[Mapping[str, object]], data: str) -> Figure:
    """Every network on every runtime as a point: rows of `network`, `runtime`, `accuracy` in % and
    the median `seconds` for one image, whose middle half is `iqr` wide."""
    figure, ((ax,),) = panels(1, width=7.5, height=4.2)
    runtimes = dict.fromkeys(p["runtime"] for p in points)
    networks = dict.fromkeys(p["network"] for p in points)
    colors = dict(zip(networks, itertools.cycle(plt.cm.tab10.colors), strict=False))
    markers = dict(zip(runtimes, "osD^", strict=False))
    for p in points:
        ax.plot(
            1e3 * p["seconds"], p["accuracy"], linestyle="none", markersize=8,
            color=colors[p["network"]], marker=markers[p["runtime"]],
        )  # fmt: skip
        middle_half = [1e3 * (p["seconds"] + side * p["iqr"] / 2) for side in (-1, 1)]
        ax.plot(middle_half, 2 * [p["accuracy"]], color=colors[p["network"]])
    for name, color in colors.items():
        ax.plot([], [], color=color, linewidth=4, label=name)
    for name, marker in markers.items():
        ax.plot([], [], color="black", marker=marker, linestyle="none", label=name)
    ax.set(
        xscale="log",
        xlabel="latency of one image (ms, log scale; line: as wide as the IQR)",
        ylabel="test accuracy (%)",
        title=f"What pruning, the runtime and 8 bits bring: {data}",
    )
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def summary(table: Sequence[Mapping[str, object]], data: str) -> Figure:
    """Every network of the final table, one row each: accuracy beside what it costs."""
    columns = {
        "test accuracy (%)": "{:.2f}",
        "parameters": "{:,.0f}",
        "MACs (M)": "{:.2f}",
        "batch of 256 (ms)": "{:.1f}",
    }
    raw = [
        (row["raw cut (%)"], y) for y, row in enumerate(table) if row.get("raw cut (%)") is not None
    ]
    colors = {"dense": "dimgray", "sparse": SPARSITY, "slim": TRAIN, "finetuned": TEST}
    figure, axes = panels(len(columns), sharey=True, width=3.1, height=0.8 + 0.45 * len(table))
    names = [row["network"] for row in table]
    for ax, (column, form) in zip(axes[0], columns.items(), strict=True):
        values = [row[column] for row in table]
        bars = ax.barh(names, values, color=[colors[row["stage"]] for row in table])
        ax.bar_label(bars, [form.format(v) for v in values], padding=8, fontsize=9)
        ax.set(title=column, xlim=(0, 1.5 * max(values)))
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.set_xticks([])  # each bar says its number
    if raw:
        marks = {"color": "black", "marker": "|", "markersize": 16, "markeredgewidth": 2}
        axes[0][0].plot(*zip(*raw, strict=True), linestyle="none", label="raw cut", **marks)
        figure.legend(loc="outside lower center")
    axes[0][0].invert_yaxis()
    figure.suptitle(f"Every network of the lab: {data} (latency: eager float32)")
    return figure
