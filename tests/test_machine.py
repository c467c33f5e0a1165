"""The machine beside a figure, and the figures of a run in one file."""

import json
import runpy
import sys

import pytest
import torch
from conftest import start

from utils import machine, results
from utils.config import get_profile

SMOKE = get_profile("smoke")


def record(folder, section, values):
    results.record(folder, section, values, profile=SMOKE, device="cpu")


def test_describe_machine_says_hardware_threads_and_versions():
    said = machine.describe_machine("cpu")
    assert said.keys() == {"device", "threads", "python", "torch", "torchvision", "numpy"}
    assert said["threads"] == torch.get_num_threads()
    assert said["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert said["device"] and json.loads(json.dumps(said)) == said


def test_without_a_gpu_the_cpu_is_taken_with_a_word_on_what_suits_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device() == torch.device("cpu")
    said = capsys.readouterr().out
    assert all(word in said for word in ("no GPU", "CPU", "quick", "laptop"))


def test_with_a_gpu_it_is_taken_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.pick_device() == torch.device("cuda")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch>=999  # the network", r"torch>=999 \(found: \d"),
        ("no-such-package>=1", r"no-such-package>=1 \(found: none\)"),
        ("torch>=2.0\n\n# a remark\njupyter>=999\nnumpy>=1.26  # numbers", None),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_named(tmp_path, line, said):
    file = tmp_path / "requirements.txt"
    file.write_text(line)
    if said is None:
        machine.check_requirements(str(file))
        return
    with pytest.raises(ImportError, match=said):
        machine.check_requirements(str(file))


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    folder = tmp_path / "new" / "Ergebnisse λ"
    record(folder, "one", {"accuracy": 1.0})
    record(folder, "two", {"ratio": 0.5, "note": "γ → 0"})
    record(folder, "one", {"accuracy": 93.5})
    found = results.read(folder)
    assert found.keys() == {"one", "two"}
    assert found["one"]["accuracy"] == 93.5 and found["two"]["note"] == "γ → 0"
    assert found["one"]["profile"]["l1_lambdas"] == list(SMOKE.l1_lambdas)
    assert found["one"]["machine"] == machine.describe_machine("cpu")
    assert [f.name for f in folder.iterdir()] == [results.FILE]


def _record_often(folder, section):
    for k in range(100):
        record(folder, section, {"k": k})


def test_two_notebooks_that_record_at_once_lose_nothing(tmp_path):
    writers = [start(_record_often, tmp_path, name) for name in ("one", "two")]
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = results.read(tmp_path)
    assert {name: section["k"] for name, section in found.items()} == {"one": 99, "two": 99}
    assert [f.name for f in tmp_path.iterdir()] == [results.FILE]


@pytest.mark.parametrize("damaged", [b"", b'{"one": {', b"<html>", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named_and_left_alone(tmp_path, damaged):
    file = tmp_path / results.FILE
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=results.FILE):
        results.read(tmp_path)
    with pytest.raises(ValueError, match=results.FILE):
        record(tmp_path, "one", {})
    assert file.read_bytes() == damaged


def test_a_failed_write_leaves_the_results_before(tmp_path, monkeypatch):
    record(tmp_path, "one", {"accuracy": 1.0})
    before = (tmp_path / results.FILE).read_bytes()
    with pytest.raises(TypeError):
        record(tmp_path, "two", {"not JSON": object()})
    assert (tmp_path / results.FILE).read_bytes() == before


def test_the_report_is_markdown_tables_of_what_was_recorded(tmp_path, monkeypatch, capsys):
    record(tmp_path, "sparsity_train", {"runs": []})
    assert results.report(tmp_path) == ""  # the other notebooks have not run yet
    run = {"l1_lambda": 1e-4, "train_accuracy": [50.0, 99.5], "test_accuracy": [49.0, 91.234]}
    record(tmp_path, "sparsity_train", {"runs": [run | {"sparsity": [0.1, 0.6]}]})
    cut = {"pruning_ratio": 0.9, "before the cut": 91.234, "raw cut": 10.0}
    cut |= {"β absorbed": 12.0, "BN recalibrated": 88.5, "β absorbed, BN recalibrated": 89.876}
    record(tmp_path, "vggprune", {"cuts": [cut]})
    network = {
        "network": "slim",
        "raw cut (%)": 10.0,
        "test accuracy (%)": 93.5,
        "parameters": 20_035_018,
    }
    network |= {"MACs (M)": 398.14, "file (kB)": 80_215}
    network |= {"batch of 1 (ms)": 5.123, "batch of 256 (ms)": 900.0}
    dense = network | {"network": "dense", "raw cut (%)": None}
    way = {"network": "90% distilled", "schedule": "cosine, lr 0.1", "distillation": 0.5}
    way |= {"right after the cut (%)": 9.6, "fine-tuned (%)": 70.0}
    values = {"table": [network, dense], "ingredients": [way]}
    record(tmp_path, "train_prune_model", values)

    training, cuts, networks, ways = results.report(tmp_path).split("\n\n")
    assert "| 0.0001 |" in training and "| 91.23 |" in training.replace("  ", "")
    assert cuts.splitlines()[2].split() == [
        "|",
        "90%",
        "|",
        "91.23",
        "|",
        "10.00",
        "|",
        "12.00",
        "|",
        "88.50",
        "|",
        "89.88",
        "|",
    ]
    assert networks.splitlines()[2].split()[1:6] == ["slim", "|", "10.00", "|", "93.50"]
    assert networks.splitlines()[3].split()[1:5] == ["dense", "|", "|", "93.50"]
    assert ways.splitlines()[2].split("|")[1].strip() == "90% distilled"
    assert ways.splitlines()[2].split()[-4:] == ["9.60", "|", "70.00", "|"]
    for table in (training, cuts, networks, ways):
        assert len({len(line) for line in table.splitlines()}) == 1  # columns stand in line

    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "utils.results")
    runpy.run_module("utils.results", run_name="__main__")
    assert capsys.readouterr().out.strip().endswith(ways)
