"""The report that is handed in: numbers, γ and the student's own text in, a PDF of A4 pages out."""

import importlib
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from matplotlib import get_data_path, rc_context
from matplotlib.figure import Figure

from coursework.handed_in import Cut, Evaluation, Results, Run, Tuned
from models.vgg import VGG, VGG_CFGS, scale_cfg, widths
from utils import plots
from utils.sparsity import EPS

INSTALL = "python -m pip install -r requirements-handin.txt"


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
    words: Mapping[str, str],
) -> None:
    """Write the report: curves, γ, one section for each pruning ratio, problems.

    `gammas`: γ of all channels, 1-D, for each λ. `sections`: title and the student's own text (""
    if there is none) of each. `words`: what docs/report_words.json has for a language. The same
    input gives the same bytes. Raises ReportError without fpdf2, or without a font for one of the
    characters.
    """
    trained = results.sparsity_train
    page = _Pages([*words.values(), *(text for section in sections for text in section)])
    page.write(words["title"].format(data=trained.data), size=16, style="B")
    page.write(words["student"].format(student=student, name=run.name, id=run.id))
    images = run.data.model_dump(include={"train", "test"})
    page.write(words["run"].format(**trained.profile.model_dump(), **images))
    for number, (title, own_text) in enumerate(sections, start=1):
        page.heading(f"{number}  {title}")
        if number == 1:
            _curves(page, words, results, len(run.data.classes))
        elif number == 2:
            _distributions(page, words, gammas, trained.data)
        elif number < len(sections):
            _cut(page, words, results, *results.cuts()[number - 3], len(run.data.classes))
        page.write(own_text or words["not written"], gray=0 if own_text else 130)
    page.pdf.output(str(path))


def _curves(page: "_Pages", words: Mapping, results: Results, classes: int) -> None:
    trained = results.sparsity_train
    histories = {run.l1_lambda: run.model_dump() for run in trained.runs}
    page.draw(plots.training_curves(histories, trained.data))
    for run in trained.runs:
        numbers = {"train": run.train_accuracy[-1], "test": run.test_accuracy[-1], "eps": EPS}
        numbers |= {"sparse": 100 * run.sparsity[-1], "epochs": len(run.lr)}
        sentence = words["trained"].format(l1_lambda=run.l1_lambda, **numbers)
        page.write("\n".join([sentence, *_if_guessed(words, numbers["test"], classes)]))


def _distributions(page: "_Pages", words: Mapping, gammas: Mapping, data: str) -> None:
    page.draw(plots.gamma_distributions(gammas, data))
    for l1_lambda, gamma in gammas.items():
        sizes = {"median": np.median(np.abs(gamma)), "largest": np.abs(gamma).max()}
        page.write(words["gammas"].format(l1_lambda=l1_lambda, **sizes))


def _cut(
    page: "_Pages", words: Mapping, results: Results, cut: Cut, tuned: Tuned, classes: int
) -> None:
    data, profile, stages = results.vggprune.data, results.vggprune.profile, cut.evaluations
    dense = widths(scale_cfg(VGG_CFGS[profile.depth], profile.width))
    kept = widths(cut.cfg)
    numbers = {"realised": 100 * cut.realised_ratio, "kept": sum(kept), "total": sum(dense)}
    page.write(words["cut"].format(**cut.model_dump(exclude={"evaluations"}), **numbers))
    curves = {tuned.network: tuned.model_dump()}
    after = {tuned.network: stages.repaired.accuracy}
    uncut = results.train_prune_model.dense_accuracy()
    page.draw(
        plots.kept_channels(dense, {cut.pruning_ratio: kept}, f"λ = {cut.l1_lambda:g}, {data}"),
        plots.finetuning_curves(curves, after, uncut, data),
    )
    for name, measured in (*stages, ("finetuned", tuned.test)):
        title = words[name].format(epochs=len(tuned.lr))
        guessed = _if_guessed(words, measured.accuracy, classes)
        page.write("\n".join([title, _course_line(measured), *guessed]))
    page.write(words["network"])
    page.write(str(VGG(cut.cfg, num_classes=classes)), size=6.5, font="mono")


def _course_line(measured: Evaluation) -> str:
    """What the course's own test() prints."""
    counted = f"{measured.correct}/{measured.images} ({measured.accuracy:.1f}%)"
    return f"Test set: Average loss: {measured.loss:.4f}, Accuracy: {counted}"


def _if_guessed(words: Mapping, accuracy: float, classes: int) -> list[str]:
    """A word on an accuracy that needs no training, if this is one."""
    chance = 100 / classes
    said = words["chance"].format(classes=classes, chance=chance)
    return [said] if accuracy < 1.5 * chance else []


class _Pages:
    """A4 pages that fill from top to bottom, in fonts that have every character of `texts`."""

    def __init__(self, texts: Sequence[str]):
        try:
            from fpdf import FPDF
        except ImportError:
            raise ReportError(f"the report needs fpdf2: {INSTALL}") from None
        pdf = self.pdf = FPDF(format="A4")
        pdf.set_creation_date(datetime(2000, 1, 1, tzinfo=timezone.utc))  # same input, same bytes
        pdf.set_margin(18)
        pdf.set_auto_page_break(True, margin=18)
        files = {("text", ""): "Sans", ("text", "B"): "Sans-Bold", ("mono", ""): "SansMono"}
        for (family, style), file in files.items():  # they come with matplotlib
            pdf.add_font(family, style, Path(get_data_path(), "fonts", "ttf", f"DejaVu{file}.ttf"))
        known = set(pdf.fonts["text"].cmap)
        for package in ("pylopdf_fonts_zh_tw", "pylopdf_fonts_zh_cn"):
            with suppress(ImportError):
                pdf.add_font(package, "", importlib.import_module(package).sans_path())
                known |= set(pdf.fonts[package].cmap)
        chinese = [family for family in pdf.fonts if "zh" in family]
        pdf.set_fallback_fonts(chinese, exact_match=False)
        unknown = sorted({c for text in texts for c in text if ord(c) not in known and c != "\n"})
        if unknown:
            shown = "".join(unknown[:10])
            raise ReportError(f"no font here has {shown}: {INSTALL} (or leave them out)")
        pdf.add_page()

    def heading(self, text: str) -> None:
        if self.pdf.will_page_break(60):  # a heading stays with what follows
            self.pdf.add_page()
        self.pdf.ln(2)
        self.write(text, size=12.5, style="B")

    def write(
        self, text: str, *, size: float = 9.5, style: str = "", gray: int = 0, font: str = "text"
    ) -> None:
        text = text.strip(" ").replace(" %", "\u00a0%")
        # Chinese has no spaces: a line may end after each character, but not before a full stop.
        after, before = r"(?<=[\u3000-\uffef])(?<![（「『])", r"(?![，。、；：！？）」』])"
        text = re.sub(after + before, "\u200b", text)
        self.pdf.set_font(font, style, size)
        self.pdf.set_text_color(gray)
        height = size * (0.52 if font == "text" else 0.43)
        self.pdf.multi_cell(0, height, text, align="L", new_x="LMARGIN", new_y="NEXT")
        self.pdf.ln(1.5)

    def draw(self, *figures: Figure) -> None:
        """Figures side by side, as vectors."""
        pdf, share = self.pdf, self.pdf.epw / len(figures)
        sizes = [figure.get_size_inches() for figure in figures]
        widths = [min(share - 2, 25.4 * width) for width, _ in sizes]
        height = max(w * size[1] / size[0] for w, size in zip(widths, sizes, strict=True))
        if pdf.will_page_break(height):
            pdf.add_page()
        top = pdf.get_y()
        for column, (figure, width) in enumerate(zip(figures, widths, strict=True)):
            svg, nothing = io.BytesIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
            with rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
                figure.savefig(svg, format="svg", metadata=nothing)
            pdf.image(svg, x=pdf.l_margin + column * share, y=top, w=width)
        pdf.set_y(top + height + 2)
