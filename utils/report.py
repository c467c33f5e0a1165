"""The report that is handed in: numbers, γ and the student's own text in, a PDF of A4 pages out."""

import importlib
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from models.vgg import VGG, VGG_CFGS, scale_cfg
from utils import plots
from utils.handed_in import Cut, Evaluation, Results, Run, Tuned
from utils.sparsity import EPS

INSTALL = "python -m pip install -r requirements-handin.txt"
TEXT = {
    "en": {
        "title": "Network Slimming on {data}",
        "student": "Student {student}  ·  run {name}  ·  id {id}",
        "run": "VGG-{depth} of width {width:g}, {train:,} training and {test:,} test images, "
        "{epochs} epochs for each λ, seed {seed}. Accuracies are those after the last epoch.",
        "trained": "λ = {l1_lambda:g}: training accuracy {train:.2f} %, test accuracy {test:.2f} % "
        "after {epochs} epochs; |γ| is below {eps:g} in {sparse:.1f} % of the channels.",
        "chance": "{accuracy:.2f} % is what guessing among {classes} classes gives.",
        "gammas": "λ = {l1_lambda:g}: median of |γ| {median:.2g}, largest {largest:.2g}.",
        "cut": "From the network trained with λ = {l1_lambda:g}, {realised:.2f} % of the channels "
        "were cut (threshold on |γ|: {threshold:.3g}); {kept:,} of {total:,} stay. cfg = {cfg}",
        "before": "Before the cut",
        "raw": "After the raw cut",
        "repaired": "Repaired without training (β absorbed, BN statistics measured anew)",
        "finetuned": "After {epochs} epochs of fine-tuning",
        "network": "The slim network:",
        "not written": "Not written yet.",
    },
    "zh": {
        "title": "Network Slimming：{data}",
        "student": "學號 {student}  ·  run {name}  ·  id {id}",
        "run": "VGG-{depth}，寬度 {width:g}；訓練影像 {train:,} 張、測試影像 {test:,} 張；"
        "每個 λ 訓練 {epochs} 個 epoch，seed {seed}。準確率皆為最後一個 epoch 的結果。",
        "trained": "λ = {l1_lambda:g}：{epochs} 個 epoch 後，訓練準確率 {train:.2f} %、"
        "測試準確率 {test:.2f} %；{sparse:.1f} % 的通道 |γ| 小於 {eps:g}。",
        "chance": "{accuracy:.2f} % 相當於在 {classes} 個類別中隨機猜測。",
        "gammas": "λ = {l1_lambda:g}：|γ| 的中位數 {median:.2g}，最大值 {largest:.2g}。",
        "cut": "由 λ = {l1_lambda:g} 訓練的網路剪去 {realised:.2f} % 的通道（|γ| 的門檻："
        "{threshold:.3g}），{total:,} 個通道中保留 {kept:,} 個。cfg = {cfg}",
        "before": "剪枝前",
        "raw": "直接剪枝後",
        "repaired": "不經訓練的修復後（吸收 β，重新統計 BN）",
        "finetuned": "微調 {epochs} 個 epoch 後",
        "network": "剪枝後的網路：",
        "not written": "尚未撰寫。",
    },
}


class ReportError(Exception):
    """A report that can't be made; the message says what is missing and how to get it."""


def write_report(
    path: Path,
    *,
    student: str,
    run: Run,
    results: Results,
    gammas: Mapping[float, np.ndarray],
    sections: Sequence[tuple[str, str]],
    language: str = "en",
) -> None:
    """Write the report: curves, γ, one section for each pruning ratio, problems.

    `gammas`: γ of all channels, 1-D, for each λ. `sections`: title
    and the student's own text ("" if there is none) of each section. `language`: a key of TEXT.
    The same input gives the same bytes. Raises ReportError without fpdf2, or without a font for
    one of the text's characters.
    """
    words = TEXT[language]
    pdf = _new_pdf([*words.values(), *(line for section in sections for line in section)])
    profile = results.sparsity_train.profile.model_dump()
    data, classes = results.sparsity_train.data, len(run.data.classes)
    _paragraph(pdf, words["title"].format(data=data), size=16, bold=True)
    _paragraph(pdf, words["student"].format(student=student, name=run.name, id=run.id))
    _paragraph(pdf, words["run"].format(**profile, train=run.data.train, test=run.data.test))

    def body(number: int) -> None:
        if number == 0:
            _curves(pdf, words, results, classes)
        elif number == 1:
            _figures(pdf, plots.gamma_distributions(gammas, data))
            for l1_lambda, gamma in gammas.items():
                sizes = {"median": np.median(np.abs(gamma)), "largest": np.abs(gamma).max()}
                _paragraph(pdf, words["gammas"].format(l1_lambda=l1_lambda, **sizes))
        elif number < len(sections) - 1:
            cut, tuned = results.cuts()[number - 2]
            _cut(pdf, words, results, cut, tuned, classes)

    for number, (title, own_text) in enumerate(sections):
        if pdf.will_page_break(60):  # a heading stays with what follows
            pdf.add_page()
        _paragraph(pdf, f"{number + 1}  {title}", size=12.5, bold=True)
        body(number)
        _paragraph(pdf, own_text or words["not written"], gray=not own_text)
    pdf.output(str(path))


def _curves(pdf, words: Mapping, results: Results, classes: int) -> None:
    runs = results.sparsity_train.runs
    histories = {run.l1_lambda: run.model_dump() for run in runs}
    _figures(pdf, plots.training_curves(histories, results.sparsity_train.data))
    for run in runs:
        numbers = {"train": run.train_accuracy[-1], "test": run.test_accuracy[-1]}
        numbers |= {"sparse": 100 * run.sparsity[-1], "epochs": len(run.lr), "eps": EPS}
        sentence = words["trained"].format(l1_lambda=run.l1_lambda, **numbers)
        _paragraph(pdf, sentence + _chance(words, numbers["test"], classes))


def _cut(pdf, words: Mapping, results: Results, cut: Cut, tuned: Tuned, classes: int) -> None:
    data, profile = results.vggprune.data, results.vggprune.profile
    dense = [v for v in scale_cfg(VGG_CFGS[profile.depth], profile.width) if v != "M"]
    kept = [v for v in cut.cfg if v != "M"]
    numbers = {"realised": 100 * cut.realised_ratio, "kept": sum(kept), "total": sum(dense)}
    _paragraph(pdf, words["cut"].format(**cut.model_dump(exclude={"evaluations"}), **numbers))
    stages = cut.evaluations
    after = {tuned.network: stages.repaired.accuracy}
    _figures(
        pdf,
        plots.kept_channels(dense, {cut.pruning_ratio: kept}, f"λ = {cut.l1_lambda:g}, {data}"),
        plots.finetuning_curves(
            {tuned.network: tuned.model_dump()}, after, stages.before.accuracy, data
        ),
    )
    for name, measured in (
        (words["before"], stages.before),
        (words["raw"], stages.raw),
        (words["repaired"], stages.repaired),
        (words["finetuned"].format(epochs=len(tuned.lr)), tuned.test),
    ):
        note = _chance(words, measured.accuracy, classes)
        _paragraph(pdf, f"{name}{note and ' –' + note}\n{_course_line(measured)}")
    _paragraph(pdf, words["network"])
    pdf.set_font("mono", size=6.5)
    pdf.multi_cell(0, 2.8, str(VGG(cut.cfg, num_classes=classes)), new_x="LMARGIN", new_y="NEXT")
    pdf.ln(2)


def _course_line(measured: Evaluation) -> str:
    """What the course's own test() prints."""
    return (
        f"Test set: Average loss: {measured.loss:.4f}, Accuracy: "
        f"{measured.correct}/{measured.images} ({measured.accuracy:.1f}%)"
    )


def _chance(words: Mapping, accuracy: float, classes: int) -> str:
    guessed = accuracy < 150 / classes
    return " " + words["chance"].format(accuracy=accuracy, classes=classes) if guessed else ""


def _new_pdf(texts: Sequence[str]):
    """An empty document whose fonts have every character of `texts`."""
    try:
        from fpdf import FPDF
    except ImportError:
        raise ReportError(f"the report needs fpdf2: {INSTALL}") from None
    pdf = FPDF(format="A4")
    pdf.set_creation_date(datetime(2000, 1, 1, tzinfo=timezone.utc))  # same input, same bytes
    pdf.set_margin(18)
    pdf.set_auto_page_break(True, margin=18)
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    pdf.add_font("text", "", folder / "DejaVuSans.ttf")
    pdf.add_font("text", "B", folder / "DejaVuSans-Bold.ttf")
    pdf.add_font("mono", "", folder / "DejaVuSansMono.ttf")
    for package in ("pylopdf_fonts_zh_tw", "pylopdf_fonts_zh_cn"):
        with suppress(ImportError):
            pdf.add_font(package, "", importlib.import_module(package).sans_path())
    pdf.set_fallback_fonts([name for name in pdf.fonts if "pylopdf" in name], exact_match=False)
    known = set().union(*(font.cmap for name, font in pdf.fonts.items() if name != "mono"))
    unknown = {c for text in texts for c in text if ord(c) not in known and c != "\n"}
    if unknown:
        shown = "".join(sorted(unknown)[:10])
        raise ReportError(f"no font here has {shown}: {INSTALL} (or leave them out)")
    pdf.add_page()
    return pdf


def _paragraph(pdf, text: str, *, size: float = 9.5, bold: bool = False, gray: bool = False):
    # Chinese has no spaces: a line may end after each character, but not before a full stop.
    text = re.sub(r"(?<=[\u3000-\uffef])(?<![（「『])(?![，。、；：！？）」』])", "\u200b", text)
    pdf.set_font("text", "B" if bold else "", size)
    pdf.set_text_color(130 if gray else 0)
    pdf.multi_cell(0, 0.52 * size, text, align="L", new_x="LMARGIN", new_y="NEXT")
    pdf.set_text_color(0)
    pdf.ln(1.5)


def _figures(pdf, *figures: Figure) -> None:
    """Draw figures side by side, as vectors, on one page."""
    share, gap = pdf.epw / len(figures), 2
    sizes = [figure.get_size_inches() for figure in figures]
    widths = [min(share - gap, 25.4 * width) for width, _ in sizes]
    height = max(w * size[1] / size[0] for w, size in zip(widths, sizes, strict=True))
    if pdf.will_page_break(height):
        pdf.add_page()
    top = pdf.get_y()
    for column, (figure, width) in enumerate(zip(figures, widths, strict=True)):
        svg = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
            figure.savefig(svg, format="svg", metadata=nothing)
        pdf.image(svg, x=pdf.l_margin + column * share, y=top, w=width)
    pdf.set_y(top + height + 2)
