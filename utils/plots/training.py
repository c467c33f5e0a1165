"""Images, and what a training does to accuracy and sparsity."""

import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.plots.drawing import SPARSITY, TEST, TRAIN, Shown, panels, style, text


@style()
def sample_images(images: np.ndarray, labels: Sequence[int], classes: Sequence[str], title: str):
    """A grid of images, uint8 (n, 3, h, w), ten a row, each with its class above."""
    figure, axes = panels(10, -(-len(images) // 10), width=1.0, height=1.2)
    names = {label: text(classes[label], inches=0.85, size=9) for label in {*labels}}
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, label in zip(axes.flat, images, labels, strict=False):
        ax.imshow(image.transpose(1, 2, 0))
        ax.set_title(names[label], fontsize=9)
    figure.suptitle(text(title, inches=9), wrap=True)
    return figure


def _along_epochs(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.grid(alpha=0.3)


@style()
def training_curves(histories: Mapping[float, Mapping[str, list[float]]], data: str) -> Figure:
    """One panel per λ: training and test accuracy in % on the left, sparsity on the right."""
    figure, axes = panels(len(histories), sharex=True, sharey=True, width=4.4, height=3.8)
    for ax, (l1_lambda, history) in zip(axes[0], histories.items(), strict=True):
        rates = np.asarray(history["lr"])
        epochs = range(1, len(rates) + 1)
        ax.plot(epochs, history["train_accuracy"], color=TRAIN, label="training accuracy")
        ax.plot(epochs, history["test_accuracy"], color=TEST, label="test accuracy")
        drops = 1.5 + np.flatnonzero(np.isclose(rates[1:], rates[:-1] / 10))
        if len(drops):
            ax.vlines(drops, -3, 103, "gray", ":", label="lr drops", linewidth=1)
        ax.set(title=f"λ = {l1_lambda:g}", ylim=(-3, 103))  # 0 beside the frame
        _along_epochs(ax)
        right = ax.twinx()
        share = 100 * np.asarray(history["sparsity"])
        right.plot(epochs, share, color=SPARSITY, linestyle="--", label="sparsity")
        right.set_ylim(-3, 103)
        right.tick_params(axis="y", colors=SPARSITY)
    right.set_ylabel("sparsity (% of the channels)", color=SPARSITY)
    axes[0][0].set_ylabel("accuracy (%)")
    lines = [*axes[0][-1].get_legend_handles_labels()[0], *right.get_lines()]
    figure.legend(handles=lines, loc="outside lower center", ncols=2 * min(2, len(histories)))
    figure.suptitle(f"Accuracy and sparsity while training on {text(data)}", wrap=True)
    return figure


@style()
def finetuning_curves(histories: Mapping, right_after: Mapping, dense_accuracy: float, data: str):
    """One panel per slim network, three a row: accuracy in % over the epochs, from the cut on."""
    columns = min(3, len(histories))
    rows = -(-len(histories) // columns)
    figure, axes = panels(columns, rows, sharey=True, width=3.4, height=2.9)
    for ax in axes.flat[len(histories) :]:
        ax.axis("off")
    for ax, (name, history) in zip(axes.flat, histories.items(), strict=False):
        train, test = history["train_accuracy"], [right_after[name], *history["test_accuracy"]]
        ax.plot(range(1, len(test)), train, color=TRAIN, label="training")
        ax.plot(range(len(test)), test, color=TEST, label="test (epoch 0: before)")
        ax.axhline(dense_accuracy, color="gray", linestyle=":", label="dense network, test")
        ax.plot(0, test[0], color=TEST, marker="o", clip_on=False)
        ax.set(title=f"{text(name, inches=1.7)}: test {test[-1]:.2f} %", xlim=(0, len(train)))
        _along_epochs(ax)
    figure.supylabel("accuracy (%)", fontsize="medium")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=columns)  # no wider than the panels
    figure.suptitle(f"Fine-tuning the slim networks on {text(data)}", wrap=True)
    return figure


class LiveCurve:
    """Accuracy and sparsity of a training of so many `epochs`, drawn in place: call it with the
    history so far. `before`: the test accuracy in % at epoch 0, if there is one."""

    def __init__(self, title: str, epochs: int, before: float | None = None) -> None:
        self.title, self.epochs, self.before, self.place = title, epochs, before, uuid4().hex
        # Shown before anything is printed: an output in between would cut the progress bar in two.
        self._show([], [], [], update=False)

    def __call__(self, history) -> None:
        # A drawing takes a tenth of a second, as long as a short epoch.
        if time.monotonic() - self.drawn < 1 and len(history.test_accuracy) < self.epochs:
            return
        self._show(history.train_accuracy, history.test_accuracy, history.sparsity, update=True)

    @style()
    def _show(self, train: list[float], test: list[float], sparsity: list[float], update: bool):
        from IPython.display import display  # only a notebook has a place to draw it

        figure, ((ax,),) = panels(1, width=6.2, height=2.4)
        epochs = range(1, len(train) + 1)
        ax.plot(epochs, train, color=TRAIN, marker=".", label="training accuracy")
        start, tested = (1, test) if self.before is None else (0, [self.before, *test])
        ax.plot(range(start, len(test) + 1), tested, color=TEST, marker=".", label="test accuracy")
        share = 100 * np.asarray(sparsity)
        ax.plot(epochs, share, color=SPARSITY, linestyle="--", label="sparsity")
        ax.set(title=text(self.title, inches=4.2), ylabel="share (%)", ylim=(-3, 103))
        ax.set_xlim(0, self.epochs)
        _along_epochs(ax)
        figure.legend(loc="outside right center", fontsize=8)
        display(Shown(figure), display_id=self.place, update=update)
        self.drawn = time.monotonic()
