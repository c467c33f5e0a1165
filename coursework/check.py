"""Look over archives that were handed in, without executing anything in them: `make check ZIP=…`.

A line for each: what is missing, which run, the accuracies it claims, who else has that run.
"""

import argparse
import re
import stat
import sys
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tabulate import tabulate

from coursework.handed_in import ARCHIVE, NEEDED, REPORT, STUDENT, Results, inspect

LARGEST_ARCHIVE = 30_000_000
LARGEST_FILE = 10_000_000
"""Bytes of a file that is read, unpacked; notebooks with their plots have about one million."""
FOREIGN = (".pt", ".pth", ".onnx", ".npz", ".npy", ".pkl", ".bin", ".gz", ".tar", ".zip", ".pyc")
"""Endings of weights, data sets and caches."""
COLUMNS = ("archive", "run", "test accuracy: raw cut → fine-tuned (%)", "same run", "what is wrong")


@dataclass
class HandIn:
    """What was found in an archive."""

    name: str
    run: str = ""
    claims: str = ""
    problems: list[str] = field(default_factory=list)


class Unacceptable(Exception):
    """Why an archive is not read further."""


def check(paths: list[Path]) -> list[HandIn]:
    """Look into each archive of `paths`, of a folder all its *.zip."""
    archives = [
        archive
        for path in paths
        for archive in (sorted(path.rglob("*.zip")) if path.is_dir() else [path])
    ]
    return [_look_into(archive) for archive in archives]


def _look_into(path: Path) -> HandIn:
    hand_in = HandIn(path.name)
    pattern = re.escape(ARCHIVE).replace(re.escape("{student}"), f"({STUDENT})")
    name = re.fullmatch(pattern, path.name)
    if not name:
        hand_in.problems.append(f"its name is not {ARCHIVE.format(student='<student>')}")
    try:
        if path.stat().st_size > LARGEST_ARCHIVE:
            raise Unacceptable(f"larger than {LARGEST_ARCHIVE / 1e6:g} MB; not opened")
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive)
            wanted = [*NEEDED, REPORT.format(student=name[1])] if name else NEEDED
            files = {n: _read(archive, entries[n]) for n in wanted if n in entries}
    except Unacceptable as error:
        hand_in.problems.append(str(error))
    except Exception as error:  # whatever a hostile archive can raise: the others are still read
        hand_in.problems.append(f"not a readable archive ({type(error).__name__})")
    else:
        hand_in.problems += _missing(entries, name and name[1], files)
        run, results, problems = inspect(files)
        hand_in.problems += problems
        hand_in.run = f"{run.id} begun {run.began}" if run else ""
        if results:
            hand_in.claims = _claims(results)
            hand_in.problems += [f"not in its run: {what}" for what in results.lacks()]
    return hand_in


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by name, without a folder that is around them all.

    Raises Unacceptable for names or kinds of entries that could do harm when unpacked.
    """
    entries, seen = {}, set()
    for entry in archive.infolist():
        name = entry.orig_filename
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ":" in name or ".." in parts:
            raise Unacceptable(f"unpacks outside its folder: {name}")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise Unacceptable(f"a link: {name}")
        if entry.flag_bits & 1:
            raise Unacceptable(f"encrypted: {name}")
        if name.casefold() in seen:  # one system unpacks the first of them, another the last
            raise Unacceptable(f"twice in it: {name}")
        seen.add(name.casefold())
        if not entry.is_dir() and parts[0] != "__MACOSX":
            entries[name] = entry
    tops = {name.split("/")[0] if "/" in name else "" for name in entries}
    if len(tops) == 1 and "" not in tops:
        return {name.split("/", 1)[1]: entry for name, entry in entries.items()}
    return entries


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """The content of a file; never more than LARGEST_FILE is unpacked."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unacceptable(f"packed in an unusual way: {entry.filename}")  # may ask for any memory
    with archive.open(entry) as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise Unacceptable(f"larger than {LARGEST_FILE / 1e6:g} MB unpacked: {entry.filename}")
    return content


def _missing(entries: dict, student: str | None, files: dict[str, bytes]) -> list[str]:
    """What else a hand-in must have, and what it must not."""
    problems = [
        f"{needed}: missing"
        for needed in ("models/vgg.py", "utils/training.py", "requirements.txt")
        if needed not in entries
    ]
    report = REPORT.format(student=student or "<student>")
    if not files.get(report, b"").startswith(b"%PDF-"):
        problems.append(f"{report}: {'not a PDF' if report in files else 'missing'}")
    foreign = [name for name in entries if name.lower().endswith(FOREIGN)]
    if foreign:
        problems.append(f"weights, data or caches in it: {', '.join(foreign[:3])}")
    return problems


def _claims(results: Results) -> str:
    return ", ".join(
        f"{100 * cut.pruning_ratio:g}%: {cut.evaluations.raw.accuracy:.2f} → "
        f"{tuned.test.accuracy:.2f}"
        for cut, tuned in results.cuts()
    )


def table(hand_ins: list[HandIn]) -> str:
    """A line for each archive, in columns."""
    owners = defaultdict(list)
    for hand_in in hand_ins:
        owners[hand_in.run].append(hand_in)
    rows = [COLUMNS]
    for hand_in in hand_ins:
        others = [h.name for h in owners[hand_in.run] if hand_in.run and h is not hand_in]
        wrong = "; ".join(hand_in.problems) or "nothing"
        rows.append((hand_in.name, hand_in.run, hand_in.claims, ", ".join(others), wrong))
    rows = [[_printable(value) or "–" for value in row] for row in rows]
    return tabulate(rows[1:], rows[0], tablefmt="plain", disable_numparse=True)


def _printable(text: str) -> str:
    """Names come from strangers: no control characters for the terminal, no endless lines."""
    return "".join(c if c.isprintable() else "?" for c in text)[:600]


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # → and –, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="an archive, or a folder of them")
    hand_ins = check(parser.parse_args().paths)
    if not hand_ins:
        sys.exit("No archive (*.zip) there.")
    print(table(hand_ins))
    sys.exit(int(any(hand_in.problems for hand_in in hand_ins)))


if __name__ == "__main__":
    main()
