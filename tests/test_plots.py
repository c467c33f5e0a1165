"""utils/plots.py: what each figure must show, read back from the Figure itself."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from utils import plots
from utils.store.checkpoint import History

HISTORY = {
    "lr": [0.1, 0.1, 0.01],
    "train_accuracy": [40.0, 55.0, 63.0],
    "test_accuracy": [38.0, 51.0, 61.25],
    "sparsity": [0.0, 0.25, 0.625],
}
WORSE = {**HISTORY, "test_accuracy": [10.0, 11.0, 12.5]}
NARROW = np.array([0.1, 0.2, 0.3, 4.0])
WIDE = np.array([2.0, 3.0, 4.0, 4.0])
COLLAPSED = np.array([1e-5, -1e-5, 2e-5, 3e-5])


def row(network, stage, *numbers):
    columns = ("test accuracy (%)", "parameters", "MACs (M)", "batch of 256 (ms)")
    return {"network": network, "stage": stage, **dict(zip(columns, numbers, strict=True))}


FIGURES = {
    "sample_images": lambda: plots.sample_images(
        np.arange(12 * 3 * 4 * 4, dtype=np.uint8).reshape(12, 3, 4, 4),
        [0, 1] * 6,
        ["cat", "ship"],
        "CIFAR-Z",
    ),
    "training_curves": lambda: plots.training_curves({0.0: HISTORY, 3e-4: WORSE}, "CIFAR-Z"),
    "gamma_distributions": lambda: plots.gamma_distributions(
        {0.0: WIDE, 3e-4: NARROW, 0.07: COLLAPSED}, "CIFAR-Z"
    ),
    "sorted_gammas": lambda: plots.sorted_gammas(
        {3e-4: np.array([0.4, -0.1, 0.2, -0.8]), 0.07: np.array([0.3, 0.1])},
        {0.25: (3e-4, 0.15), 0.75: (0.07, 0.6)},
        "CIFAR-Z",
    ),
    "kept_channels": lambda: plots.kept_channels(
        [4, 8, 8], {0.45: [3, 5, 3], 0.85: [1, 1, 1]}, "CIFAR-Z"
    ),
    "ladder": lambda: plots.ladder(
        {3e-4: {"raw": [80.0, 10.0], "absorbed": [81.0, 30.0]}, 0.07: {"raw": [50.0, 5.0]}},
        [0.25, 0.75],
        {3e-4: 82.5, 0.07: 51.5},
        "CIFAR-Z",
    ),
    "finetuning_curves": lambda: plots.finetuning_curves(
        {"A": HISTORY, "B": WORSE}, {"A": 33.0, "B": 9.0}, 71.5, "CIFAR-Z"
    ),
    "accuracy_against_latency": lambda: plots.accuracy_against_latency(
        [
            {
                "network": "dense",
                "runtime": "torch",
                "accuracy": 92.0,
                "seconds": 0.004,
                "iqr": 0.002,
            },
            {"network": "dense", "runtime": "int8", "accuracy": 91.5, "seconds": 0.002, "iqr": 0},
            {"network": "slim", "runtime": "torch", "accuracy": 90.0, "seconds": 0.001, "iqr": 0},
        ],
        "CIFAR-Z",
    ),
    "summary": lambda: plots.summary(
        [
            row("A", "dense", 92.125, 20_035_018, 398.1363, 31.04),
            row("B, 70%", "slim", 10.5, 2_250_000, 40.0, 8.0) | {"raw cut (%)": 9.5},
            row("B, 70%, finetuned", "finetuned", 91.75, 2_250_000, 40.0, 8.0),
        ],
        "CIFAR-Z",
    ),
}


def words(figure):
    """Every piece of text in the figure, titles, labels, legends and annotations."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def points(ax, label):
    """x and y of the line with this label."""
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def shared(axes, along):
    group = getattr(axes[0], f"get_shared_{along}_axes")()
    return all(group.joined(axes[0], ax) for ax in axes)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_its_data_and_is_saved_as_a_png_and_handed_on(name, tmp_path):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert any("CIFAR-Z" in text for text in words(figure))
    path = tmp_path / "new" / "folder" / "figure.png"
    assert plots.save(figure, path) is figure
    assert plt.imread(path).std() > 0  # a readable picture that is not blank
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []  # none is left open


def test_sample_images_shows_each_image_under_its_class_ten_a_row():
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 5), dtype=np.uint8)
    figure = plots.sample_images(images, [0, 1, 2] * 4, ["cat", "dog", "ship"], "a title")
    assert len(figure.axes) == 20
    assert titles(figure) == ["cat", "dog", "ship"] * 4
    shown = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert np.array_equal(np.stack(shown), images.transpose(0, 2, 3, 1))


def test_training_curves_show_accuracy_and_sparsity_in_percent_for_each_lambda():
    figure = FIGURES["training_curves"]()
    first, second, first_right, second_right = figure.axes
    assert titles(figure) == ["λ = 0", "λ = 0.0003"]
    assert points(first, "training accuracy") == ([1, 2, 3], HISTORY["train_accuracy"])
    assert points(first, "test accuracy") == ([1, 2, 3], HISTORY["test_accuracy"])
    assert points(second, "test accuracy") == ([1, 2, 3], WORSE["test_accuracy"])
    assert points(first_right, "sparsity") == ([1, 2, 3], [0, 25, 62.5])
    assert list(first.get_lines()[-1].get_xdata()) == [2.5, 2.5]  # after two epochs lr drops
    assert first.get_xlabel() == "epoch"
    assert "(%)" in first.get_ylabel()
    assert "%" in second_right.get_ylabel()
    assert shared([first, second], "x")
    assert shared([first, second], "y")
    assert first_right.get_ylim() == second_right.get_ylim()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "training accuracy", "test accuracy", "sparsity", "lr drops",
    }  # fmt: skip


def test_a_cosine_drops_nowhere():
    rates = [0.05, 0.1, 0.06, 0.03, 0.0035]
    history = {name: np.arange(5.0) for name in HISTORY} | {"lr": rates}
    figure = plots.training_curves({0.0: history}, "CIFAR-Z")
    assert "lr drops" not in {text.get_text() for text in figure.legends[0].get_texts()}


def test_gamma_distributions_share_an_axis_above_and_zoom_below():
    figure = FIGURES["gamma_distributions"]()
    above, (unzoomed, *below) = figure.axes[:3], figure.axes[3:]
    assert [ax.get_title() for ax in above] == ["λ = 0", "λ = 0.0003", "λ = 0.07"]
    assert not unzoomed.patches and "few γ are small" in unzoomed.texts[0].get_text()
    # Zoom: 4 × the median of |γ|, which leaves out the 4.0 of the first network.
    assert "λ = 0.0003" in below[0].get_title()
    assert "75% have |γ| ≤ 1" in below[0].get_title()
    assert "100% have" in below[1].get_title()

    assert above[0].get_xlim() == above[1].get_xlim() == above[2].get_xlim()
    assert above[0].get_ylim() == above[1].get_ylim() == above[2].get_ylim()
    assert above[0].get_xlim()[0] <= -1e-5
    assert above[0].get_xlim()[1] >= 4
    assert below[1].get_xlim()[1] < 1e-3 < 0.3 < below[0].get_xlim()[1]
    assert [sum(bar.get_height() for bar in ax.patches) for ax in above] == [4, 4, 4]
    assert [sum(bar.get_height() for bar in ax.patches) for ax in below] == [3, 4]
    (only,) = [bar for bar in above[2].patches if bar.get_height()]  # of either sign: one bar at 0
    assert only.get_x() + only.get_width() / 2 == pytest.approx(0)


def test_a_few_huge_gammas_do_not_squeeze_the_shared_axis():
    wide, outlier = np.linspace(0.1, 1.5, 100), np.append(np.zeros(99), 58.0)
    first, second = plots.gamma_distributions({0.0: wide, 0.01: outlier}, "CIFAR-Z").axes[:2]
    assert first.get_xlim() == second.get_xlim() and first.get_xlim()[1] < 2
    assert titles(second.figure)[:2] == [
        "λ = 0",
        "λ = 0.01 (outermost bars: 1 beyond)",
    ]
    assert sum(bar.get_height() for bar in second.patches) == 100


def test_gamma_distributions_of_untrained_and_of_dead_networks_can_be_drawn():
    """All γ equal, 0.5 at the start and 0 at the end: histograms without a width of their own."""
    for value in (0.5, 0.0):
        figure = plots.gamma_distributions({0.0: np.full(5, value)}, "CIFAR-Z")
        assert sum(bar.get_height() for bar in figure.axes[0].patches) == 5


def test_sorted_gammas_ascend_on_a_log_axis_and_name_each_threshold():
    (ax,) = FIGURES["sorted_gammas"]().axes
    curve, other, *cuts = ax.get_lines()
    assert list(curve.get_xdata()) == [25, 50, 75, 100]
    assert list(curve.get_ydata()) == [0.1, 0.2, 0.4, 0.8]
    assert (list(other.get_xdata()), list(other.get_ydata())) == ([50, 100], [0.1, 0.3])
    assert curve.get_linestyle() != other.get_linestyle()
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.figure.legends[0].get_texts()] == [
        "λ = 0.0003",
        "λ = 0.07",
        "25% of λ = 0.0003: threshold 0.15",
        "75% of λ = 0.07: threshold 0.6",
    ]
    first, _ = cuts
    assert list(first.get_xdata()) == [0, 25, 25]
    assert list(first.get_ydata())[:2] == [0.15, 0.15]


def test_kept_channels_show_each_layer_before_and_after_with_the_totals_in_the_title():
    figure = FIGURES["kept_channels"]()
    first, second = figure.axes
    assert titles(figure) == [
        "45% pruned: 11 of 20 channels stay",
        "85% pruned: 3 of 20 channels stay",
    ]
    dense, kept = first.containers
    assert [bar.get_height() for bar in dense] == [4, 8, 8]
    assert [bar.get_height() for bar in kept] == [3, 5, 3]
    assert [text.get_text() for text in first.texts] == ["3", "5", "3"]
    legend = [text.get_text() for text in first.get_legend().get_texts()]
    assert legend == ["before the cut", "kept"]
    assert shared([first, second], "y")


def test_ladder_shows_accuracy_against_pruned_channels_for_each_step():
    figure = FIGURES["ladder"]()
    first, second = figure.axes
    assert titles(figure) == ["λ = 0.0003", "λ = 0.07"]
    assert points(first, "raw") == ([25, 75], [80, 10])
    assert points(first, "absorbed") == ([25, 75], [81, 30])
    assert points(first, "before the cut")[1] == [82.5, 82.5]
    assert points(second, "before the cut")[1] == [51.5, 51.5]
    assert first.get_xlabel() == "channels pruned (%)"
    assert "(%)" in first.get_ylabel()
    assert {"before the cut", "raw", "absorbed"} <= set(words(figure))
    assert shared([first, second], "y")


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_ladder_drops_no_step(steps):
    curves = {f"step {i}": [80.0, 10.0 + i] for i in range(steps)}
    (ax,) = plots.ladder({0.0: curves}, [0.25, 0.75], {0.0: 90.0}, "CIFAR-Z").axes
    for name, accuracies in curves.items():
        assert points(ax, name) == ([25, 75], accuracies)


def test_finetuning_curves_start_right_after_the_cut_and_name_the_final_accuracy():
    figure = FIGURES["finetuning_curves"]()
    first, second = figure.axes
    assert titles(figure) == ["A: test 61.25 %", "B: test 12.50 %"]
    after_cut = "test (epoch 0: before)"
    assert points(first, after_cut) == ([0, 1, 2, 3], [33.0, *HISTORY["test_accuracy"]])
    assert points(second, after_cut) == ([0, 1, 2, 3], [9.0, *WORSE["test_accuracy"]])
    assert points(first, "training") == ([1, 2, 3], HISTORY["train_accuracy"])
    assert points(first, "dense network, test")[1] == [71.5, 71.5]
    assert first.get_xlabel() == "epoch"
    assert "(%)" in first.get_ylabel()
    assert {after_cut, "training", "dense network, test"} <= set(words(figure))
    assert shared([first, second], "y")


def test_summary_shows_accuracy_and_costs_of_every_network_with_their_units():
    figure = FIGURES["summary"]()
    assert titles(figure) == ["test accuracy (%)", "parameters", "MACs (M)", "batch of 256 (ms)"]
    values = [[bar.get_width() for bar in ax.patches] for ax in figure.axes]
    assert values == [
        [92.125, 10.5, 91.75],
        [20_035_018, 2_250_000, 2_250_000],
        [398.1363, 40, 40],
        [31.04, 8, 8],
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["92.12", "10.50", "91.75"]
    (raw,) = figure.axes[0].get_lines()  # beside the bar of the slim network alone
    assert (list(raw.get_xdata()), list(raw.get_ydata())) == ([9.5], [1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["raw cut"]
    assert figure.axes[1].texts[0].get_text() == "20,035,018"
    assert figure.axes[2].texts[0].get_text() == "398.14"

    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["A", "B, 70%", "B, 70%, finetuned"]
    top, bottom = figure.axes[0].get_ylim()[::-1]
    assert top < bottom  # the first row on top
    assert shared(figure.axes, "y")
    dense, cut, finetuned = (bar.get_facecolor() for bar in figure.axes[0].patches)
    assert len({dense, cut, finetuned}) == 3  # a stage is told by its colour


def test_fine_tunings_stand_three_a_row_and_empty_places_show_nothing():
    names = "ABCD"
    figure = plots.finetuning_curves(
        dict.fromkeys(names, HISTORY), dict.fromkeys(names, 30.0), 71.5, "CIFAR-Z"
    )
    assert len(titles(figure)) == 4 and len(figure.axes) == 6
    assert [ax.axison for ax in figure.axes] == [True] * 4 + [False] * 2


def test_each_network_on_each_runtime_is_a_point_in_milliseconds():
    (ax,) = FIGURES["accuracy_against_latency"]().axes
    bars = [line for line in ax.get_lines() if len(line.get_xdata()) == 2]
    assert list(bars[0].get_xdata()) == [3, 5] and list(bars[0].get_ydata()) == [92, 92]
    drawn = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    places = [(*line.get_xdata(), *line.get_ydata()) for line in drawn]
    assert places == [(4.0, 92.0), (2.0, 91.5), (1.0, 90.0)]
    assert drawn[0].get_color() == drawn[1].get_color() != drawn[2].get_color()
    assert drawn[0].get_marker() == drawn[2].get_marker() != drawn[1].get_marker()
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["dense", "slim", "torch", "int8"]
    assert "(ms" in ax.get_xlabel() and "(%)" in ax.get_ylabel()


def test_a_live_curve_is_drawn_anew_in_its_place(monkeypatch):
    places = []

    class Place:
        def __init__(self, figure):
            self.figures = [figure]

        def update(self, figure):
            self.figures.append(figure)

    def display(figure, display_id):
        places.append(Place(figure))
        return places[-1]

    monkeypatch.setattr("IPython.display.display", display)
    curve, history = plots.LiveCurve("λ = 0.1, CIFAR-Z", before=33.0), History()
    for epoch in range(2):
        history.append(**{name: HISTORY[name][epoch] for name in HISTORY})
        curve(history)
    assert len(places) == 1 and len(places[0].figures) == 3  # the empty one first
    (ax,) = places[0].figures[-1].axes
    assert ax.get_title() == "λ = 0.1, CIFAR-Z"
    assert points(ax, "test accuracy") == ([0, 1, 2], [33.0, 38.0, 51.0])
    assert points(ax, "training accuracy") == ([1, 2], [40.0, 55.0])
    assert points(ax, "sparsity") == ([1, 2], [0, 25])
    assert plt.get_fignums() == []
