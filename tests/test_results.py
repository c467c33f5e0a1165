"""results.json holds one run, whole; its tables are one text wherever they are shown."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import start
from tiny import tiny_data, tiny_profile

from utils.run import page, results
from utils.run.identity import Run
from utils.run.machine import describe_machine
from utils.run.page import refresh, whole_page
from utils.run.results import read

RUN = Run(
    tiny_profile(name="tiny", l1_lambdas=(0.0, 0.1)),
    {"name": "noise", "digest": tiny_data().digest},
)
OTHER = replace(RUN, profile=replace(RUN.profile, lr=0.2))
FOLDER = Path("figures/tiny")

TRAINED = {
    "l1_lambda": 1e-4,
    "train_accuracy": [50.0, 99.5],
    "test_accuracy": [49.0, 91.234],
    "sparsity": [0.1, 0.6],
}
CUT = {
    "pruning_ratio": 0.9,
    "min_channels": 1,
    "l1_lambda": 1e-4,
    "cfg": [3, "M", 5],
    "before the cut": 91.234,
    "raw cut": 0.0,
    "β absorbed": 12.0,
    "BN recalibrated": 88.5,
    "β absorbed, BN recalibrated": 89.876,
}
SLIM = {
    "network": "slim",
    "stage": "slim",
    "raw cut (%)": 0.0,
    "test accuracy (%)": 93.5,
    "parameters": 20_035_018,
    "MACs (M)": 398.14,
    "file (kB)": 80_215,
    "batch of 256 (ms)": 900.0,
}
WAY = {"90% pruned": "distillation 0.5", "fine-tuned (%)": 70.0, "±": None, "seeds": 1}
SPEED = [
    {"network": name, "runtime": runtime, "images": n, "ms": ms * n, "IQR": 0.1}
    for n in (1, 256)
    for name in ("dense", "slim")
    for runtime, ms in (("eager float32", 2.5), ("ONNX int8", 0.125))
]
SECTIONS = {
    "sparsity_train": {"runs": [TRAINED]},
    "vggprune": {"cuts": [CUT]},
    "train_prune_model": {
        "table": [SLIM | {"network": "dense", "stage": "dense", "raw cut (%)": None}, SLIM],
        "speed": SPEED,
        "ways": [WAY],
    },
}


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(*names: str, run: Run = RUN, **values) -> None:
    for name in names or SECTIONS:
        results.record(run, name, values or SECTIONS[name], "cpu")


# --- recording -----------------------------------------------------------------------------------


def test_a_section_says_whose_it_is_and_is_replaced_while_the_others_stay():
    record()
    record("sparsity_train", runs=[TRAINED | {"l1_lambda": 0.5}], note="γ → 0")
    found = read(FOLDER)
    assert list(found) == [*SECTIONS]
    assert found["sparsity_train"]["runs"][0]["l1_lambda"] == 0.5
    assert found["vggprune"]["cuts"] == [CUT] and found["sparsity_train"]["note"] == "γ → 0"
    for section in found.values():
        assert (section["run"], section["data"]) == (RUN.id, "noise")
        assert section["profile"]["l1_lambdas"] == [0.0, 0.1]
        assert section["machine"] == describe_machine("cpu")
    assert [f.name for f in FOLDER.iterdir() if f.is_file()] == [results.FILE]


def test_sections_of_another_run_are_left_out_with_a_word(capsys):
    record()
    record("vggprune", run=OTHER)
    assert list(read(FOLDER)) == ["vggprune"] and read(FOLDER)["vggprune"]["run"] == OTHER.id
    said = capsys.readouterr().out
    assert "sparsity_train.ipynb has shown another run: its old results are left out" in said
    assert "train_prune_model.ipynb has shown another run" in said


@pytest.mark.parametrize("change", [{"min_channels": 2}, {"l1_lambda": 0.1}, {"cfg": [3, "M", 4]}])
def test_what_was_fine_tuned_after_an_earlier_cut_is_left_out(capsys, change):
    record()
    record("vggprune")  # the same cut again
    assert list(read(FOLDER)) == [*SECTIONS] and "left out" not in capsys.readouterr().out
    record("vggprune", cuts=[CUT | change])
    assert list(read(FOLDER)) == ["sparsity_train", "vggprune"]
    assert "train_prune_model.ipynb has shown the networks of an earlier cut" in (
        capsys.readouterr().out
    )


def test_what_was_just_recorded_is_never_left_out():
    record(run=OTHER)
    record("train_prune_model")
    assert list(read(FOLDER)) == ["train_prune_model"]


def _record_often(section):
    for k in range(30):
        record(section, k=k)


def test_two_notebooks_that_record_at_once_lose_nothing():
    writers = [start(_record_often, name) for name in ("sparsity_train", "vggprune")]
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert {name: section["k"] for name, section in read(FOLDER).items()} == {
        "sparsity_train": 29, "vggprune": 29,
    }  # fmt: skip
    assert [f.name for f in FOLDER.iterdir() if f.is_file()] == [results.FILE]


def test_a_failed_write_leaves_the_results_before():
    record()
    before = (FOLDER / results.FILE).read_bytes()
    with pytest.raises(TypeError):
        record("vggprune", cuts=[CUT], odd=object())
    assert (FOLDER / results.FILE).read_bytes() == before


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damaged",
    [b"", b'{"vggprune": {', b"<html>", b"\xff\xfe\x00", b"[]", b"null", b"3", b'{"vggprune": []}'],
)
def test_what_is_no_results_is_named_and_left_alone(lab, damaged):
    file = FOLDER / results.FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(damaged)
    for work in (lambda: read(FOLDER), lambda: whole_page(FOLDER), lambda: record("vggprune")):
        with pytest.raises(ValueError, match=rf"^{lab}/figures/tiny/results\.json: not .*move it"):
            work()
    assert file.read_bytes() == damaged


def test_the_wrong_folder_is_named_with_the_right_one(lab):
    for wrong in (lab, "figures", "figures/none", "checkpoints/tiny/results.json"):
        with pytest.raises(ValueError, match=rf"^{lab}.*results\.json: no results here; .*<run>"):
            whole_page(wrong)
    record()


@pytest.mark.parametrize(
    ("section", "content"),
    [
        ("sparsity_train", {"runs": [{"l1_lambda": 0.1}]}),
        ("sparsity_train", {"runs": [TRAINED | {"train_accuracy": []}]}),
        ("sparsity_train", {"runs": None}),
        ("vggprune", {"cuts": [{"pruning_ratio": 0.5}]}),
        ("vggprune", {"cuts": "none"}),
        ("train_prune_model", {"table": [3]}),
    ],
)
def test_a_section_that_lacks_what_its_table_shows_is_named(section, content):
    record(section, **content)
    with pytest.raises(ValueError, match=r"results\.json: a section lacks .*run its notebook"):
        whole_page(FOLDER)


# --- showing -------------------------------------------------------------------------------------


def rows(table: str) -> list[list[str]]:
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1  # columns stand in line
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_is_tables_of_what_was_recorded():
    record()
    training, cuts, networks, latency, ways = map(rows, whole_page(FOLDER).split("\n\n"))
    assert training[0] == ["λ", "training accuracy (%)", "test accuracy (%)", "sparsity"]
    assert training[2] == ["0.0001", "99.50", "91.23", "0.600"]
    assert cuts[2] == ["90%", "0.0001", "91.23", "0.00", "12.00", "88.50", "89.88"]
    assert networks[2] == ["dense", "", "93.50", "20,035,018", "398.14", "900.00"]
    assert networks[3][:2] == ["slim", "0.00"]  # nothing right is not nothing measured
    assert latency[0][1:3] == ["eager float32, 1 (ms)", "ONNX int8, 1 (ms)"]
    assert latency[2] == ["dense", "2.50", "0.12", "640.00", "32.00"] and latency[3][0] == "slim"
    assert ways[2] == ["distillation 0.5", "70.00", "", "1"]


def test_what_has_not_run_is_said():
    record("sparsity_train", "vggprune")
    assert whole_page(FOLDER).endswith("\n\ntrain_prune_model.ipynb has not run.")
    assert len(whole_page(FOLDER).split("\n\n")) == 3


def test_the_page_has_the_settings_of_the_last_notebook():
    later = replace(RUN, profile=replace(RUN.profile, finetune_epochs=9))
    record("sparsity_train")
    record("vggprune", "train_prune_model", run=later)
    page.write_page(FOLDER)
    said = (FOLDER / "README.md").read_text("utf-8").split("\n\n")[1]
    assert said.startswith(
        "noise, VGG-11 at width 0.0625, 3 + 9 epochs, seed 1, float32, last epoch"
    )
    assert describe_machine("cpu")["device"] in said


TUNED = {
    "network": "90% pruned",
    "cfg": [7, "M", 6],
    "train_accuracy": [60.0, 72.5, 71.25],
    "test_accuracy": [50.0, 69.5, 68.75],
}


def test_a_fine_tuning_has_the_accuracies_of_its_last_epoch():
    record("train_prune_model", finetuning=[TUNED])
    found = page.tables(read(FOLDER))["finetuned"].reset_index()
    assert found.to_numpy().tolist() == [["90% pruned", "71.25", "68.75", "7 6"]]
    assert list(found)[1:3] == ["training accuracy (%)", "test accuracy (%)"]


def test_cifar10_stands_beside_the_report():
    of_cifar10 = replace(RUN, data=RUN.data | {"name": "CIFAR-10"})
    cut = CUT | {"pruning_ratio": 0.5, "raw cut": 11.5}
    record("vggprune", run=of_cifar10, cuts=[cut, CUT | {"pruning_ratio": 0.7}])
    table = [
        SLIM | {"network": f"{stage} λ=1, {pruned}% pruned", "stage": stage, "MACs (M)": macs,
                "test accuracy (%)": accuracy}
        for stage, pruned, macs, accuracy in
        (("slim", 50, 33.0, 81.0), ("finetuned", 50, 44.0, 92.5), ("finetuned", 70, 22.0, 91.0))
    ]  # fmt: skip
    speed = [
        {"network": name, "runtime": runtime, "images": n, "ms": ms * n**0.5}
        for name, runtime, ms in (
            ("dense", "eager float32", 30.0), ("50% pruned", "eager float32", 10.0),
            ("dense", "ONNX int8", 6.0), ("50% pruned", "ONNX int8", 2.0),
        )
        for n in (1, 256)
    ]  # fmt: skip
    speed[-1]["ms"] = 64.0
    record("train_prune_model", run=of_cifar10, table=table, speed=speed)
    found = page.tables(read(FOLDER))["beside"].reset_index()
    assert found.to_numpy().tolist() == [
        ["50%", "10.0", "92.6", "11.50", "89.88", "92.50", "20,035,018", "44.00", "15.0 × / 7.5 ×"]
    ]
    record()  # other images
    assert "beside" not in page.tables(read(FOLDER))


def test_two_runs_are_never_printed_as_one_whole_page():
    record()
    whole = read(FOLDER)
    whole["vggprune"]["run"] = OTHER.id
    whole["vggprune"]["cuts"] = [CUT | {"raw cut": 77.77}]
    (FOLDER / results.FILE).write_text(json.dumps(whole), "utf-8")
    said = whole_page(FOLDER)
    assert "99.50" in said and "77.77" not in said
    assert "vggprune.ipynb has shown another run." in said


def test_a_run_that_only_cuts_has_a_report_of_its_own():
    cut = replace(RUN, profile=replace(RUN.profile, name="floor_2"), trained_in="tiny")
    record("vggprune", "train_prune_model", run=cut)
    said = whole_page("figures/floor_2")
    assert "sparsity_train.ipynb has not run." in said and "another run" not in said
    assert "89.88" in said and "93.50" in said


def test_quoted_tables_are_made_anew_from_the_results_they_name():
    record()
    quote = "<!-- python -m utils.run.page figures/tiny {} -->\n\n{}\n\n<!-- end -->"
    empty = quote.format("cuts", "").replace("\n\n\n\n", "\n\n")  # as one writes a new page
    text = f"# Title\n\n{empty}\n\nbetween\n\n{quote.format('ways', 'x | y')}\n"
    new = refresh(text)
    tables = whole_page(FOLDER).split("\n\n")
    wanted = f"# Title\n\n{quote.format('cuts', tables[1])}\n\nbetween\n\n"
    assert new == wanted + f"{quote.format('ways', tables[4])}\n"
    assert refresh(new) == new
    with pytest.raises(ValueError, match=r"figures/tiny: no table 'cut', there are training, cuts"):
        refresh(quote.format("cut", "old"))


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["results", *arguments])
    monkeypatch.delitem(sys.modules, "utils.run.page")
    runpy.run_module("utils.run.page", run_name="__main__")


def test_the_command_writes_a_page_and_prints_the_whole_page(monkeypatch, capsys):
    record()
    (FOLDER / "ladder.png").write_bytes(b"picture")
    capsys.readouterr()
    command(monkeypatch, "figures/tiny")
    shown = (FOLDER / "README.md").read_text("utf-8")
    assert capsys.readouterr().out.strip() == whole_page(FOLDER)
    assert whole_page(FOLDER) in shown and "![ladder](ladder.png)" in shown and "# tiny" in shown
    assert "noise" in shown and "3 + 2 epochs, seed 1, float32" in shown


def test_the_command_makes_the_tables_of_a_file_anew(monkeypatch):
    record()
    text = "<!-- python -m utils.run.page figures/tiny cuts -->\n\nold\n\n<!-- end -->"
    Path("page.md").write_text(text, "utf-8")
    command(monkeypatch, "page.md")
    assert "89.88" in Path("page.md").read_text("utf-8")


@pytest.mark.parametrize("arguments", [["figures/none"], [], ["a", "b"]])
def test_a_wrong_command_exits_with_a_line(monkeypatch, arguments):
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, *arguments)
    assert "figures/" in str(caught.value)
