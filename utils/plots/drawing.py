"""What all figures share: fonts, names from outside, panels, and how they are kept and shown."""

import base64
import functools
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.textpath import text_to_path

from utils.store.files import write_whole

TRAIN, TEST, SPARSITY = "tab:blue", "tab:green", "tab:orange"
# Families that systems have; a glyph is taken from the first that has it.
FONTS = (
    *("DejaVu Sans", "Noto Sans TC", "Noto Sans SC"),  # matplotlib's own, and those of hand-in
    *("Noto Sans CJK TC", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Emoji"),  # Linux
    *("PingFang TC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),  # macOS
    *("Microsoft JhengHei", "Yu Gothic", "Malgun Gothic", "Nirmala UI", "Segoe UI Emoji"),
)


def chinese_fonts() -> Iterator[tuple[str, Path]]:
    """Those of requirements-handin.txt that are here: package and file of each."""
    for package in ("pylopdf_fonts_zh_tw", "pylopdf_fonts_zh_cn"):
        with suppress(ImportError):
            yield package, importlib.import_module(package).sans_path()


@functools.cache
def _families() -> list[str]:
    """Those of FONTS that are here: matplotlib warns of each that is not."""
    for _, file in chinese_fonts():
        fontManager.addfont(file)
    here = {font.name for font in fontManager.ttflist}
    return [family for family in FONTS if family in here]


@contextmanager
def style(**settings) -> Iterator[None]:
    """matplotlib's defaults and `settings`, whatever a matplotlibrc says, for what draws."""
    with matplotlib.style.context(["default", {"font.family": _families(), **settings}]):
        yield


@style()
def text(name: object, inches: float = 3.0, size: float = 12.0) -> str:
    """A name from outside (data, class, network) as a picture sets it, or a title with one in it.

    In one line and as it is: `$` starts no formula, a leading "_" hides nothing from a legend.
    What is wider than `inches` at `size` points ends in "…". Twice is as good as once.
    """
    plain = "".join(c if c.isprintable() else " " * c.isspace() for c in str(name))
    plain = " ".join(plain.replace(r"\$", "$").split())[:200]
    font = FontProperties(size=size)
    while text_to_path.get_text_width_height_descent(plain, font, False)[0] > 72 * inches:
        plain = plain.removesuffix("…")[:-1].rstrip() + "…"
    plain = plain.replace("$", r"\$")
    return f"\u200b{plain}" if plain.startswith("_") else plain


@style()
def panels(n: int, rows: int = 1, width: float = 3.6, height: float = 3.2, **options):
    """A figure with `rows` × `n` panels as an array; pyplot, and so its backend, has no part."""
    figure = Figure(figsize=(width * n, height * rows), layout="constrained")
    return figure, figure.subplots(rows, n, squeeze=False, **options)


class Shown:
    """A figure as a notebook shows it: a PNG, and a sentence for those who can't see it."""

    @style()
    def __init__(self, figure: Figure) -> None:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        self.png, self.alt = picture.getvalue(), _sentence(figure)

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": self.alt}
        return data, {"image/png": {"alt": self.alt}}


def _sentence(figure: Figure) -> str:
    """Its title; of each panel the title, where each line ends, and what is written in it."""
    parts = [figure.get_suptitle()]
    for ax in sorted(figure.axes, key=lambda ax: ax.get_subplotspec().num1):  # twins together
        lines = [(line.get_label(), *line.get_data()) for line in ax.lines]
        said = [f"{name} {y[-1]:.4g}" for name, x, y in lines if name[0] != "_" and len(x)]
        said += [written.get_text() for written in ax.texts]
        parts.append(": ".join(filter(None, [ax.get_title(), ", ".join(said)])))
    return "; ".join(filter(None, parts)).replace(r"\$", "$").replace("\u200b", "")


def save(figure: Figure, path: str | Path) -> Shown:
    """Write the figure as a PNG, whole or not at all, and hand it on as a cell shows it."""
    shown = Shown(figure)
    write_whole(path, shown.png)
    return shown
