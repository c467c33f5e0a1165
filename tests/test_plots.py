"""utils/plots: what each figure must show, read back from the Figure itself."""

import base64
import errno
import logging
import os
import sys
import warnings
from itertools import pairwise
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from utils import plots
from utils.plots import drawing, training

# No curve ends on its best or worst epoch, and no two numbers are alike.
HISTORY = {
    "lr": [0.1, 0.1, 0.01, 0.01],
    "train_accuracy": [40.0, 66.0, 55.0, 63.0],
    "test_accuracy": [38.0, 61.25, 51.0, 58.375],
    "sparsity": [0.0, 0.125, 0.75, 0.625],
}
WORSE = {
    "lr": [0.2, 0.2, 0.2, 0.02],
    "train_accuracy": [12.0, 21.0, 33.0, 29.0],
    "test_accuracy": [9.0, 10.0, 17.0, 13.5],
    "sparsity": [0.03, 0.07, 0.92, 0.86],
}
NARROW = np.array([0.1, 0.2, 0.3, 4.0])
WIDE = np.array([2.0, 3.0, 4.0, 4.0])
COLLAPSED = np.array([1e-5, -1e-5, 2e-5, 3e-5])
DATA = "CIFAR-Z"


def row(network, stage, *numbers):
    columns = ("test accuracy (%)", "parameters", "MACs (M)", "batch of 256 (ms)")
    return {"network": network, "stage": stage, **dict(zip(columns, numbers, strict=True))}


TABLE = [
    row("A", "dense", 92.125, 20_035_018, 398.1363, 31.04),
    row("A λ", "sparse", 91.5, 20_035_019, 397.1, 30.06),
    row("B, 70%", "slim", 10.5, 2_250_000, 40.0, 8.0) | {"raw cut (%)": 9.5},
    row("B, 70%, finetuned", "finetuned", 90.75, 2_250_001, 41.0, 7.0) | {"raw cut (%)": None},
]
POINTS = [
    dict(zip(("network", "runtime", "accuracy", "seconds", "iqr"), values, strict=True))
    for values in [
        ("dense", "torch", 92.0, 0.004, 0.002),
        ("dense", "int8", 91.5, 0.002, 0.0008),
        ("slim", "torch", 90.0, 0.001, 0.0006),
    ]
]


def images(n):
    return np.random.default_rng(0).integers(0, 256, (n, 3, 4, 5), dtype=np.uint8)


FIGURES = {
    "sample_images": lambda name=DATA: plots.sample_images(
        images(12), [0, 1] * 6, [name, "b"], name
    ),
    "training_curves": lambda name=DATA: plots.training_curves({0.0: HISTORY, 3e-4: WORSE}, name),
    "gamma_distributions": lambda name=DATA: plots.gamma_distributions(
        {0.0: WIDE, 3e-4: NARROW, 0.07: COLLAPSED}, name
    ),
    "sorted_gammas": lambda name=DATA: plots.sorted_gammas(
        {3e-4: np.array([0.4, -0.1, 0.2, -0.8]), 0.07: np.array([0.3, 0.15])},
        {0.25: (3e-4, 0.12), 0.75: (0.07, 0.6)},
        name,
    ),
    "kept_channels": lambda name=DATA: plots.kept_channels(
        [4, 8, 9], {0.45: [3, 5, 4], 0.85: [1, 2, 1]}, name
    ),
    "ladder": lambda name=DATA: plots.ladder(
        {3e-4: {"raw": [80.0, 10.0], "absorbed": [81.0, 30.0]}, 0.07: {"raw": [50.0, 5.0]}},
        [0.25, 0.75],
        {3e-4: 82.5, 0.07: 51.5},
        name,
    ),
    "finetuning_curves": lambda name=DATA: plots.finetuning_curves(
        {"A": HISTORY, name: WORSE}, {"A": 33.0, name: 8.0}, 71.5, name
    ),
    "accuracy_against_latency": lambda name=DATA: plots.accuracy_against_latency(
        [p | {"network": name if p["network"] == "dense" else "slim"} for p in POINTS], name
    ),
    "summary": lambda name=DATA: plots.summary([*TABLE, row(name, "slim", 8.5, 7, 6.0, 5.0)], name),
}


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def points(ax, label):
    """x and y of the line with this label."""
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def legend(of):
    """What the legend of a figure or an axes says."""
    (box,) = of.legends if isinstance(of, Figure) else [of.get_legend()]
    return [entry.get_text() for entry in box.get_texts()]


def shared(axes, along):
    group = getattr(axes[0], f"get_shared_{along}_axes")()
    return all(group.joined(axes[0], ax) for ax in axes)


# --- each figure ----------------------------------------------------------------------------------


def test_sample_images_shows_each_image_under_its_class_ten_a_row():
    figure = plots.sample_images(images(12), [2, 0, 1] * 4, ["cat", "dog", "ship"], "a title")
    assert figure.get_suptitle() == "a title"
    assert len(figure.axes) == 20
    assert titles(figure) == ["ship", "cat", "dog"] * 4
    shown = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert np.array_equal(np.stack(shown), images(12).transpose(0, 2, 3, 1))
    assert not any(ax.axison for ax in figure.axes)


def test_training_curves_show_accuracy_and_sparsity_in_percent_for_each_lambda():
    figure = FIGURES["training_curves"]()
    assert figure.get_suptitle() == "Accuracy and sparsity while training on CIFAR-Z"
    first, second, first_right, second_right = figure.axes
    assert titles(figure) == ["λ = 0", "λ = 0.0003"]
    for ax, right, history in ((first, first_right, HISTORY), (second, second_right, WORSE)):
        assert points(ax, "training accuracy") == ([1, 2, 3, 4], history["train_accuracy"])
        assert points(ax, "test accuracy") == ([1, 2, 3, 4], history["test_accuracy"])
        x, y = points(right, "sparsity")
        assert (x, y) == ([1, 2, 3, 4], pytest.approx([100 * s for s in history["sparsity"]]))
        assert ax.get_ylim() == right.get_ylim() == (-3, 103)
        assert ax.get_xlabel() == "epoch"
    for ax, after in ((first, 2.5), (second, 3.5)):  # where the rate falls to a tenth
        assert ax.collections[0].get_segments()[0][:, 0].tolist() == [after, after]
    assert first.get_ylabel() == "accuracy (%)"
    assert second_right.get_ylabel() == "sparsity (% of the channels)"
    assert first_right.get_ylabel() == second.get_ylabel() == ""
    assert shared([first, second], "x") and shared([first, second], "y")
    assert legend(figure) == ["training accuracy", "test accuracy", "lr drops", "sparsity"]
    colors = [line.get_color() for line in (*first.get_lines(), *first_right.get_lines())]
    assert colors == [
        handle.get_color() for handle in np.take(figure.legends[0].legend_handles, [0, 1, 3])
    ]


def test_a_cosine_drops_nowhere():
    rates = [0.05, 0.1, 0.06, 0.03, 0.0035]
    history = {name: np.arange(5.0) for name in HISTORY} | {"lr": rates}
    assert "lr drops" not in legend(plots.training_curves({0.0: history}, DATA))


def test_gamma_distributions_share_an_axis_above_and_zoom_below():
    figure = FIGURES["gamma_distributions"]()
    assert figure.get_suptitle() == "Scaling factors γ after training on CIFAR-Z"
    above, below = figure.axes[:3], figure.axes[3:]
    assert [ax.get_title() for ax in above] == ["λ = 0", "λ = 0.0003", "λ = 0.07"]
    # Zoom: 4 × the median of |γ|, which leaves out the 4.0 of the second network.
    assert [ax.get_title() for ax in below] == [
        "λ = 0: 100% have |γ| ≤ 4",
        "λ = 0.0003: 75% have |γ| ≤ 1",
        "λ = 0.07: 100% have |γ| ≤ 3e-05",
    ]
    assert above[0].get_xlim() == above[1].get_xlim() == above[2].get_xlim()
    assert all(ax.get_ylim() == (0.7, 8) and ax.get_yscale() == "log" for ax in above)
    assert above[0].get_xlim()[0] <= -1e-5 and above[0].get_xlim()[1] >= 4
    assert below[2].get_xlim()[1] < 1e-3 < 0.3 < below[1].get_xlim()[1] < 2
    assert [sum(bar.get_height() for bar in ax.patches) for ax in above] == [4, 4, 4]
    assert [sum(bar.get_height() for bar in ax.patches) for ax in below] == [4, 3, 4]
    (only,) = [bar for bar in above[2].patches if bar.get_height()]  # of either sign: one bar at 0
    assert only.get_x() + only.get_width() / 2 == pytest.approx(0)
    assert all(ax.get_xlabel() == "scaling factor γ" for ax in (*above, *below))
    assert "log scale" in above[0].get_ylabel() and "own axes" in below[0].get_ylabel()


def test_a_few_huge_gammas_do_not_squeeze_the_shared_axis():
    wide, outliers = np.linspace(0.1, 1.5, 100), np.array([-58.0] + 98 * [0.0] + [57.0])
    first, second = plots.gamma_distributions({0.0: wide, 0.01: outliers}, DATA).axes[:2]
    assert first.get_xlim() == second.get_xlim() and first.get_xlim()[1] < 2
    assert second.get_title() == "λ = 0.01 (outermost bars: 2 beyond)"
    assert second.patches[-1].get_height() == 1
    assert sum(bar.get_height() for bar in second.patches) == 100


@pytest.mark.parametrize("value", [0.5, 0.0], ids=["at the start", "dead"])
def test_gammas_that_are_all_alike_can_be_drawn(value):
    figure = plots.gamma_distributions({0.0: np.full(5, value)}, DATA)
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 5


def test_sorted_gammas_ascend_on_a_log_axis_and_name_each_threshold():
    (ax,) = FIGURES["sorted_gammas"]().axes
    curve, other, *cuts = ax.get_lines()
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == (
        [25, 50, 75, 100],
        [0.1, 0.2, 0.4, 0.8],
    )
    assert (list(other.get_xdata()), list(other.get_ydata())) == ([50, 100], [0.15, 0.3])
    assert curve.get_linestyle() != other.get_linestyle()
    assert ax.get_yscale() == "log" and ax.get_xlim() == (0, 100) and ax.get_ylim()[0] >= 1e-6
    assert "(%)" in ax.get_xlabel() and "|γ|" in ax.get_ylabel() and ax.get_title() == DATA
    assert legend(ax.figure) == [
        "λ = 0.0003",
        "λ = 0.07",
        "25% of λ = 0.0003: threshold 0.12",
        "75% of λ = 0.07: threshold 0.6",
    ]
    for cut, at, threshold in zip(cuts, (25, 75), (0.12, 0.6), strict=True):
        assert list(cut.get_xdata()) == [at, at, 0]
        assert list(cut.get_ydata()) == [0, threshold, threshold]


def test_kept_channels_show_each_layer_before_and_after_with_the_totals_in_the_title():
    figure = FIGURES["kept_channels"]()
    assert figure.get_suptitle() == DATA
    assert titles(figure) == [
        "45% pruned: 12 of 21 channels stay",
        "85% pruned: 4 of 21 channels stay",
    ]
    for ax, counts in zip(figure.axes, ([3, 5, 4], [1, 2, 1]), strict=True):
        dense, kept = ax.containers
        assert [bar.get_height() for bar in dense] == [4, 8, 9]
        assert [bar.get_height() for bar in kept] == counts
        assert [label.get_text() for label in ax.texts] == [str(count) for count in counts]
        assert [label.xy[0] for label in ax.texts] == [1, 2, 3] == list(ax.get_xticks())
        assert ax.get_xlabel() == "convolution"
    assert legend(figure.axes[0]) == ["before the cut", "kept"]
    assert figure.axes[0].get_ylabel() == "channels" and shared(figure.axes, "y")


def test_ladder_shows_accuracy_against_pruned_channels_for_each_rung():
    figure = FIGURES["ladder"]()
    assert figure.get_suptitle().endswith("without training: CIFAR-Z")
    first, second = figure.axes
    assert titles(figure) == ["λ = 0.0003", "λ = 0.07"]
    assert points(first, "raw") == ([25, 75], [80, 10])
    assert points(first, "absorbed") == ([25, 75], [81, 30])
    assert points(second, "raw") == ([25, 75], [50, 5])
    assert points(first, "before the cut")[1] == [82.5, 82.5]
    assert points(second, "before the cut")[1] == [51.5, 51.5]
    assert first.get_xlabel() == second.get_xlabel() == "channels pruned (%)"
    assert first.get_ylabel() == "test accuracy after the cut (%)"
    assert first.get_ylim() == (0, 103) and shared([first, second], "y")
    assert legend(figure) == ["before the cut", "raw", "absorbed"]


def test_ladder_drops_no_rung_however_many():
    curves = {f"rung {i}": [80.0, 10.0 + i] for i in range(6)}
    (ax,) = plots.ladder({0.0: curves}, [0.25, 0.75], {0.0: 90.0}, DATA).axes
    for name, accuracies in curves.items():
        assert points(ax, name) == ([25, 75], accuracies)


def test_finetuning_curves_start_right_after_the_cut_and_name_the_last_accuracy():
    figure = plots.finetuning_curves({"A": HISTORY, "B": WORSE}, {"A": 33.0, "B": 8.0}, 71.5, DATA)
    assert figure.get_suptitle() == "Fine-tuning the slim networks on CIFAR-Z"
    assert titles(figure) == ["A: test 58.38 %", "B: test 13.50 %"]
    for ax, history, before in zip(figure.axes, (HISTORY, WORSE), (33.0, 8.0), strict=True):
        assert points(ax, "training") == ([1, 2, 3, 4], history["train_accuracy"])
        tested = ([0, 1, 2, 3, 4], [before, *history["test_accuracy"]])
        assert points(ax, "test (epoch 0: before)") == tested
        assert points(ax, "dense network, test")[1] == [71.5, 71.5]
        mark = ax.get_lines()[-1]
        assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([0], [before])
        assert ax.get_xlim() == (0, 4) and ax.get_xlabel() == "epoch"
    assert figure.get_supylabel() == "accuracy (%)"
    assert legend(figure) == ["training", "test (epoch 0: before)", "dense network, test"]
    assert shared(figure.axes, "y")


def test_fine_tunings_stand_three_a_row_and_empty_places_show_nothing():
    names = "ABCD"
    figure = plots.finetuning_curves(
        dict.fromkeys(names, HISTORY), dict.fromkeys(names, 30.0), 71.5, DATA
    )
    assert len(titles(figure)) == 4
    assert [ax.axison for ax in figure.axes] == [True] * 4 + [False] * 2


def test_each_network_on_each_runtime_is_a_point_in_milliseconds():
    (ax,) = plots.accuracy_against_latency(POINTS, DATA).axes
    drawn, spans = zip(*((marks, bars[0]) for marks, _, bars in ax.containers), strict=True)
    places = [(*line.get_xdata(), *line.get_ydata()) for line in drawn]
    assert places == [(4.0, 92.0), (2.0, 91.5), (1.0, 90.0)]
    ends = [bar.get_segments()[0].ravel().tolist() for bar in spans]
    assert ends == [
        pytest.approx(span) for span in ([3, 92, 5, 92], [1.6, 91.5, 2.4, 91.5], [0.7, 90, 1.3, 90])
    ]
    colors, marks = [
        [get(line) for line in drawn] for get in (plt.Line2D.get_color, plt.Line2D.get_marker)
    ]
    assert colors[0] == colors[1] != colors[2] and marks[0] == marks[2] != marks[1]
    assert [to_hex(bar.get_color()[0]) for bar in spans] == [to_hex(c) for c in colors]
    assert legend(ax) == ["dense", "slim", "torch", "int8"]
    handles = ax.get_legend().legend_handles
    assert [h.get_color() for h in handles[:2]] == [colors[0], colors[2]]
    assert [h.get_marker() for h in handles[2:]] == [marks[0], marks[1]]
    assert ax.get_title().endswith("bring: CIFAR-Z") and ax.get_xscale() == "log"
    assert "(ms" in ax.get_xlabel() and "(%)" in ax.get_ylabel()


def test_any_number_of_runtimes_and_networks_has_a_place():
    many = [POINTS[0] | {"runtime": f"r{k}", "network": f"n{k}"} for k in range(12)]
    (ax,) = plots.accuracy_against_latency(many, DATA).axes
    assert legend(ax) == [*(f"n{k}" for k in range(12)), *(f"r{k}" for k in range(12))]


def test_summary_shows_accuracy_and_costs_of_every_network_with_their_units():
    figure = plots.summary(TABLE, DATA)
    assert DATA in figure.get_suptitle()
    assert titles(figure) == ["test accuracy (%)", "parameters", "MACs (M)", "batch of 256 (ms)"]
    values = [[bar.get_width() for bar in ax.patches] for ax in figure.axes]
    assert values == [[row[column] for row in TABLE] for column in titles(figure)]
    assert [[label.get_text() for label in ax.texts] for ax in figure.axes] == [
        ["92.12", "91.50", "10.50", "90.75"],
        ["20,035,018", "20,035,019", "2,250,000", "2,250,001"],
        ["398.14", "397.10", "40.00", "41.00"],
        ["31.0", "30.1", "8.0", "7.0"],
    ]
    (raw,) = figure.axes[0].collections  # beside the bar of the slim network alone
    assert [(x, y) for x, y in raw.get_offsets().tolist() if x] == [(9.5, 2)]
    assert legend(figure) == ["raw cut"]
    ticks = zip(figure.axes[0].get_yticks(), figure.axes[0].get_yticklabels(), strict=True)
    assert [(y, name.get_text()) for y, name in ticks] == [
        *enumerate(row["network"] for row in TABLE)
    ]
    assert all(ax.get_xlim()[0] == 0 and len(ax.get_xticks()) == 0 for ax in figure.axes)
    bottom, top = figure.axes[0].get_ylim()
    assert top < bottom  # the first row on top
    assert shared(figure.axes, "y")
    assert len({bar.get_facecolor() for bar in figure.axes[0].patches}) == 4  # one for each stage


def test_a_single_network_and_one_that_is_wrong_throughout_have_a_summary():
    (ax, *_) = plots.summary([row("A", "slim", 0.0, 1, 2, 3)], DATA).axes
    assert [label.get_text() for label in ax.texts] == ["0.00"]


# --- names from outside ---------------------------------------------------------------------------

AWKWARD, PLAIN = '_$5-$10\n<"a">\x07e\u0301', '_$5-$10 <"a">e\u0301'


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sample_images", "…; b"),
        (
            "training_curves",
            "Z; λ = 0: training accuracy 63, test accuracy 58.38; sparsity 62.5; "
            "λ = 0.0003: training accuracy 29, test accuracy 13.5; sparsity 86",
        ),
        ("gamma_distributions", "Z; λ = 0; λ = 0.0003; λ = 0.07; λ = 0: 100% have |γ| ≤ 4; λ ="),
        (
            "sorted_gammas",
            "Z: λ = 0.0003 0.8, λ = 0.07 0.3, 25% of λ = 0.0003: threshold 0.12",
        ),
        ("kept_channels", "Z; 45% pruned: 12 of 21 channels stay: 3, 5, 4; 85% pruned"),
        (
            "ladder",
            "Z; λ = 0.0003: before the cut 82.5, raw 10, absorbed 30; λ = 0.07: before the cut "
            "51.5, raw 5",
        ),
        (
            "finetuning_curves",
            "Z; A: test 58.38 %: training 63, test (epoch 0: before) 58.38, dense network, test "
            "71.5; Z: test 13.50 %: training 29",
        ),
        ("accuracy_against_latency", "bring: Z"),
        (
            "summary",
            "Z (latency: eager float32); test accuracy (%): 92.12, 91.50, 10.50, 90.75, 8.50; "
            "parameters: 20,035,018",
        ),
    ],
)
def test_every_figure_takes_any_name_and_its_alternative_text_has_what_it_shows(name, said):
    shown = plots.Shown(FIGURES[name](AWKWARD))
    assert shown.png.startswith(b"\x89PNG")
    assert said.replace("Z", PLAIN) in shown.alt


@pytest.mark.parametrize("name", ["$5-$10", "$5_to_$10", "100$", r"a\b_{c}^d"])
def test_a_name_is_set_as_plain_text(name):
    def drawn(**as_it_is):
        figure, _ = plots.panels(1)
        figure.text(0.1, 0.5, as_it_is.pop("s"), **as_it_is)
        return plots.Shown(figure).png

    once = plots.text(name)
    assert drawn(s=once) == drawn(s=name, parse_math=False)
    assert plots.text(once) == once, "whoever asks twice gets the same"


@pytest.mark.parametrize(
    ("name", "set_as"),
    [("a\nb\tc  d ", "a b c d"), ("a\x00\x1b[31mb\udc80\u202e", "a[31mb"), (5, "5"), ("", "")],
)
def test_a_name_is_one_line_without_what_no_one_sees(name, set_as):
    assert plots.text(name) == set_as


def test_a_name_that_begins_with_a_bar_is_in_the_legend():
    (ax,) = plots.accuracy_against_latency([POINTS[0] | {"network": "_mine"}], DATA).axes
    assert [name.strip("\u200b") for name in legend(ax)] == ["_mine", "torch"]


def test_long_names_of_classes_do_not_overlap_and_titles_stay_inside():
    classes = ["W" * 30, "a very long name of a class", "i" * 100, "貓" * 30, "short"]
    figure = plots.sample_images(images(10), [0, 1, 2, 3, 4] * 2, classes, "n" * 500)
    plots.Shown(figure)  # lays it out
    boxes = [ax.title.get_window_extent() for ax in figure.axes]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    cut = [title.endswith("…") for title in titles(figure)]
    assert cut == 2 * [True, True, True, True, False]
    assert titles(figure)[4] == "short" and titles(figure)[1].startswith("a very")
    assert figure._suptitle.get_window_extent().width < figure.bbox.width


def test_chinese_names_are_no_boxes_where_the_fonts_of_the_hand_in_are(caplog):
    """Boxes would all look alike, and matplotlib would warn of each."""
    pytest.importorskip("pylopdf_fonts_zh_tw")
    pytest.importorskip("pylopdf_fonts_zh_cn")
    drawing._families.cache_clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        cat, dog, simplified = (
            plots.Shown(plots.kept_channels([3], {0.5: [2]}, name)).png for name in "貓狗猫"
        )
    assert len({cat, dog, simplified}) == 3
    assert not caplog.records, "no family is named that is not here"


def test_without_further_fonts_a_picture_is_drawn_all_the_same(monkeypatch):
    monkeypatch.setattr(drawing, "FONTS", ("DejaVu Sans", "no such family"))
    monkeypatch.setitem(sys.modules, "pylopdf_fonts_zh_tw", None)
    monkeypatch.setattr(drawing, "_families", drawing._families.__wrapped__)
    assert drawing._families() == ["DejaVu Sans"]
    assert plots.Shown(FIGURES["kept_channels"]()).png


def test_no_setting_of_the_users_reaches_a_picture_and_none_is_changed():
    expected = plots.Shown(FIGURES["kept_channels"]()).png
    theirs = {"text.usetex": True, "font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30,
              "axes.grid": True, "savefig.bbox": "tight", "font.family": "serif"}  # fmt: skip
    with plt.rc_context(theirs):
        assert plots.Shown(FIGURES["kept_channels"]()).png == expected
        assert plt.rcParams["text.usetex"] is True and plt.rcParams["font.size"] == 20


# --- kept and shown -------------------------------------------------------------------------------


def test_a_picture_is_saved_whole_and_shown_from_the_same_bytes(tmp_path):
    path = tmp_path / "new" / "folder" / "figure.png"
    shown = plots.save(FIGURES["ladder"](), path)
    assert plt.imread(path).std() > 0  # a readable picture that is not blank
    data, _ = shown._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == path.read_bytes()
    assert plt.get_fignums() == []


def test_a_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"figure\.png: could not be written \(No space"):
        plots.save(FIGURES["ladder"](), path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_nbconvert_finds_the_alternative_text_in_what_a_cell_shows():
    """Through IPython's own formatter. Its lab template has no place for the sentence."""
    nbconvert, bs4 = pytest.importorskip("nbconvert"), pytest.importorskip("bs4")
    from IPython.core.interactiveshell import InteractiveShell
    from nbformat import v4

    shown = plots.Shown(plots.kept_channels([3], {0.5: [2]}, 'a "quoted" <name>'))
    shell = InteractiveShell.instance()
    try:
        data, metadata = shell.display_formatter.format(shown)
    finally:
        InteractiveShell.clear_instance()
    sentence = 'a "quoted" <name>; 50% pruned: 2 of 3 channels stay: 2'
    assert data.keys() == {"text/plain", "image/png"}, "the picture is there once"
    assert data["text/plain"] == sentence
    output = v4.new_output("execute_result", data, metadata=metadata)
    notebook = v4.new_notebook(cells=[v4.new_code_cell("shown", outputs=[output])])
    for template in ("lab", "classic"):
        page, _ = nbconvert.HTMLExporter(template_name=template).from_notebook_node(notebook)
        (image,) = bs4.BeautifulSoup(page, "html.parser").select("img")
        assert base64.b64decode(image["src"].split(",")[1]) == shown.png
        assert image["alt"] == sentence or template == "lab"


# --- a training under way -------------------------------------------------------------------------


def so_far(epochs):
    return SimpleNamespace(**{name: values[:epochs] for name, values in HISTORY.items()})


def test_a_live_curve_is_drawn_anew_in_its_place(monkeypatch):
    figures, places, sentences = [], [], []

    def display(figure, display_id, update):
        places.append((display_id, update))
        sentences.append(plots.Shown(figure).alt)
        figures.append(figure)

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(training, "Shown", lambda figure: figure)
    now = iter([0, 0, 0.5, 1, 1, 1.5, 1.5, 1.5, 1.5])  # seconds, at each look at the clock
    monkeypatch.setattr(training.time, "monotonic", lambda: next(now))
    curve, other = plots.LiveCurve("λ = $1, CIFAR-Z", 3, before=33.0), plots.LiveCurve("another", 1)
    for epochs in (2, 1, 3):  # the first comes too soon to be drawn, the last always is
        curve(so_far(epochs))
    other(so_far(1))
    first, second = places[0][0], places[1][0]
    assert first != second
    assert places == [(first, False), (second, False), (first, True), (first, True), (second, True)]
    assert sentences == [
        "λ = $1, CIFAR-Z: test accuracy 33",
        "another",
        "λ = $1, CIFAR-Z: training accuracy 40, test accuracy 38, sparsity 0",
        "λ = $1, CIFAR-Z: training accuracy 55, test accuracy 51, sparsity 75",
        "another: training accuracy 40, test accuracy 38, sparsity 0",
    ]
    (ax,) = figures[3].axes
    assert points(ax, "test accuracy") == ([0, 1, 2, 3], [33.0, 38.0, 61.25, 51.0])
    assert points(ax, "training accuracy") == ([1, 2, 3], [40.0, 66.0, 55.0])
    assert points(ax, "sparsity") == ([1, 2, 3], [0, 12.5, 75])
    assert points(figures[4].axes[0], "test accuracy") == ([1], [38.0])
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_ylim()) == ("share (%)", "epoch", (-3, 103))
    assert ax.get_xlim() == (0, 3)
    assert legend(ax.figure) == ["training accuracy", "test accuracy", "sparsity"]


def test_without_a_notebook_a_live_curve_is_a_line_for_each_epoch(capsys):
    curve = plots.LiveCurve("λ = 0", 2)
    curve(so_far(2))
    assert capsys.readouterr().out.splitlines() == [
        "λ = 0",
        "λ = 0: training accuracy 66, test accuracy 61.25, sparsity 12.5",
    ]
