"""Handing in: one hand-made record in which every number differs, and each where it is to be read;
damaged, renamed and hostile archives are named."""

import functools
import json
import operator
import os
import re
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat import v4

from coursework import hand_in as handing
from coursework import own_text as own
from coursework.check import check, main, table
from coursework.hand_in import hand_in
from coursework.report import ROOT, Pages, ReportError
from models.vgg import VGG
from utils.images.data import ImageData
from utils.profile import Profile
from utils.run.identity import begin, open_run
from utils.store.checkpoint import COLUMNS, Checkpoint, save

pytest.importorskip("fpdf", reason="pip install -r requirements-handin.txt")

CFG = [4, 4, "M", 8, 8, "M", 16, 16, "M", 32, 32, "M", 32, 32]
NOTEBOOKS = ("sparsity_train.ipynb", "vggprune.ipynb", "train_prune_model.ipynb")
REPORT = "EAI_Lab4_RE6121011_Report.pdf"
IMAGES = "/home/wang/photos"
LAMBDAS = (0.0, 1e-4, 1e-2)
RUNGS = ("raw cut", "β absorbed", "BN recalibrated", "β absorbed, BN recalibrated")


def notebook(run, counts: tuple = (1, 2), outputs: tuple = (), began: str | None = None) -> str:
    cells = [v4.new_code_cell("x = 1", execution_count=n) for n in counts]
    said = f"Run demo · id {run.id}\nCIFAR-10, 6 training images · begun {began or run.began}\n"
    cells[0].outputs = [v4.new_output("stream", text=said), *outputs]
    cells[-1].outputs.append(v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="}))
    return nbformat.writes(v4.new_notebook(cells=cells))


def measured(correct: int, loss: float) -> dict:
    return {"loss": loss, "accuracy": correct / 100, "correct": correct, "images": 10_000 + correct}


def curves(n: int, epochs: int) -> dict:
    """A history in which no number is another's, nor that of another `n`; the last is no best."""
    wave = [(k * 7) % epochs for k in range(1, epochs + 1)]
    return {
        "lr": [0.1 / (n + k) for k in wave],
        "train_loss": [2 - 0.01 * n - 0.1 * k for k in wave],
        "train_accuracy": [90.01 + n + 0.1 * k for k in wave],
        "test_loss": [2.5 - 0.01 * n - 0.1 * k for k in wave],
        "test_accuracy": [60.04 + n + 0.1 * k for k in wave],
        "sparsity": [0.1 * n + 0.013 * (k + 1) for k in wave],
    }


def results(run) -> dict:
    profile = {"depth": 13, "width": 0.0625, "lr": 0.1, "min_channels": 1}

    def section(number: int, data: str, ratios: list[float], **found) -> dict:
        settings = profile | {"epochs": 2 + number, "seed": 10 + number, "pruning_ratios": ratios}
        return {"run": run.id, "data": data, "profile": settings, "new": {}, **found}

    trained = [{"l1_lambda": value, **curves(n, 3)} for n, value in enumerate(LAMBDAS, start=1)]
    cuts = [
        {
            "pruning_ratio": ratio,
            "realised_ratio": ratio + 0.0123 * n,
            "threshold": 0.111 * n,
            "l1_lambda": LAMBDAS[n],
            "cfg": [v if v == "M" else max(1, round(v * (1 - ratio)) + n - 1) for v in CFG],
            "evaluations": {
                name: measured(1000 * n + 2000 * (k == 4) + 111 * k, 0.1 * n + 0.0123 * k)
                for k, name in enumerate(("before the cut", *RUNGS))
            },
        }
        for n, ratio in ((1, 0.5), (2, 0.9))
    ]
    tuned = [
        {"network": name, "pruning_ratio": ratio, **curves(n, epochs), "test": measured(*test)}
        for name, ratio, n, epochs, test in (
            ("90% in passes", None, 6, 4, (8700, 0.77)),
            ("90% pruned", 0.9, 5, 5, (8642, 0.2)),
            ("50% pruned", 0.5, 4, 7, (9261, 0.3)),
        )
    ]
    return {
        "sparsity_train": section(1, "CIFAR-10", [0.4], runs=trained),
        "vggprune": section(2, "CIFAR-10 cut", [0.5, 0.9], cuts=cuts[::-1]),
        "train_prune_model": section(3, "CIFAR-10 tuned", [0.9], finetuning=tuned),
    }


def write_run(root: Path) -> None:
    """A finished run "demo" in `root`, the current folder: three λ, their γ known."""
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(6)
    data = ImageData("CIFAR-10", tuple("abcdefghij"), images, labels, images[:4], labels[:4])
    run = begin(Profile(name="demo", precision="float32", data=IMAGES), data, "cpu", remember=False)
    found = results(run)
    for n, trained in enumerate(found["sparsity_train"]["runs"], start=1):
        network = VGG(CFG)
        gammas = [m.weight.data for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for gamma in gammas:
            gamma.fill_(-0.011 * n)
        gammas[0][0] = -0.7 - 0.03 * n
        history = {name: trained[name] for name in COLUMNS}
        state = network.state_dict()
        save(run.trained_file(trained["l1_lambda"]), Checkpoint("trained", CFG, state, {}, history))
    run.figures.mkdir(parents=True)
    for name in NOTEBOOKS:
        (run.figures / name).write_text(notebook(run), "utf-8")
    (run.figures / "results.json").write_text(json.dumps(found), "utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_run(root)
    return root


@pytest.fixture
def lab(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lab's folder, the current one, with the finished run; reports in it are not drawn."""
    root = shutil.copytree(template, tmp_path / "lab")
    monkeypatch.chdir(root)
    monkeypatch.setattr(handing, "write_report", lambda path, *_: path.write_bytes(b"%PDF-"))
    return root


OWN = """# Report

## 1 Accuracy and sparsity against the epoch

The curves fall. 😀 {nb}

## Details

許功蓋 are kept. <!-- not shown -->

## 4 90 % pruned

```python
## 5 Problems met, and how they were solved
x = "<!-- code -->"
```

## 3 70 % pruned
Of an earlier cut.

## 5 Problems met, and how they were solved
"""


@pytest.fixture(scope="module")
def good(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """The archive of the finished run, with the one report that is made; its figures, of which the
    two of the first cut are drawn."""
    root = shutil.copytree(template, tmp_path_factory.mktemp("good") / "lab")
    (root / "figures" / "demo" / "report.md").write_text(OWN, "utf-8")
    drawn, really = [], Pages.draw

    def draw(page: Pages, *figures) -> None:
        drawn.extend(figures)
        if len(drawn) == 4:
            really(page, *figures)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(Pages, "draw", draw)
        return root / hand_in("RE6121011", "demo"), drawn


@pytest.fixture(scope="module")
def said(good) -> dict[str, str]:
    """What the report says under each of its headings, in one line each."""
    pdfium = pytest.importorskip("pypdfium2")
    pages = list(pdfium.PdfDocument(zipfile.ZipFile(good[0]).read(REPORT)))
    text = "\n".join(page.get_textpage().get_text_range() for page in pages)
    text = text.replace("\u200b", "").replace("\xa0", " ").replace("\r", "")
    titles = {"1": "curves", "2": "γ", "3": "50 %", "4": "90 %", "5": "problems", "6": "70 %"}
    sections = {"top": ""}
    for line in text.split("\n"):
        if heading := re.match(r"(\d)  ?(Acc|The dis|50|90|Problems|70)", line):
            sections[titles[heading[1]]] = ""
        else:
            sections[list(sections)[-1]] += f" {line}"
    assert list(sections) == ["top", *titles.values()]
    return {name: " ".join(text.split()) for name, text in sections.items()}


# --- the report: each number at its place --------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "sentences"),
    [
        ("top", [
            "Network Slimming on CIFAR-10 Student RE6121011 · run demo · id",
            "VGG-13 of width 0.0625, 6 training and 4 test images, 3 epochs for each λ, seed 11.",
        ]),
        ("curves", [
            "λ = 0: training accuracy 91.01 %, test accuracy 61.04 % after 3 epochs; "
            "|γ| is below 0.01 in 11.3 % of the channels.",
            "λ = 0.0001: training accuracy 92.01 %, test accuracy 62.04 % after 3 epochs; "
            "|γ| is below 0.01 in 21.3 % of the channels.",
            "λ = 0.01: training accuracy 93.01 %, test accuracy 63.04 % after 3 epochs; "
            "|γ| is below 0.01 in 31.3 % of the channels.",
            "The curves fall. 😀 {nb} ## Details 許功蓋 are kept.",
        ]),
        ("γ", [
            "λ = 0: median of |γ| 0.011, largest 0.73.",
            "λ = 0.0001: median of |γ| 0.022, largest 0.76.",
            "λ = 0.01: median of |γ| 0.033, largest 0.79. Not written yet.",
        ]),
        ("50 %", [
            "From the network trained with λ = 0.0001, 51.23 % of the channels were cut (threshold "
            "on |γ|: 0.111); 92 of 184 stay. cfg = [2, 2, 'M', 4, 4, 'M', 8, 8, 'M', 16, 16, 'M', ",
            "Before the cut Test set: Average loss: 0.1000, Accuracy: 1000/11000 (10.0%) Guessing "
            "among 10 classes gives about 10 %",
            "After the raw cut Test set: Average loss: 0.1123, Accuracy: 1111/11111 (11.1%)",
            "anew) Test set: Average loss: 0.1492, Accuracy: 3444/13444 (34.4%) After 7 epochs of "
            "fine-tuning Test set: Average loss: 0.3000, Accuracy: 9261/19261 (92.6%) The slim",
            "Conv2d(3, 2, kernel_size=(3, 3)",
            "Not written yet.",
        ]),
        ("90 %", [
            "From the network trained with λ = 0.01, 92.46 % of the channels were cut (threshold "
            "on |γ|: 0.222); 28 of 184 stay.",
            "Before the cut Test set: Average loss: 0.2000, Accuracy: 2000/12000 (20.0%) After the "
            "raw cut Test set: Average loss: 0.2123, Accuracy: 2111/12111 (21.1%)",
            "anew) Test set: Average loss: 0.2492, Accuracy: 4444/14444 (44.4%) After 5 epochs of "
            "fine-tuning Test set: Average loss: 0.2000, Accuracy: 8642/18642 (86.4%) The slim",
            "```python ## 5 Problems met, and how they were solved x = \"<!-- code -->\" ```",
        ]),
        ("problems", ["Not written yet."]),
        ("70 %", ["Of an earlier cut."]),
    ],
)  # fmt: skip
def test_the_report_says_each_number_at_its_place(said, section, sentences):
    for sentence in sentences:
        assert sentence in said[section]
    assert ("Not written yet." in said[section]) == ("Not written" in sentences[-1])
    assert "not shown" not in said[section]
    guessed = {"50 %": 2}  # 10.0 and 11.1 % of ten classes; 20.0 % is more than a tenth of the way
    assert said[section].count("Guessing") == guessed.get(section, 0)


def test_the_report_draws_each_network_at_its_place(good):
    """Two pictures of the trainings, then for each ratio the widths and the fine-tuning."""
    figures = good[1]
    titles = [figure.get_suptitle() for figure in figures]
    assert ["training" in t for t in titles] == [True, True, False, False, False, False]
    for panel, n in zip(figures[0].axes, (1, 2, 3), strict=False):
        lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
        assert lines["training accuracy"] == curves(n, 3)["train_accuracy"]
        assert lines["test accuracy"] == curves(n, 3)["test_accuracy"]
    for figure, n, epochs, after in ((figures[3], 4, 7, 34.44), (figures[5], 5, 5, 44.44)):
        lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
        assert lines["training"] == curves(n, epochs)["train_accuracy"]
        assert lines["test (epoch 0: before)"] == [after, *curves(n, epochs)["test_accuracy"]]
        assert set(lines["dense network, test"]) == {curves(1, 3)["test_accuracy"][-1]}
    for figure, kept in ((figures[2], 92), (figures[4], 28)):
        assert f"{kept} of 184 channels stay" in figure.axes[0].get_title()


def test_a_guess_is_told_from_a_result_whatever_the_number_of_classes(monkeypatch):
    """A tenth of the way from chance to 100 %: 19 % among ten classes, 55 % among two."""
    written = []
    monkeypatch.setattr(Pages, "write", lambda page, text: written.append(text))
    words = {"accuracy": "{accuracy}", "chance": "{classes} {chance:.0f}"}
    page = Pages(words, 10)
    for page.classes, below, above in ((10, 18.9, 19.1), (2, 54.9, 55.1), (2, 12.0, 74.0)):
        for accuracy in (below, above):
            page.say("accuracy", accuracy, accuracy=accuracy)
        assert written[-2:] == [f"{below}\n{page.classes} {100 // page.classes}", f"{above}"]


def test_each_character_is_set_or_refused_by_name(tmp_path):
    page = Pages({}, 10)
    page.write("Réseau e\u0301lagué 😀 許", style="B")
    page.save(tmp_path / "good.pdf")
    page = Pages({}, 10)
    for text in ("Sound.", "a flamingo \U0001f9a9", "\u05e9", "\u0645", "bell \x07", "\u0928"):
        page.write(text)
    with pytest.raises(ReportError) as refused:
        page.save(tmp_path / "bad.pdf")
    for named in ("U+1F9A9 FLAMINGO) in 'a flamingo", "U+05E9 HEBREW LETTER SHIN", "U+0007",
                  "U+0645 ARABIC LETTER MEEM", "U+0928 DEVANAGARI LETTER NA"):  # fmt: skip
        assert named in str(refused.value)
    assert not (tmp_path / "bad.pdf").exists()


def test_the_chinese_report_has_its_own_words(template, tmp_path, monkeypatch):
    """All of them, with the student's text, whose headings are English."""
    pdfium = pytest.importorskip("pypdfium2")
    pytest.importorskip("pylopdf_fonts_zh_tw")
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "lab"))
    monkeypatch.setattr(Pages, "draw", lambda page, *figures: None)
    Path("figures/demo/report.md").write_text("## 3 50% pruned:\n半\n## 剪枝90 %\n九\n", "utf-8")
    pages = pdfium.PdfDocument(zipfile.ZipFile(hand_in("B", "demo", language="zh")).read(
        "EAI_Lab4_B_Report.pdf"))  # fmt: skip
    text = "".join("".join(p.get_textpage().get_text_range().split()) for p in pages)
    text = text.replace("\u200b", "")
    parts = ("1準確率與稀疏度隨epoch的變化", "3剪枝50%", "微調7個epoch後", "半", "4剪枝90%",
             "微調5個epoch後", "九", "5遇到的問題與解決方法")  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.count("尚未撰寫。") == 3


# --- the student's own text ----------------------------------------------------------------------


@pytest.fixture
def own_text(tmp_path: Path):
    """own_text("…", [0.5]): sections by title, and what is said, for this report.md."""

    def read(written: str | bytes, ratios: list[float], language: str = "en"):
        file = tmp_path / "report.md"
        file.write_bytes(written if isinstance(written, bytes) else written.encode())
        sections, remarks = own.own_text(file, ratios, language)
        assert file.read_bytes() == (written if isinstance(written, bytes) else written.encode())
        return dict(sections), "\n".join(remarks)

    return read


CURVES = "Accuracy and sparsity against the epoch"
GAMMAS = "The distribution of the scaling factors γ"
PROBLEMS = "Problems met, and how they were solved"


def test_the_template_is_written_once_and_its_hints_are_no_text(tmp_path):
    file = tmp_path / "report.md"
    sections, remarks = own.own_text(file, [0.5, 0.75], "en")
    assert sections == [(t, "") for t in (CURVES, GAMMAS, "50 % pruned", "75 % pruned", PROBLEMS)]
    assert [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")] == [
        "# Report", *(f"## {n} {title}" for n, (title, _) in enumerate(sections, start=1))
    ]  # fmt: skip
    assert len(remarks) == 5 and all("Not written yet" in remark for remark in remarks)


def test_only_the_templates_headings_divide(own_text):
    """Others, code, a heading that comes twice: all is text, in its place."""
    sections, remarks = own_text(
        f"## 1 {CURVES}\nFIRST<!-- a -->\n## Details\n\tTWO\n### 90 % pruned\n## 1. Data\n"
        "## Pruned\nTHREE<!-- b -->\n"
        f"## {PROBLEMS}\nFOUR\n~~~\n# Report\n## {GAMMAS}\n~~~\n## {CURVES.upper()} ##\nFIVE",
        [0.5],
    )
    assert sections == {
        CURVES: "FIRST\n## Details\n    TWO\n### 90 % pruned\n## 1. Data\n## Pruned\nTHREE\n\nFIVE",
        GAMMAS: "",
        "50 % pruned": "",
        PROBLEMS: f"FOUR\n~~~\n# Report\n## {GAMMAS}\n~~~",
    }
    assert "## Details" in remarks and "## 1. Data" in remarks and "## Acc" not in remarks


def test_a_text_stays_with_its_ratio_when_others_come_and_go(own_text):
    written = "## 3 50 % pruned\nHALF\n## 4 90 % pruned\nNINETY\n## 5 62.5% pruned\nGONE\n"
    sections, remarks = own_text(written, [0.5, 0.7, 0.9])
    found = {title: text for title, text in sections.items() if text}
    assert found == {"50 % pruned": "HALF", "90 % pruned": "NINETY", "62.5 % pruned": "GONE"}
    assert list(sections)[-1] == "62.5 % pruned"
    assert "no such section: 62.5 % pruned" in remarks
    assert "Not written yet: 70 % pruned (add ## 70 % pruned)" in remarks
    assert "50 % pruned" not in remarks


def test_text_above_all_headings_and_in_either_language_is_printed(own_text):
    sections, remarks = own_text(
        "\ufeff# Report\nABOVE\n## 1 A\nFIRST\n## 3 剪枝 50 %\n半\n", [0.5]
    )
    assert (sections["Report"], sections["50 % pruned"]) == ("ABOVE\n## 1 A\nFIRST", "半")
    assert "no such section: Report" in remarks and "## 1 A" in remarks
    with pytest.raises(ReportError, match=r"report\.md is not UTF-8"):
        own_text("## 5 問題\n".encode("cp950"), [0.5])


# --- make handin ---------------------------------------------------------------------------------


def test_the_archive_holds_what_the_course_asks_for_and_is_accepted(good):
    names = set(zipfile.ZipFile(good[0]).namelist())
    assert {*NOTEBOOKS, "run.json", "results.json", REPORT, "models/vgg.py"} < names
    assert not [n for n in names if n.endswith((".pt", ".safetensors", ".pyc")) or "data/" in n]
    run = json.loads((good[0].parent / "checkpoints" / "demo" / "run.json").read_text("utf-8"))
    claims = "50%: 11.11 → 92.61, 90%: 21.11 → 86.42"
    begun = f"{run['id']} begun {run['began']}"
    assert check([good[0]]) == [("EAI_Lab4_RE6121011.zip", [], "RE6121011", begun, claims)]


def test_the_same_run_gives_the_same_bytes_and_keeps_the_students_file(lab):
    file = lab / "figures" / "demo" / "report.md"
    file.write_text(OWN, "utf-8")
    archive = hand_in("RE6121011", "demo")
    before = archive.read_bytes()
    for path in lab.rglob("*.ipynb"):
        os.utime(path, (0, 0))
    assert hand_in("RE6121011", "demo") == archive and archive.read_bytes() == before
    assert file.read_text("utf-8") == OWN
    assert not (lab / "checkpoints" / "last_run.txt").exists()  # what notebooks open stays


def test_what_the_run_lacks_and_what_is_not_written_is_said(lab, capsys):
    found = json.loads((lab / "figures/demo/results.json").read_text("utf-8"))
    del found["sparsity_train"]["runs"][1]
    found["vggprune"]["profile"]["pruning_ratios"] = [0.5]
    for data, named in (("CIFAR-100", True), ("digits", True), ("cifar10", False)):
        found["sparsity_train"]["data"] = data
        (lab / "figures/demo/results.json").write_text(json.dumps(found), "utf-8")
        [row] = check([hand_in("RE6121011", "demo")])
        lacking = [f"CIFAR-10 (its images: {data})"] * named
        lacking += ["λ = 0.0001", "pruning ratio = 0.9"]
        out = capsys.readouterr().out
        assert f"run demo does not have: {', '.join(lacking)}\n" in out
        assert "Not written yet: 50 % pruned" in out
        assert row.problems == [f"not in its run: {what}" for what in lacking]


def test_of_the_copies_of_this_run_the_one_saved_last_is_handed_in(lab, capsys):
    """Colab's, Jupyter's and a browser's; neither another run's nor the lab's own, however new."""
    run, name = open_run("demo", remember=False), NOTEBOOKS[0]
    by_make = lab / "figures" / "demo" / name
    for other, began in ((name, "2024-01-01 00:00:00"), (f"{name[:-6]} (2).ipynb", "2020")):
        (lab / other).write_text(notebook(run, began=began), "utf-8")
        os.utime(lab / other, (9e9, 9e9))
    copies = [f"Copy of {name}", f"{name[:-6]}-Copy1.ipynb", f"{name[:-6]} (1).ipynb"]
    for n, copy in enumerate(copies, start=3):
        (lab / copy).write_text(notebook(run, (1, n)), "utf-8")
        os.utime(lab / copy, (1e9 + n, 1e9 + n))
        os.utime(by_make, (1e9, 1e9))
        assert zipfile.ZipFile(hand_in("R", "demo")).read(name) == (lab / copy).read_bytes()
        assert f"{name}: {copy} is handed in" in capsys.readouterr().out
    os.utime(by_make, (2e9, 2e9))
    assert zipfile.ZipFile(hand_in("R", "demo")).read(name) == by_make.read_bytes()
    assert "is handed in" not in capsys.readouterr().out
    for path in (by_make, *(lab / copy for copy in copies)):
        path.unlink()
    with pytest.raises(SystemExit, match=rf"(?s)save each.*{name}: of a run begun 20.*{run.began}"):
        hand_in("R", "demo")


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("train_prune_model.finetuning.1", "no fine-tuning at 90%"),
        ("vggprune.cuts.0", "no cut at 90%"),
        ("sparsity_train", "results.json: sparsity_train: Field required"),
        ("vggprune.cuts.1.evaluations.raw cut", "vggprune.cuts.1.evaluations.raw cut"),
        ("train_prune_model.finetuning.0.test", "train_prune_model.finetuning.0.test: Field"),
    ],
)
def test_results_that_lack_something_are_not_handed_in(lab, missing, named):
    found = json.loads((lab / "figures/demo/results.json").read_text("utf-8"))
    *way, last = [int(key) if key.isdigit() else key for key in missing.split(".")]
    del functools.reduce(operator.getitem, way, found)[last]
    (lab / "figures/demo/results.json").write_text(json.dumps(found), "utf-8")
    with pytest.raises(SystemExit, match=named):
        hand_in("RE6121011", "demo")
    assert not list(lab.glob("*.zip"))


def test_all_that_is_missing_is_listed_at_once(lab):
    run, figures, other = open_run("demo", remember=False), Path("figures/demo"), "f" * 16
    (figures / NOTEBOOKS[0]).unlink()
    error = v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    (figures / NOTEBOOKS[1]).write_text(notebook(run, (2, 3), [error]), "utf-8")
    (figures / NOTEBOOKS[2]).write_text(notebook(run).replace(run.id, other), "utf-8")
    found = json.loads((figures / "results.json").read_text("utf-8"))
    found["sparsity_train"]["runs"][2]["train_accuracy"][0] = 31.0
    found["vggprune"]["run"] = "e" * 16
    (figures / "results.json").write_text(json.dumps(found), "utf-8")
    lost, foreign = run.trained_file(0.0), run.trained_file(1e-2)
    lost.unlink()
    with pytest.raises(SystemExit) as stopped:
        hand_in("RE6121011", "demo")
    for expected in (
        "sparsity_train.ipynb: missing", "vggprune.ipynb: not executed top to bottom",
        "vggprune.ipynb: an error in its outputs", f"train_prune_model.ipynb of {other}",
        f"run.json of {run.id}", f"results.json, vggprune of {'e' * 16}",
        f"{foreign}: of another training", f"{lost}: No such file",
    ):  # fmt: skip
        assert expected in str(stopped.value)
    assert not list(lab.glob("*.zip"))


def test_a_run_that_only_cuts_names_the_one_to_hand_in(lab):
    open_run("demo", save_as="softer")
    with pytest.raises(SystemExit, match=r"softer only cuts what demo trained.*RUN=demo"):
        hand_in("RE6121011", "softer")


def test_the_student_id_must_make_a_file_name(lab):
    for student in ("", "../RE6121011", "學生"):
        with pytest.raises(SystemExit, match="letters, digits"):
            hand_in(student, "demo")


def test_the_archive_runs_by_itself_and_names_no_folder_of_its_student(good):
    """All modules of models/ and utils/; run.json names the images, not where they lie."""
    with zipfile.ZipFile(good[0]) as archive:
        names, run = set(archive.namelist()), archive.read("run.json").decode()
    rooms = [p for room in ("models", "utils", "coursework") for p in (ROOT / room).rglob("*.py")]
    rooms.append(ROOT / "coursework" / "blanks.ini")
    assert {path.relative_to(ROOT).as_posix() for path in rooms} | {"requirements.txt"} <= names
    assert json.loads(run)["profile"]["data"] == "CIFAR-10" and "wang" not in run
    kept = (good[0].parent / "checkpoints" / "demo" / "run.json").read_text("utf-8")
    assert json.loads(kept)["profile"]["data"] == IMAGES  # notebooks still find them


# --- make check ----------------------------------------------------------------------------------


@pytest.fixture
def rezipped(good, tmp_path: Path):
    """rezipped("name.zip", {…}, inside="folder/"): a copy in which files are replaced, added, or
    (None) left out."""

    def make(name: str, changes: dict[str, bytes | None] | None = None, inside: str = "") -> Path:
        with zipfile.ZipFile(good[0]) as archive:
            files = {inside + n: archive.read(n) for n in archive.namelist()} | (changes or {})
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for name_in_it, content in files.items():
                if content is not None:
                    archive.writestr(name_in_it, content)
        return tmp_path / name

    return make


def problems(archive: Path) -> str:
    [row] = check([archive])
    return "; ".join(row.problems)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vggprune.ipynb": None}, "vggprune.ipynb: missing"),
        ({"vggprune.ipynb": b'{"cells": 3}'}, "vggprune.ipynb: not a readable notebook"),
        ({"vggprune.ipynb": b"[" * 100_000}, "vggprune.ipynb: not a readable notebook"),
        ({"movie.mp4": bytes(31_000_000)}, "unpacks to 31 MB; its largest file is movie.mp4"),
        ({"results.json": b'{"vggprune": 3}'}, "results.json: vggprune = 3: Input should be"),
        ({REPORT: b"text"}, "not a PDF"),
        ({REPORT: None}, f"{REPORT}: missing"),
        ({"checkpoints/trained.pth": b""}, "weights, data"),
        ({"../evil.py": b""}, "unpacks outside its folder"),
        ({"C:evil.py": b""}, "unpacks outside its folder"),
        ({"a\\..\\..\\evil.py": b""}, "unpacks outside its folder"),
    ],
)
def test_what_is_wrong_with_an_archive_is_named(rezipped, changes, expected):
    assert expected in problems(rezipped("EAI_Lab4_RE6121011.zip", changes))


def test_an_archive_is_accepted_as_systems_make_it(rezipped, tmp_path):
    """Two folders around, with what systems put beside them; Windows' backslashes; .ZIP."""
    litter = {".DS_Store": b"1", "__MACOSX/a/b/._run.json": b"2", "a/Thumbs.db": b"3"}
    rezipped("EAI_Lab4_RE6121011.zip", litter | {"a/b/c/": b""}, inside="a/b/")
    rezipped("EAI_Lab4_RE6121011-2.ZIP", inside="我的作業\\lab4\\")
    assert [row.problems for row in check([tmp_path])] == [[], []]


@pytest.mark.parametrize(
    ("encoding", "name", "hostile"),
    [
        ("big5", "許功蓋.txt", False),
        ("shift-jis", "表\\notes.txt", False),
        ("big5", "許\\..\\..\\evil.py", True),
        ("utf-8", "..\\evil.py", True),
    ],
)
def test_a_name_is_judged_by_where_it_would_land(rezipped, encoding, name, hostile):
    """Names in another encoding than UTF-8, with 5C as the second byte of a character."""
    raw = name.encode(encoding)
    path = rezipped("EAI_Lab4_RE6121011.zip", {"n" * len(raw): b""})
    path.write_bytes(path.read_bytes().replace(b"n" * len(raw), raw))
    found = problems(path)
    assert found == ("" if not hostile else found) and ("outside" in found) == hostile


@pytest.mark.parametrize(
    ("archive", "report"),
    [
        ("EAI_Lab4_RE6121011 (1).zip", f"wang_1_3_{REPORT}"),
        ("王小明_12345_assignsubmission_file_EAI_Lab4_RE6121011.zip", f"{REPORT[:-4]} (1).pdf"),
        ("wang_1_2_eai_lab4_re6121011-1.zip", f"{REPORT[:-4]}-2.pdf"),
    ],
)
def test_renaming_by_canvas_and_browsers_is_no_fault(good, rezipped, archive, report):
    content = zipfile.ZipFile(good[0]).read(REPORT)
    [row] = check([rezipped(archive, {REPORT: None, report: content})])
    assert (row.student, row.problems) == ("RE6121011", [])


def test_whose_archive_it_is_is_said_by_its_report(good, rezipped):
    [row] = check([rezipped("homework.zip")])
    assert (row.student, row.problems) == ("RE6121011", ["its name is not EAI_Lab4_RE6121011.zip"])
    [row] = check([rezipped("EAI_Lab4_RE61210112.zip")])
    assert row.problems == ["its name is not EAI_Lab4_RE6121011.zip"]
    second = {"EAI_Lab4_B_Report.pdf": zipfile.ZipFile(good[0]).read(REPORT)}
    [row] = check([rezipped("EAI_Lab4_RE6121011.zip", second)])
    assert (row.student, row.problems) == ("RE6121011", [])
    [row] = check([rezipped("EAI_Lab4_B.zip", second)])
    assert (row.student, row.problems) == ("B", [])


def test_each_file_of_the_class_gets_a_row(good, tmp_path):
    """Archives that are none, links, encryption, rubbish, archives of archives; not the litter."""
    folder, whole = tmp_path / "class", good[0].read_bytes()
    (folder / "group").mkdir(parents=True)
    encrypted = bytearray(whole)
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1  # the flag of the first entry in the directory
    contents = {".DS_Store": b"?", "Thumbs.db": b"?", "L.zip": whole}
    expected = {
        "none.zip": (None, "not a readable archive"),
        "A.rar": (b"?", "not a zip"),
        "C.tar.gz": (b"?", "not a zip"),
        "group/report.pdf": (b"?", "not a zip"),
        "group/EAI_Lab4_RE6121011.zip": (whole, ""),
        "E.zip": (encrypted, "encrypted"),
        "T.zip": (whole[:-3000], "not a readable archive"),
        "Z.zip": (bytes(31_000_000), "larger than 30 MB"),
        "L.zip": (None, "or a link: models/link.py"),
        "moodle.zip": (None, "an archive of 3 archives: unpack it"),
    }
    contents |= {name: content for name, (content, _) in expected.items() if content}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    link = zipfile.ZipInfo("models/link.py")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(folder / "L.zip", "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with zipfile.ZipFile(folder / "moodle.zip", "w") as archive:
        for n in range(3):
            archive.write(good[0], f"Wang_{n}_assignsubmission_file_/EAI_Lab4_{n}.zip")
    rows = {row.name: "; ".join(row.problems) for row in check([tmp_path / "none.zip", folder])}
    assert rows.keys() == expected.keys()
    for name, (_, what) in expected.items():
        assert what in rows[name] and bool(what) == bool(rows[name])


def test_archives_of_one_run_are_pointed_out(good, rezipped, tmp_path):
    report = zipfile.ZipFile(good[0]).read(REPORT)
    rezipped("EAI_Lab4_B.zip", {REPORT: None, "EAI_Lab4_B_Report.pdf": report})
    run = json.loads(zipfile.ZipFile(good[0]).read("run.json"))
    rezipped("EAI_Lab4_RE6121011.zip", {"run.json": json.dumps(run | {"id": "f" * 16}).encode()})
    rows = check([good[0], tmp_path])
    assert [bool(row.problems) for row in rows] == [False, False, True]
    assert "of several runs" in rows[2].problems[-1]
    header, first, second, third = table(rows).splitlines()
    assert "EAI_Lab4_B.zip" in first and "11.11 → 92.61" in second and "  B  " in second
    assert second.count("EAI_Lab4_RE6121011.zip") == 1
    assert "EAI_Lab4_B.zip" not in third
    assert header.index("student") == second.index("B  ", 16)


def test_the_exit_code_tells_whether_all_are_acceptable(good, rezipped, monkeypatch, capsys):
    """And names do not reach the terminal as commands."""

    def code(*paths: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["check", *map(str, paths)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    assert code(good[0]) == 0
    assert code(good[0], rezipped("EAI_Lab4_R.zip", {"../\x1b[2J": b""})) == 1
    said = capsys.readouterr().out
    assert said.count("EAI_Lab4_R.zip") == 1 and "unpacks outside" in said and "\x1b" not in said
