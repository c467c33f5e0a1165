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

from coursework import handed_in
from coursework.handed_in import ARCHIVE, NOTEBOOKS, REPORT, STUDENT, Results
from coursework.own_text import LANGUAGES, own_text
from coursework.report import ROOT, ReportError, write_report
from utils.profile import get_profile
from utils.run.identity import Run, RunError, open_run
from utils.sparsity import bn_layers
from utils.store.checkpoint import CheckpointError, load
from utils.store.files import write_whole

# What the notebooks need to run; those of the student edition need coursework, too.
CODE = ("models/*.py", "utils/**/*.py", "coursework/*.py", "coursework/*.ini", "requirements.txt")


def hand_in(student: str, name: str | None = None, *, language: str = "en") -> Path:
    """Write the report of run `name`, or of the last one opened, and EAI_Lab4_<student>.zip; its
    path comes back. The student's own text is in report.md, which is never overwritten. Raises
    SystemExit with all that is missing."""
    if not re.fullmatch(STUDENT, student):
        sys.exit(f"STUDENT = {student!r}: letters, digits, - and _, at most 40")
    run = open_run(name, remember=False)
    if whole := run.trained_in:
        sys.exit(f"Not handed in: {run.name} only cuts what {whole} trained; hand in RUN={whole}")
    sources = {notebook: _newest_copy(run, notebook) for notebook in NOTEBOOKS}
    sources["run.json"] = run.checkpoints / "run.json"
    sources["results.json"] = run.figures / "results.json"
    files = {n: path.read_bytes() for n, path in sources.items() if path.exists()}
    _, results, problems = handed_in.inspect(files)
    gammas, wrong = _gammas(run, results) if results else ({}, [])
    if problems := problems + wrong:
        way_out = "`make lab` makes a whole run; by hand, run the three notebooks and save each"
        sys.exit("\n- ".join([f"Not handed in. {way_out}. Run {run.name} has:", *problems]))
    for notebook in [n for n in NOTEBOOKS if sources[n].name != n]:
        print(f"{notebook}: {sources[notebook]} is handed in, the copy that was saved last")
    if lacks := handed_in.lacks(results):
        print(f"Mind what the course asks for and run {run.name} does not have: {', '.join(lacks)}")
    ratios = results["vggprune"]["profile"].pruning_ratios
    sections, remarks = own_text(run.figures / "report.md", ratios, language)
    print("\n".join(remarks))
    report = run.figures / REPORT.format(student=student)
    write_report(report, student, run, results, gammas, sections, language)
    written = json.loads(files["run.json"])
    written["profile"]["data"] = run.data["name"]  # not the folder where they lie
    files["run.json"] = json.dumps(written, indent=1, ensure_ascii=False).encode("utf-8")
    code = [path for pattern in CODE for path in ROOT.glob(pattern)]
    files |= {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in code}
    return pack(Path(ARCHIVE.format(student=student)), files | {report.name: report.read_bytes()})


def _newest_copy(run: Run, notebook: str) -> Path:
    """Of a notebook's copies ("Copy of …", "… (1)", that of `make lab`) the last with this run."""
    by_make = run.figures / notebook
    copies = [by_make, *Path().glob(f"*{Path(notebook).stem}*.ipynb")]
    copies = sorted((p for p in copies if p.exists()), key=lambda p: p.stat().st_mtime)
    runs = {p: handed_in.inspect_notebook(p.read_bytes())[0] for p in copies}
    return [by_make, *copies, *(p for p in copies if (run.id, run.began) in runs[p])][-1]


def _gammas(run: Run, results: Results) -> tuple[dict[float, np.ndarray], list[str]]:
    """γ of all channels for each λ, and the checkpoints that are missing or of other trainings."""
    gammas, problems = {}, []
    for training in results["sparsity_train"]["runs"]:
        path = run.trained_file(training["l1_lambda"])
        try:
            checkpoint = load(path)
            if checkpoint.history.get("train_accuracy") != training["train_accuracy"]:
                raise CheckpointError(f"{path}: of another training; run {NOTEBOOKS[0]}")
            gamma = torch.cat([bn.weight.detach() for bn in bn_layers(checkpoint.model())])
            gammas[training["l1_lambda"]] = gamma.numpy()
        except CheckpointError as error:
            problems.append(str(error))
    return gammas, problems


def pack(archive: Path, files: Mapping[str, bytes]) -> Path:
    """Write `archive` whole, a file under each name; the same files give the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as target:
        for name in sorted(files):  # dated 1980, whenever the file was written
            target.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED)
    write_whole(archive, content.getvalue())
    print(f"{archive}: {len(files)} files, {len(content.getvalue()) / 1e6:.2f} MB")
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
        name = options.run or (get_profile().name if named else None)
        hand_in(options.student, name, language=options.language)
    except (ReportError, RunError, ValueError, OSError) as error:
        sys.exit(f"Not handed in: {error}")


if __name__ == "__main__":
    main()
