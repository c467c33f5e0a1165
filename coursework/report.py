"""The report that is handed in: numbers, γ and the student's own text in, a PDF of A4 pages out."""

import io
import json
import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from matplotlib.figure import Figure

from coursework.handed_in import Results, cuts
from models.vgg import VGG, widths
from utils import plots
from utils.plots.drawing import chinese_fonts
from utils.repair import RUNGS
from utils.run.identity import Run
from utils.sparsity import EPS
from utils.store.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "python -m pip install -r requirements-handin.txt"
RIGHT_TO_LEFT = ("R", "AL", "AN", "RLE", "RLO", "RLI")  # fpdf2 would set them backwards


class ReportError(Exception):
    """A report that can't be made: what is missing and how to get it."""


def write_report(
    path: Path, student: str, run: Run, results: Results, gammas: Mapping, sections, language: str
) -> None:
    """Write the report: curves, γ, one section for each pruning ratio, problems, further text.
    `gammas`: 1-D, for each λ. `sections`: title and the student's own text of each, "" if there is
    none. Raises ReportError without fpdf2, or for what can't be set."""
    words = json.loads((ROOT / "docs" / "report_words.json").read_text("utf-8"))[language]
    page = Pages(words, len(run.data["classes"]))
    trained, pairs = results["sparsity_train"], cuts(results)
    page.write(words["title"].format(data=trained["data"]), size=16, style="B")
    page.say("student", student=student, name=run.name, id=run.id)
    page.say("run", **vars(trained["profile"]), train=run.data["train"], test=run.data["test"])
    for number, (title, own_text) in enumerate(sections, start=1):
        if page.pdf.will_page_break(60):  # a heading stays with what follows
            page.pdf.add_page()
        page.pdf.ln(2)
        page.write(f"{number}  {title}", size=12.5, style="B")
        if number == 1:
            histories = {r["l1_lambda"]: r for r in trained["runs"]}
            page.draw(plots.training_curves(histories, trained["data"]))
            for r in trained["runs"]:
                last = {"train": r["train_accuracy"][-1], "test": r["test_accuracy"][-1]}
                last |= {"sparse": 100 * r["sparsity"][-1], "epochs": len(r["lr"]), "eps": EPS}
                page.say("trained", last["test"], l1_lambda=r["l1_lambda"], **last)
        elif number == 2:
            page.draw(plots.gamma_distributions(gammas, trained["data"]))
            for value, sizes in ((value, np.abs(gamma)) for value, gamma in gammas.items()):
                page.say("gammas", l1_lambda=value, median=np.median(sizes), largest=sizes.max())
        elif number - 3 < len(pairs):
            _cut(page, results, *pairs[number - 3])
        page.write(own_text or words["not written"], gray=0 if own_text else 130)
    page.save(path)


def _cut(page: "Pages", results: Results, cut: dict, tuned: dict) -> None:
    dense, kept = widths(results["vggprune"]["profile"].cfg), widths(cut["cfg"])
    numbers = {"realised": 100 * cut["realised_ratio"], "kept": sum(kept), "total": sum(dense)}
    page.say("cut", **cut | numbers)
    weakest = min(results["sparsity_train"]["runs"], key=lambda run: run["l1_lambda"])
    around, data, network = cut["evaluations"], results["vggprune"]["data"], tuned["network"]
    raw, repaired = around[RUNGS[0]], around[RUNGS[-1]]
    title, start = f"λ = {cut['l1_lambda']:g}, {data}", {network: repaired["accuracy"]}
    page.draw(
        plots.kept_channels(dense, {cut["pruning_ratio"]: kept}, title),
        plots.finetuning_curves({network: tuned}, start, weakest["test_accuracy"][-1], data),
    )
    measured = (around["before the cut"], raw, repaired, tuned["test"])
    for key, found in zip(("before", "raw", "repaired", "finetuned"), measured, strict=True):
        page.say(key, found["accuracy"], epochs=len(tuned["lr"]), **found)
    page.say("network")
    page.write(str(VGG(cut["cfg"], num_classes=page.classes)), size=6.5, font="mono")


class Pages:
    """A4 pages that fill from top to bottom. Every text of them goes through `write`."""

    def __init__(self, words: Mapping[str, str], classes: int):
        try:
            from fpdf import FPDF
        except ImportError:
            raise ReportError(f"the report needs fpdf2: {INSTALL}") from None
        self.words, self.classes = words, classes
        self.unset = {}  # characters that can't be set, and where each was met
        pdf = self.pdf = FPDF(format="A4")
        pdf.alias_nb_pages(None)  # else "{nb}" in a text becomes a number
        pdf.set_creation_date(datetime(2000, 1, 1, tzinfo=timezone.utc))  # same input, same bytes
        pdf.set_margin(18)
        pdf.set_auto_page_break(True, margin=18)
        fonts = Path(get_data_path(), "fonts", "ttf")  # they come with matplotlib
        for family, style, file in (("text", "", ""), ("text", "B", "-Bold"), ("mono", "", "Mono")):
            pdf.add_font(family, style, fonts / f"DejaVuSans{file}.ttf")
        for family, file in chinese_fonts():
            pdf.add_font(family, "", file)
        everywhere = [family for family in pdf.fonts if family == "text" or "zh" in family]
        pdf.set_fallback_fonts(everywhere, exact_match=False)
        self.known = {ord("\n")}.union(*(pdf.fonts[family].cmap for family in everywhere))
        pdf.add_page()

    def save(self, path: Path) -> None:
        """Write the PDF. Raises ReportError if a text had characters that can't be set."""
        if self.unset:
            why = "no font here has them, or they run from right to left"
            listed = "; ".join([*self.unset.values()][:10])
            raise ReportError(f"can't show {listed}: {why}. Leave them out; for Chinese: {INSTALL}")
        write_whole(path, self.pdf.output())

    def say(self, key: str, accuracy: float = 100.0, /, **numbers) -> None:
        """Write a sentence of `words`; one more if `accuracy`, in %, is hardly above guessing."""
        chance = 100 / self.classes
        text = self.words[key]
        if accuracy < chance + (100 - chance) / 10:
            text += "\n" + self.words["chance"]
        self.write(text.format(classes=self.classes, chance=chance, **numbers))

    def write(self, text: str, *, size=9.5, style="", gray=0, font="text") -> None:
        text = unicodedata.normalize("NFC", text).strip(" ").replace(" %", "\u00a0%")
        for i, c in enumerate(text):
            if ord(c) not in self.known or unicodedata.bidirectional(c) in RIGHT_TO_LEFT:
                name = f"U+{ord(c):04X} {unicodedata.name(c, 'without a name')}"
                self.unset.setdefault(c, f"{c} ({name}) in {text[max(0, i - 20) : i + 20]!r}")
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
        scale = min(25.4, *((share - 2) / width for width, _ in sizes))  # mm an inch
        if pdf.will_page_break(height := scale * max(height for _, height in sizes)):
            pdf.add_page()
        top, nothing = pdf.get_y(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        for column, figure in enumerate(figures):
            svg = io.BytesIO()
            with plots.style(**{"svg.hashsalt": "report", "svg.fonttype": "path"}):
                figure.savefig(svg, format="svg", metadata=nothing)
            pdf.image(svg, x=pdf.l_margin + column * share, y=top, w=scale * sizes[column][0])
        pdf.set_y(top + height + 2)
