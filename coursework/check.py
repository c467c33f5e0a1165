"""Look over archives that were handed in, without executing anything in them: `make check ZIP=…`.
A line for each: its student, its run, the accuracies, who else has that run, what is wrong."""

import argparse
import re
import stat
import sys
import zipfile
from collections import Counter, namedtuple
from collections.abc import Collection
from pathlib import Path

from tabulate import tabulate

from coursework.handed_in import ARCHIVE, NEEDED, REPORT, STUDENT, cuts, inspect, lacks
from utils.repair import RUNGS

LARGEST = 30_000_000  # bytes; notebooks with their plots have a few million
ARCHIVES = (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz")
UNWANTED = (".pt", ".pth", ".safetensors", ".onnx", ".npz", ".npy", ".pkl", ".bin", ".pyc")
BY_SYSTEMS = re.compile(r"(^|/)(__MACOSX/|\._|\.DS_Store$|Thumbs\.db$|desktop\.ini$)", re.I)
COLUMNS = ("archive", "student", "run", "raw cut → fine-tuned (%)", "same run", "what is wrong")
HandIn = namedtuple("HandIn", "name problems student run claims", defaults=("", "", ""))


def check(paths: list[Path]) -> list[HandIn]:
    """Look into each archive of `paths`, of a folder into each file in it."""
    found = {}
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file())  # none in a file
        found |= {p: p.relative_to(path).as_posix() for p in files} or {path: path.name}
    return [_look_into(file, n) for file, n in found.items() if not BY_SYSTEMS.search(n)]


def _look_into(path: Path, name: str) -> HandIn:
    try:
        if path.suffix.lower() != ".zip":
            raise ValueError(f"not a zip: ask for {ARCHIVE.format(student='<student>')}")
        if path.stat().st_size > LARGEST:
            raise ValueError("larger than 30 MB; if it holds all hand-ins, unpack it")
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive)
            report, student = _report(entries, path.name)
            files = {n: archive.read(entries[n]) for n in (*NEEDED, report) if n in entries}
    except ValueError as error:
        return HandIn(name, [str(error)])
    except Exception as error:  # whatever a hostile archive can raise: the others are still read
        return HandIn(name, [f"not a readable archive ({type(error).__name__})"])
    run, results, problems = inspect(files)
    due = ARCHIVE.format(student=student or "<student>")
    misnamed = [f"its name is not {due}"] * (not _names(ARCHIVE, path.name, student))
    claims, problems = [], [*misnamed, *_missing(entries, report, files), *problems]
    if results:
        problems += [f"not in its run: {what}" for what in lacks(results)]
        for cut, tuned in cuts(results):
            raw, after = cut["evaluations"][RUNGS[0]]["accuracy"], tuned["test"]["accuracy"]
            claims.append(f"{100 * cut['pruning_ratio']:g}%: {raw:.2f} → {after:.2f}")
    begun = f"{run['id']} begun {run['began']}" if run else ""
    return HandIn(name, problems, student, begun, ", ".join(claims))


def _names(pattern: str, name: str, student: str = STUDENT) -> re.Match | None:
    """Whose `name` is, if it is `pattern` or what Canvas, Moodle or a browser has made of it, as in
    wang_1_2_EAI_Lab4_RE6121011-1.zip: something before it, something before its ending."""
    stem, dot, ending = re.escape(pattern).rpartition(r"\.")
    stem = stem.replace(r"\{student\}", f"({student})")
    return re.search(rf"{stem}(?![a-z0-9])[^/]*{dot}{ending}$", name, re.IGNORECASE)


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive, by their path from the folder that has most of what is NEEDED.
    Raises ValueError for what could do harm when unpacked, and for an archive of archives."""
    entries = {}
    for entry in archive.infolist():
        landing = _landing(entry.orig_filename)
        if stat.S_ISLNK(entry.external_attr >> 16) or entry.flag_bits & 1:
            raise ValueError(f"encrypted, or a link: {entry.orig_filename}")
        if entry.orig_filename[-1] not in "/\\" and not BY_SYSTEMS.search(landing):
            entries[landing] = entry
    tops = Counter(n[: n.rfind("/") + 1] for n in entries if n.rpartition("/")[2] in NEEDED)
    inner = [name for name in entries if name.lower().endswith(ARCHIVES)]
    if inner and not tops:
        raise ValueError(f"an archive of {len(inner)} archives: unpack it, and check its folder")
    if (unpacked := sum(entry.file_size for entry in archive.infolist())) > LARGEST:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size).orig_filename
        raise ValueError(f"unpacks to {unpacked / 1e6:,.0f} MB; its largest file is {largest}")
    root = max(sorted(tops, key=len), key=tops.get, default="")
    return {n[len(root) :] if n.startswith(root) else f"../{n}": e for n, e in entries.items()}


def _landing(name: str) -> str:
    """Where an entry would land when it is unpacked. Raises ValueError for a way out. A backslash
    is a separator, as on Windows; where it is half of a character, it only adds a folder."""
    parts = name.replace("\\", "/").split("/")
    climbs = any(".." in part and not part.strip(". ") for part in parts)  # Windows drops ". "
    if climbs or not parts[0] or re.match("[a-z]:", name, re.IGNORECASE):
        raise ValueError(f"unpacks outside its folder: {name}")
    return "/".join(part for part in parts if part not in ("", "."))


def _report(entries: Collection[str], archive: str) -> tuple[str, str]:
    """The report's name and student; of several the archive's; without one, what it should be."""
    found = {n: m[1] for n in sorted(entries) if "/" not in n and (m := _names(REPORT, n))}
    student = m[1] if (m := _names(ARCHIVE, archive)) else ""
    found = found or {REPORT.format(student=student or "<student>"): student}
    return max(found.items(), key=lambda item: bool(_names(ARCHIVE, archive, item[1])))


def _missing(entries: Collection[str], report: str, files: dict[str, bytes]) -> list[str]:
    """What else a hand-in must have, and what it must not."""
    needed = ("models/vgg.py", "utils/training.py", "requirements.txt", report)
    problems = [f"{name}: missing" for name in needed if name not in entries]
    if not files.get(report, b"%PDF-").startswith(b"%PDF-"):
        problems.append(f"{report}: not a PDF")
    if unwanted := [name for name in entries if name.lower().endswith((*UNWANTED, *ARCHIVES))]:
        problems.append(f"weights, data, caches or archives in it: {', '.join(unwanted[:3])}")
    return problems


def table(hand_ins: list[HandIn]) -> str:
    """A line for each file, in columns."""
    rows = []
    for found in hand_ins:
        others = [h.name for h in hand_ins if h is not found and found.run == h.run != ""]
        what = "; ".join(found.problems) or "nothing"
        row = (found.name, found.student, found.run, found.claims, ", ".join(others), what)
        # Names come from strangers: nothing for the terminal to obey, no endless lines.
        rows.append(["".join(c if c.isprintable() else "?" for c in v)[:600] or "–" for v in row])
    return tabulate(rows, COLUMNS, tablefmt="plain", disable_numparse=True)


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # → and –, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="an archive, or a folder of them")
    hand_ins = check(parser.parse_args().paths)
    print(table(hand_ins))
    sys.exit(int(any(hand_in.problems for hand_in in hand_ins)))


if __name__ == "__main__":
    main()
