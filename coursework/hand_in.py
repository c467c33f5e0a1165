"""Check a run, write its report and pack what the course asks for: what `make handin` calls."""

import argparse
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from coursework.handed_in import ARCHIVE, NEEDED, REPORT, STUDENT, Results, inspect
from coursework.report import ReportError, write_report
from utils.profile import get_profile
from utils.run.identity import RunError, last_run
from utils.sparsity import bn_layers
from utils.store.checkpoint import CheckpointError, load
from utils.store.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("en", "zh")
CODE = ("models/*.py", "utils/**/*.py", "requirements.txt")
"""What the notebooks need to run when unpacked."""


def hand_in(student: str, name: str, *, language: str = "en", root: Path = ROOT) -> Path:
    """Write the report of run `name` and the archive EAI_Lab4_<student>.zip; its path comes back.

    Raises SystemExit with all that is missing. The student's own text is in report.md, a template
    at first, which is never overwritten.
    """
    if not re.fullmatch(STUDENT, student):
        sys.exit(f"STUDENT = {student!r}: letters, digits, - and _, at most 40")
    figures, checkpoints = root / "figures" / name, root / "checkpoints" / name
    if not figures.is_dir():
        runs = ", ".join(sorted(p.parent.name for p in root.glob("figures/*/results.json")))
        sys.exit(f"There is no run {name!r} (there are: {runs or 'none'}); `make lab` makes one")
    sources = {n: _source(root, name, n) for n in NEEDED}
    run, results, problems = inspect({n: p.read_bytes() for n, p in sources.items() if p.exists()})
    if run and run.trained_in:
        sys.exit(
            f"Not handed in: the run {name} only cuts what {run.trained_in} trained, and a hand-in "
            f"shows both. Hand in that one: RUN={run.trained_in}, or --run {run.trained_in}"
        )
    gammas, wrong = _gammas(checkpoints, results) if results else ({}, [])
    unsaved = [n for n, path in sources.items() if not path.exists() and (root / n).exists()]
    wrong += [
        f"{n}: the one in {root} shows another run; was it saved after it ran?" for n in unsaved
    ]
    if problems or wrong:
        listed = "\n- ".join([*problems, *wrong])
        sys.exit(f"Not handed in. `make lab` makes a whole run; run {name} has:\n- {listed}")

    if lacks := results.lacks():
        print(f"Mind what the course asks for and run {name} does not have: {', '.join(lacks)}")
    sections = own_text(figures / "report.md", results, language)
    for title, text in sections:
        if not text:
            print(f"Not written yet, in {figures / 'report.md'}: {title}")
    report = figures / REPORT.format(student=student)
    words = json.loads((ROOT / "docs" / "report_words.json").read_text("utf-8"))[language]
    found = {"run": run, "results": results, "gammas": gammas}
    write_report(report, student=student, sections=sections, words=words, **found)
    code = [path for pattern in CODE for path in root.glob(pattern)]
    packed = {path.relative_to(root).as_posix(): path for path in code}
    return pack(root / ARCHIVE.format(student=student), {**packed, **sources, report.name: report})


def _source(root: Path, name: str, file: str) -> Path:
    """Where a file of run `name` lies; of a notebook, which lies in the root if it was opened by
    hand, the copy that was run last."""
    run = root / "checkpoints" / name / "run.json"
    if file == run.name:
        return run
    by_hand, by_make = root / file, root / "figures" / name / file
    try:
        began = json.loads(run.read_bytes())["began"]
        shown = by_hand.read_text("utf-8").replace("\\u00b7", "·")
    except (OSError, ValueError, LookupError, TypeError):  # `inspect` says what is wrong
        return by_make
    # The notebooks that came with the lab show a run of this name, too, but an earlier one.
    if f"Run {name} · id" not in shown or f"begun {began}" not in shown:
        return by_make
    return max(by_make, by_hand, key=lambda p: p.exists() and p.stat().st_mtime)


def _gammas(folder: Path, results: Results) -> tuple[dict[float, np.ndarray], list[str]]:
    """γ of all channels for each λ, and the checkpoints that are missing or of other trainings."""
    gammas, problems = {}, []
    for training in results.sparsity_train.runs:
        path = folder / f"trained_lambda_{training.l1_lambda:g}.pt"
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if checkpoint.history.get("train_accuracy") != training.train_accuracy:
            problems.append(
                f"{path}: of another training than results.json; run sparsity_train.ipynb"
            )
        layers = bn_layers(checkpoint.model())
        gammas[training.l1_lambda] = torch.cat([bn.weight.detach() for bn in layers]).numpy()
    return gammas, problems


def own_text(path: Path, results: Results, language: str) -> list[tuple[str, str]]:
    """Title and the student's text of each section of the report; the template is written to
    `path` if there is no such file."""
    template = (ROOT / "docs" / f"report_{language}.md").read_text("utf-8")
    top, curves, gammas, cut, problems = template.split("\n## ")
    ratios = results.vggprune.profile.pruning_ratios
    cuts = [cut.format(percent=f"{100 * ratio:g} %") for ratio in ratios]
    sections = [curves, gammas, *cuts, problems]
    if not path.exists():
        numbered = [f"## {n} {section.strip()}" for n, section in enumerate(sections, start=1)]
        write_whole(path, ("\n\n".join([top.strip(), *numbered]) + "\n").encode("utf-8"))
    try:
        written = path.read_text("utf-8").expandtabs(4) + "\n"
    except UnicodeDecodeError:
        raise ReportError(f"{path} is not UTF-8: save it as UTF-8 in your editor") from None
    written = re.sub(r"<!--.*?-->", "", written, flags=re.DOTALL)
    blocks = dict(re.findall(r"^##\s*(\d+)[^\n]*\n(.*?)(?=^##\s|\Z)", written, re.M | re.S))
    return [
        (section.splitlines()[0], blocks.get(str(number), "").strip())
        for number, section in enumerate(sections, start=1)
    ]


def pack(archive: Path, packed: Mapping[str, Path]) -> Path:
    """Write `archive` whole, a file under each name; the same files give the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as target:
        for name in sorted(packed):
            entry = zipfile.ZipInfo(name)  # dated 1980, whenever the file was written
            entry.external_attr = 0o644 << 16
            entry.create_system = 3  # the same bytes on Windows
            entry.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(entry, packed[name].read_bytes())
    replaced = " (the one before is replaced)" if archive.exists() else ""
    write_whole(archive, content.getvalue())
    print(f"{archive}: {len(packed)} files, {len(content.getvalue()) / 1e6:.2f} MB{replaced}")
    return archive


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # λ and γ, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", help="your student ID")
    parser.add_argument("--run", help="default: what PROFILE or RUN name, else the last run")
    parser.add_argument("--language", default="en", choices=LANGUAGES, help="of the report")
    options = parser.parse_args()
    named = os.environ.get("LAB_PROFILE") or os.environ.get("LAB_RUN")
    try:
        name = options.run or (get_profile().name if named else last_run())
        hand_in(options.student, name, language=options.language)
    except (ReportError, RunError, ValueError, OSError) as error:
        sys.exit(f"Not handed in: {error}")


if __name__ == "__main__":
    main()
