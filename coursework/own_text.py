"""The student's own text: report.md, divided by the headings of its template and nothing else."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from coursework.report import ROOT, ReportError
from utils.store.files import write_whole

LANGUAGES = ("en", "zh")
PIECES = re.compile(
    r"^ *(?P<fence>```|~~~)[^`\n]*\n.*?^ *(?P=fence) *$"
    r"|<!--.*?-->|^##? *(?P<heading>[^#\n][^\n]*)$",
    re.MULTILINE | re.DOTALL,
)
"""What is not running text in report.md: code, comments (they are not printed), headings."""


def own_text(path: Path, ratios: Sequence[float], language: str):
    """Title and the student's text of each section, then texts that have none, and what to tell the
    student. Without a file the template is written. Raises ReportError unless it is UTF-8."""
    top, curves, gammas, cut, problems = _template(language)
    cuts = [cut.replace("{percent}", f"{100 * ratio:g} %") for ratio in ratios]
    template = [curves, gammas, *cuts, problems]
    if not path.exists():
        parts = [f"# {top}", *(f"## {n} {part}" for n, part in enumerate(template, start=1))]
        write_whole(path, ("\n\n".join(parts) + "\n").encode("utf-8"))
    try:
        blocks, others = _divided(path.read_text("utf-8-sig").expandtabs(4), language)
    except UnicodeDecodeError:
        raise ReportError(f"{path} is not UTF-8: save it as UTF-8 in your editor") from None
    titles = [part.splitlines()[0] for part in template]
    unwritten = [t if t in blocks else f"{t} (add ## {t})" for t in titles if not blocks.get(t)]
    homeless = [title for title, text in blocks.items() if text and title not in titles]
    remarks = [f"Not written yet: {title}" for title in unwritten]
    remarks += [f"Printed at the end, for the run has no such section: {t}" for t in homeless]
    remarks += [f"Not of the template, printed as your text: {h}" for h in others]
    sections = [(title, blocks.get(title, "")) for title in titles + homeless]
    return sections, [f"{path}: {remark}" for remark in remarks]


def _divided(written: str, language: str) -> tuple[dict[str, str], list[str]]:
    """The text under each heading of the template, of any language, by its title in `language`,
    what is above all headings under the first; and other headings, which stay in the text."""
    titles = [[part.splitlines()[0] for part in _template(name)] for name in (language, *LANGUAGES)]
    pairs = [pair for others in titles for pair in zip(titles[0], others, strict=True)]
    known = {_about(other)[0]: title for title, other in pairs}
    blocks, others, end, title = defaultdict(str), [], 0, titles[0][0]
    for piece in PIECES.finditer(written):
        blocks[title] += written[end : piece.start()]
        end = piece.end()
        letters, percent = _about(piece["heading"] or "")
        if letters in known:
            title = known[letters].replace("{percent}", percent)
        elif not piece[0].startswith("<!--"):
            blocks[title] += piece[0]
            others += [piece[0]] if piece[0].startswith("## ") else []
    blocks[title] += written[end:]
    return {title: text.strip() for title, text in blocks.items()}, others


def _about(heading: str) -> tuple[str, str]:
    """Its letters and a "%", whatever their case and whatever number is before them; its share."""
    share = re.search(r"(\d+(?:\.\d+)?)\s*[%％]|\{percent\}", heading)
    letters = "".join(filter(str.isalpha, heading.replace("{percent}", ""))).casefold()
    return letters + "%" * bool(share), f"{float(share[1]):g} %" if share and share[1] else ""


def _template(language: str) -> list[str]:
    """What report.md begins with, and its sections: of each a title and a hint."""
    text = (ROOT / "docs" / f"report_{language}.md").read_text("utf-8")
    return [part.strip() for part in text.removeprefix("# ").split("\n## ")]
