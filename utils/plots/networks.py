"""Networks: their γ, what a cut leaves of them, and how the slim ones compare with the dense."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from utils.plots.drawing import SPARSITY, TEST, TRAIN, panels, style, text


@style()
def gamma_distributions(gammas: Mapping[float, np.ndarray], data: str) -> Figure:
    """γ for each λ: on one shared axis above; below, those near zero, each λ on its own axes."""
    figure, axes = panels(len(gammas), rows=2, width=4.4, height=3.0)
    # A few huge γ, as a collapsed network can have, must not squeeze all others into one bar.
    reaches = [(gamma, 4 * np.quantile(np.abs(gamma), 0.975)) for gamma in gammas.values()]
    bulk = np.concatenate([gamma.clip(-reach, reach) for gamma, reach in reaches])
    step = np.ptp(bulk) / 60 or 1 / 60  # zero lies in the middle of a bar:
    bins = (np.arange(bulk.min() // step, bulk.max() // step + 3) - 0.5) * step
    for (top, bottom), (l1_lambda, gamma) in zip(axes.T, gammas.items(), strict=True):
        top.hist(gamma.clip(bins[0], bins[-1]), bins=bins, color=TRAIN)
        outside = np.sum((gamma < bins[0]) | (gamma > bins[-1]))
        note = f" (outermost bars: {outside} beyond)" if outside else ""
        top.set(title=f"λ = {l1_lambda:g}{note}", yscale="log", ylim=(0.7, 2 * len(gamma)))
        sizes = np.abs(gamma)
        reach = min(4 * np.median(sizes), sizes.max()) or 1e-12
        bottom.hist(gamma, bins=np.linspace(-reach, reach, 62), color=SPARSITY)
        bottom.set_title(f"λ = {l1_lambda:g}: {(sizes <= reach).mean():.0%} have |γ| ≤ {reach:.2g}")
        bottom.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    for ax in axes.flat:
        ax.set_xlabel("scaling factor γ")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("channels (log scale)\nsame axes for all λ")
    axes[1][0].set_ylabel("channels\neach λ on its own axes")
    figure.suptitle(f"Scaling factors γ after training on {text(data)}", wrap=True)
    return figure


@style()
def sorted_gammas(gammas: Mapping[float, np.ndarray], cuts: Mapping, title: str) -> Figure:
    """|γ| of all channels in ascending order for each λ. `cuts`: for each pruning ratio the λ whose
    network is cut, and the threshold."""
    figure, ((ax,),) = panels(1, width=7.5, height=3.8)
    for (l1_lambda, gamma), line in zip(gammas.items(), cycle(["-", "-.", ":"]), strict=False):
        percent = np.arange(1, len(gamma) + 1) / len(gamma) * 100
        sizes = np.sort(np.abs(gamma))
        ax.plot(percent, sizes, color="black", linestyle=line, label=f"λ = {l1_lambda:g}")
    for k, (ratio, (l1_lambda, threshold)) in enumerate(cuts.items(), start=1):
        # Up where the cut falls, and along the threshold.
        at, height = [100 * ratio, 100 * ratio, 0], [0, threshold, threshold]
        name = f"{100 * ratio:g}% of λ = {l1_lambda:g}: threshold {threshold:.2g}"
        ax.plot(at, height, color=f"C{k}", linestyle="--", label=name)
    ax.set(xlabel="channels, from the smallest |γ| to the largest (%)", xlim=(0, 100))
    ax.set(ylabel="|γ| (log scale; below 1e-6 not shown)", yscale="log")
    ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-6))  # what is smaller is off all the same
    ax.set_title(text(title, inches=6.8))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@style()
def kept_channels(widths: Sequence[int], kept: Mapping[float, Sequence[int]], title: str) -> Figure:
    """One panel per pruning ratio: channels of each layer, and how many of them stay."""
    figure, axes = panels(len(kept), sharey=True, width=5.0, height=3.4)
    layers = range(1, len(widths) + 1)
    for ax, (ratio, counts) in zip(axes[0], kept.items(), strict=True):
        ax.bar(layers, widths, color="lightgray", label="before the cut")
        ax.bar_label(ax.bar(layers, counts, color=TRAIN, label="kept"), fontsize=7)
        stay = f"{sum(counts):,} of {sum(widths):,} channels stay"
        ax.set(title=f"{100 * ratio:g}% pruned: {stay}", xlabel="convolution", xticks=layers)
        ax.tick_params(axis="x", labelsize=7)
    axes[0][0].set_ylabel("channels")
    axes[0][0].legend()
    figure.suptitle(text(title, inches=9), wrap=True)
    return figure


@style()
def ladder(curves: Mapping, ratios: Sequence[float], uncut: Mapping, data: str) -> Figure:
    """One panel per λ: test accuracy in % right after the cut against the pruning ratio.

    `curves`: for each λ and each rung, the accuracy at each ratio. `uncut`: for each λ, without."""
    figure, axes = panels(len(curves), sharey=True, width=5.0, height=3.8)
    percent = [100 * ratio for ratio in ratios]
    for ax, (l1_lambda, rungs) in zip(axes[0], curves.items(), strict=True):
        ax.axhline(uncut[l1_lambda], color="gray", linestyle=":", label="before the cut")
        for (name, accuracies), marker in zip(rungs.items(), cycle("osD^"), strict=False):
            # Hollow: lines that coincide stay visible.
            ax.plot(percent, accuracies, marker=marker, fillstyle="none", label=name)
        ax.set(title=f"λ = {l1_lambda:g}", xlabel="channels pruned (%)", ylim=(0, 103))
        ax.set_xticks(percent)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy after the cut (%)")
    names = axes[0][0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=1 + min(2, len(curves)))
    figure.suptitle(f"What a cut costs, what comes back without training: {text(data)}", wrap=True)
    return figure


@style()
def accuracy_against_latency(points: Sequence[Mapping[str, object]], data: str) -> Figure:
    """Every network on every runtime as a point: rows of `network`, `runtime`, `accuracy` in % and
    the median `seconds` for one image, whose middle half is `iqr` wide."""
    figure, ((ax,),) = panels(1, width=7.5, height=4.2)
    colors = {name: f"C{k}" for k, name in enumerate(dict.fromkeys(p["network"] for p in points))}
    markers = dict(
        zip(dict.fromkeys(p["runtime"] for p in points), cycle("osD^vP*X"), strict=False)
    )
    for p in points:
        look = {"fmt": markers[p["runtime"]], "color": colors[p["network"]], "markersize": 8}
        ax.errorbar(1e3 * p["seconds"], p["accuracy"], xerr=500 * p["iqr"], **look)
    for name, color in colors.items():
        ax.plot([], [], color=color, linewidth=4, label=text(name, inches=2.5, size=8))
    for name, marker in markers.items():
        ax.plot([], [], color="black", marker=marker, linestyle="none", label=name)
    ax.set(xlabel="latency of one image (ms, log scale; line: as wide as the IQR)", xscale="log")
    ticks = LogLocator(subs=(1, 2, 5))
    ax.xaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter="")
    ax.set_ylabel("test accuracy (%)")
    ax.set_title(f"What pruning, the runtime and 8 bits bring: {text(data)}")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@style()
def summary(table: Sequence[Mapping[str, object]], data: str) -> Figure:
    """Every network of the final table, one row each: accuracy beside what it costs."""
    columns = ["test accuracy (%)", "parameters", "MACs (M)", "batch of 256 (ms)"]
    forms = ["{:.2f}", "{:,.0f}", "{:.2f}", "{:.1f}"]
    stages = {"dense": "dimgray", "sparse": SPARSITY, "slim": TRAIN, "finetuned": TEST}
    figure, axes = panels(len(columns), sharey=True, width=3.1, height=0.8 + 0.45 * len(table))
    rows, colors = range(len(table)), [stages[row["stage"]] for row in table]
    for ax, column, form in zip(axes[0], columns, forms, strict=True):
        values = [row[column] for row in table]
        bars = ax.barh(rows, values, color=colors)
        ax.bar_label(bars, fmt=form, padding=8, fontsize=9)
        ax.set(title=column, xlim=(0, 1.5 * max(values) or 1), xticks=[])  # each bar says its own
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    first = axes[0][0]
    first.set_yticks(rows, [text(row["network"], inches=3, size=10) for row in table])
    first.invert_yaxis()
    raw = np.array([row.get("raw cut (%)") for row in table], float)  # None: NaN, not drawn
    first.scatter(raw, rows, 256, "black", marker="|", linewidths=2, label="raw cut")
    figure.legend(loc="outside lower center")
    figure.suptitle(f"Every network of the lab: {text(data)} (latency: eager float32)", wrap=True)
    return figure
