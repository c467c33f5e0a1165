"""Handing in: a synthetic run is packed and looked over; damaged and hostile archives are named."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from coursework.check import check, table
from coursework.hand_in import ROOT, hand_in
from coursework.report import ReportError
from models.vgg import VGG
from utils.store.checkpoint import COLUMNS, Checkpoint, save

pytest.importorskip("fpdf", reason="pip install -r requirements-handin.txt")

ID = "0123456789abcdef"
BEGAN = "2026-11-25 22:00:00"
CFG = [4, 4, "M", 8, 8, "M", 16, 16, "M", 32, 32, "M", 32, 32]
NOTEBOOKS = ("sparsity_train.ipynb", "vggprune.ipynb", "train_prune_model.ipynb")
PIXEL = "iVBORw0KGgo="


def notebook(counts: tuple = (1, 2), run: str = ID, outputs: tuple = (), began: str = BEGAN) -> str:
    cells = [v4.new_code_cell("x = 1", execution_count=n) for n in counts]
    said = f"Run demo · id {run}\nCIFAR-10, 50,000 training images · begun {began}\n"
    cells[0].outputs = [v4.new_output("stream", text=said), *outputs]
    cells[-1].outputs.append(v4.new_output("display_data", data={"image/png": PIXEL}))
    return nbformat.writes(v4.new_notebook(cells=cells))


def measured(correct: int) -> dict:
    return {"loss": 0.2777, "accuracy": correct / 100, "correct": correct, "images": 10_000}


def results() -> dict:
    shared = {"run": ID, "data": "CIFAR-10", "machine": {}, "command": "make lab"}
    profile = {"depth": 13, "width": 0.0625, "epochs": 3, "seed": 1, "pruning_ratios": [0.5, 0.9]}
    curves = {"lr": [0.1, 0.1, 0.01], "train_loss": [2.0, 1.0, 0.5], "test_loss": [2.0, 1.0, 0.6]}
    curves |= {"train_accuracy": [30.0, 60.0, 93.5], "test_accuracy": [28.0, 58.0, 91.25]}
    runs = [
        {"l1_lambda": l1_lambda, **curves, "sparsity": [0.0, sparse / 2, sparse]}
        for l1_lambda, sparse in ((0.0, 0.0), (1e-4, 0.55), (1e-2, 0.97))
    ]
    rungs = {
        "before the cut": 9125,
        "raw cut": 1000,
        "β absorbed": 1010,
        "BN recalibrated": 8800,
        "β absorbed, BN recalibrated": 8811,
    }
    cuts = [
        {
            "pruning_ratio": ratio,
            "realised_ratio": ratio,
            "threshold": 0.0123,
            "min_channels": 1,
            "l1_lambda": 1e-4,
            "cfg": [v if v == "M" else max(1, round(v * (1 - ratio))) for v in CFG],
            **{name: correct / 100 for name, correct in rungs.items()},
            "evaluations": {name: measured(correct) for name, correct in rungs.items()},
        }
        for ratio in (0.5, 0.9)
    ]
    tuned = [
        {"network": "50% pruned", "pruning_ratio": 0.5, **curves, "test": measured(9261)},
        {"network": "90% pruned", "pruning_ratio": 0.9, **curves, "test": measured(8642)},
        {"network": "90% in passes", **curves, "test": measured(8700)},
    ]
    table = [{"network": "dense", "stage": "dense", "test accuracy (%)": 91.5}]
    shared["profile"] = profile
    return {
        "sparsity_train": {**shared, "runs": runs},
        "vggprune": {**shared, "cuts": cuts},
        "train_prune_model": {**shared, "finetuning": tuned, "table": table},
    }


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """The lab's folder with a finished run "demo"."""
    return finished_run(tmp_path)


def finished_run(folder: Path) -> Path:
    root = folder / "lab"
    for package in ("models", "utils"):
        shutil.copytree(ROOT / package, root / package)
    shutil.copy(ROOT / "requirements.txt", root)
    figures, checkpoints = root / "figures" / "demo", root / "checkpoints" / "demo"
    figures.mkdir(parents=True)
    for name in NOTEBOOKS:
        (figures / name).write_text(notebook(), "utf-8")
    (figures / "results.json").write_text(json.dumps(results()), "utf-8")
    curve = [30.0, 60.0, 93.5]
    history = dict.fromkeys(COLUMNS, curve)
    for l1_lambda in (0.0, 1e-4, 1e-2):
        network = VGG(CFG)
        checkpoint = Checkpoint("trained", CFG, network.state_dict(), history=history)
        save(checkpoints / f"trained_lambda_{l1_lambda:g}.pt", checkpoint)
    data = {"name": "CIFAR-10", "train": 50_000, "test": 10_000, "classes": list("abcdefghij")}
    run = {"id": ID, "name": "demo", "began": BEGAN, "data": data}
    (checkpoints / "run.json").write_text(json.dumps(run))
    return root


OWN_TEXT = "## 5 Problems\nThe sign was forgotten. <!-- not shown -->\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a finished run; its lab around it."""
    root = finished_run(tmp_path_factory.mktemp("good"))
    (root / "figures" / "demo" / "report.md").write_text(OWN_TEXT, "utf-8")
    return hand_in("RE6121011", "demo", root=root)


def text_of(archive: Path) -> str:
    """What the report in an archive says, in one line."""
    pdfium = pytest.importorskip("pypdfium2")
    report = zipfile.ZipFile(archive).read("EAI_Lab4_RE6121011_Report.pdf")
    pages = list(pdfium.PdfDocument(report))
    return " ".join(" ".join(page.get_textpage().get_text_range() for page in pages).split())


def rezipped(source: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """A copy of an archive in which files are replaced, added, or (None) left out."""
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)
    return target


# --- make handin ---------------------------------------------------------------------------------


def test_archive_holds_what_the_course_asks_for_and_is_accepted(good):
    names = set(zipfile.ZipFile(good).namelist())
    assert {
        *NOTEBOOKS,
        "EAI_Lab4_RE6121011_Report.pdf",
        "models/vgg.py",
        "utils/images/data.py",
    } < names
    assert not [name for name in names if name.endswith((".pt", ".pyc")) or "data/" in name]
    [row] = check([good])
    assert row.problems == []
    began = "2026-11-25 22:00:00"
    assert row.run == f"{ID} begun {began}"
    assert row.claims == "50%: 10.00 → 92.61, 90%: 10.00 → 86.42"


def test_report_says_the_numbers_the_widths_and_the_own_words(good):
    text = text_of(good)
    assert "Test set: Average loss: 0.2777, Accuracy: 9261/10000 (92.6%)" in text
    assert "Test set: Average loss: 0.2777, Accuracy: 8642/10000 (86.4%)" in text
    assert text.count("Guessing among 10 classes gives about 10 %") == 2
    assert "Conv2d(3, 2, kernel_size=(3, 3)" in text
    assert "The sign was forgotten." in text and "not shown" not in text
    assert text.count("Not written yet.") == 4


def test_what_the_course_asks_for_and_the_run_lacks_is_said(lab, capsys):
    numbers = results()
    numbers["sparsity_train"] |= {"data": "digits", "runs": numbers["sparsity_train"]["runs"][::2]}
    (lab / "figures" / "demo" / "results.json").write_text(json.dumps(numbers), "utf-8")
    [row] = check([hand_in("RE6121011", "demo", root=lab)])
    lacking = ("CIFAR-10 (its images: digits)", "λ = 0.0001")
    assert f"run demo does not have: {', '.join(lacking)}\n" in capsys.readouterr().out
    assert row.problems == [f"not in its run: {what}" for what in lacking]


def test_of_two_copies_of_a_notebook_the_one_that_was_run_last_is_packed(lab):
    name = NOTEBOOKS[0]
    by_hand, by_make = lab / name, lab / "figures" / "demo" / name
    by_hand.write_text(notebook((1, 2, 3)), "utf-8")
    for older, newer in ((by_hand, by_make), (by_make, by_hand)):
        os.utime(older, (1e9, 1e9))
        os.utime(newer, (2e9, 2e9))
        packed = zipfile.ZipFile(hand_in("RE6121011", "demo", root=lab))
        assert packed.read(name) == newer.read_bytes()


def test_a_notebook_that_came_with_the_lab_is_never_taken_for_the_own_run(lab, good, tmp_path):
    """As in a fresh clone: of a run of the same name and settings, hence the same id."""
    shipped = notebook((1, 2, 3), began="2024-01-01 00:00:00")
    (lab / NOTEBOOKS[0]).write_text(shipped, "utf-8")
    packed = zipfile.ZipFile(hand_in("RE6121011", "demo", root=lab))
    assert packed.read(NOTEBOOKS[0]) == (lab / "figures" / "demo" / NOTEBOOKS[0]).read_bytes()
    [row] = check([rezipped(good, tmp_path / good.name, {NOTEBOOKS[0]: shipped.encode()})])
    assert row.problems == [
        f"{NOTEBOOKS[0]}: of a run begun 2024-01-01 00:00:00, that of run.json began {BEGAN}"
    ]


def test_same_input_same_bytes(good):
    before = good.read_bytes()
    os.utime(good.parent / "utils" / "images" / "data.py", (0, 0))
    assert hand_in("RE6121011", "demo", root=good.parent) == good
    assert good.read_bytes() == before
    assert (good.parent / "figures" / "demo" / "report.md").read_text("utf-8") == OWN_TEXT


def test_template_and_report_in_chinese(lab):
    pytest.importorskip("pylopdf_fonts_zh_tw")
    archive = hand_in("RE6121011", "demo", language="zh", root=lab)
    template = (lab / "figures" / "demo" / "report.md").read_text("utf-8")
    headings = [line for line in template.splitlines() if line.startswith("## ")]
    assert [heading[3] for heading in headings] == list("12345")
    text = text_of(archive)
    for heading in headings:
        assert heading[5:] in text.replace("\u200b", "").replace("\xa0", " ")
    assert text.count("尚未撰寫。") == 5


def test_the_students_text_is_read_as_editors_write_it(lab):
    file = lab / "figures" / "demo" / "report.md"
    file.write_text("## 1 Curves\n\tIndented by a tab.\n## 5 Problems", "utf-8")
    assert "Indented by a tab." in text_of(hand_in("RE6121011", "demo", root=lab))
    file.write_bytes("## 5 問題\n".encode("cp950"))
    with pytest.raises(ReportError, match=r"report\.md is not UTF-8"):
        hand_in("RE6121011", "demo", root=lab)


def test_a_notebook_that_was_not_saved_after_the_run_is_told_apart_from_none(lab):
    (lab / "figures" / "demo" / NOTEBOOKS[0]).unlink()
    (lab / NOTEBOOKS[0]).write_text(notebook().replace(BEGAN, "2020-01-01 00:00:00"), "utf-8")
    with pytest.raises(SystemExit, match=r"sparsity_train\.ipynb: the one in .* was it saved"):
        hand_in("RE6121011", "demo", root=lab)


def test_a_character_without_a_font_is_named(lab):
    (lab / "figures" / "demo" / "report.md").write_text("## 1\n\U0001f9a9\n", "utf-8")
    with pytest.raises(ReportError, match="no font here has \U0001f9a9: "):
        hand_in("RE6121011", "demo", root=lab)


def test_all_that_is_missing_is_listed_at_once(lab):
    figures, other = lab / "figures" / "demo", "fedcba9876543210"
    (figures / NOTEBOOKS[0]).unlink()
    error = v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    (figures / NOTEBOOKS[1]).write_text(notebook((2, 3), outputs=[error]), "utf-8")
    (figures / NOTEBOOKS[2]).write_text(notebook(run=other), "utf-8")
    changed = results()
    changed["vggprune"]["cuts"][1]["evaluations"].pop("raw cut")
    del changed["train_prune_model"]["finetuning"][0]["test"]
    (figures / "results.json").write_text(json.dumps(changed), "utf-8")
    with pytest.raises(SystemExit) as stopped:
        hand_in("RE6121011", "demo", root=lab)
    for expected in (
        "sparsity_train.ipynb: missing",
        "vggprune.ipynb: not executed top to bottom",
        "vggprune.ipynb: an error in its outputs",
        f"train_prune_model.ipynb of {other}",
        "vggprune.cuts.1.evaluations.raw cut",
        "train_prune_model.finetuning.0.test",
    ):
        assert expected in str(stopped.value)
    assert not list(lab.glob("*.zip"))


def test_a_run_that_only_cuts_names_the_one_to_hand_in(lab):
    file = lab / "checkpoints" / "demo" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trained_in": "laptop"}))
    with pytest.raises(SystemExit, match=r"demo only cuts what laptop trained.*RUN=laptop"):
        hand_in("RE6121011", "demo", root=lab)


def test_checkpoints_of_another_training_are_named(lab):
    changed = results()
    changed["sparsity_train"]["runs"][2]["train_accuracy"][0] = 31.0
    (lab / "figures" / "demo" / "results.json").write_text(json.dumps(changed), "utf-8")
    (lab / "checkpoints" / "demo" / "trained_lambda_0.pt").unlink()
    with pytest.raises(SystemExit) as stopped:
        hand_in("RE6121011", "demo", root=lab)
    assert "trained_lambda_0.01.pt: of another training" in str(stopped.value)
    assert "trained_lambda_0.pt: No such file" in str(stopped.value)


@pytest.mark.parametrize("student", ["", "../RE6121011", "RE 6121011", "學生"])
def test_student_id_must_make_a_file_name(lab, student):
    with pytest.raises(SystemExit, match="letters, digits"):
        hand_in(student, "demo", root=lab)


def test_unpacked_archive_runs(good, tmp_path):
    """The first notebook's cells up to its imports, and every module, in the archive's folder."""
    cells = nbformat.read(ROOT / NOTEBOOKS[0], as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    setup = code[: 1 + max(n for n, source in enumerate(code) if "\nfrom utils" in source)]
    setup[0] = setup[0].replace("%cd {labs[0]}", "")  # the folder that it runs in
    with zipfile.ZipFile(good) as archive:
        archive.extractall(tmp_path / "unpacked")
        modules = [name[:-3].replace("/", ".") for name in archive.namelist() if "/" in name]
    imports = [f"import {module}; print({module}.__file__)" for module in modules]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join([*setup, *imports])],
        cwd=tmp_path / "unpacked",
        env={**os.environ, "LAB_PROFILE": "smoke", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    files = [line for line in ran.stdout.splitlines() if line.endswith(".py")]
    assert all(Path(file).is_relative_to(tmp_path / "unpacked") for file in files[-len(modules) :])


# --- make check ----------------------------------------------------------------------------------


def test_archives_of_one_run_are_pointed_out(good, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    shutil.copy(good, folder)
    report = zipfile.ZipFile(good).read("EAI_Lab4_RE6121011_Report.pdf")
    copied = {"EAI_Lab4_RE6121011_Report.pdf": None, "EAI_Lab4_B_Report.pdf": report}
    rezipped(good, folder / "EAI_Lab4_B.zip", copied)
    other = json.dumps(results()).replace(ID, "f" * 16).encode()
    rezipped(good, folder / "EAI_Lab4_C.zip", {"results.json": other})
    by_name = {row.name: row for row in check([folder])}
    assert by_name["EAI_Lab4_RE6121011.zip"].problems == by_name["EAI_Lab4_B.zip"].problems == []
    assert "of several runs" in by_name["EAI_Lab4_C.zip"].problems[-1]
    line = next(row for row in table(check([folder])).splitlines() if row.startswith("EAI_Lab4_B"))
    assert "EAI_Lab4_RE6121011.zip" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vggprune.ipynb": None}, "vggprune.ipynb: missing"),
        ({"vggprune.ipynb": b"[" * 100_000}, "vggprune.ipynb: not a readable notebook"),
        ({"vggprune.ipynb": b'{"cells": 3}'}, "vggprune.ipynb: not a readable notebook"),
        ({"vggprune.ipynb": b" " * 50_000_000}, "larger than 10 MB unpacked: vggprune.ipynb"),
        ({"results.json": b"{}"}, "results.json: vggprune"),
        ({"results.json": b"\xff"}, "results.json: "),
        ({"EAI_Lab4_RE6121011_Report.pdf": b"text"}, "not a PDF"),
        ({"models/vgg.py": None}, "models/vgg.py: missing"),
        ({"checkpoints/trained.pth": b""}, "weights, data or caches"),
        ({"../evil.py": b""}, "unpacks outside its folder"),
        ({"a\\..\\..\\evil.py": b""}, "unpacks outside its folder"),
        ({"VGGPRUNE.ipynb": b""}, "twice in it"),
    ],
)
def test_what_is_wrong_with_an_archive_is_named(good, tmp_path, changes, expected):
    [row] = check([rezipped(good, tmp_path / good.name, changes)])
    assert expected in "; ".join(row.problems)


def test_links_encryption_and_rubbish_are_named(good, tmp_path):
    link = zipfile.ZipInfo("models/link.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(shutil.copy(good, tmp_path / "EAI_Lab4_L.zip"), "a") as archive:
        archive.writestr(link, "/etc/passwd")
    encrypted = bytearray(good.read_bytes())
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1  # the flag of the first entry in the directory
    (tmp_path / "EAI_Lab4_E.zip").write_bytes(encrypted)
    (tmp_path / "EAI_Lab4_R.zip").write_bytes(b"PK\3\4 rubbish")
    (tmp_path / "EAI_Lab4_T.zip").write_bytes(good.read_bytes()[:-3000])
    rows = {row.name: "; ".join(row.problems) for row in check([tmp_path / "none.zip", tmp_path])}
    assert "a link: models/link.py" in rows["EAI_Lab4_L.zip"]
    assert "encrypted" in rows["EAI_Lab4_E.zip"]
    for name in ("none.zip", "EAI_Lab4_R.zip", "EAI_Lab4_T.zip"):
        assert "not a readable archive" in rows[name]


def test_names_do_not_reach_the_terminal_as_commands(good, tmp_path):
    [row] = check([rezipped(good, tmp_path / good.name, {"../\x1b[2J": b""})])
    assert "\x1b" not in table([row]) and "unpacks outside" in table([row])


def test_exit_code_tells_whether_all_are_acceptable(good, tmp_path):
    def code(*paths: Path) -> int:
        command = [sys.executable, "-m", "coursework.check", *map(str, paths)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode

    assert code(good) == 0
    (tmp_path / "EAI_Lab4_R.zip").write_bytes(b"rubbish")
    assert code(good, tmp_path / "EAI_Lab4_R.zip") == 1
