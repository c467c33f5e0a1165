"""Which device, what is missing, how long: said before anything is done."""

import json
import re
from pathlib import Path

import pytest
import torch

from utils.run import machine


def test_describe_machine_says_hardware_threads_and_versions():
    said = machine.describe_machine("cpu")
    assert said.keys() == {"device", "threads", "python", "torch", "torchvision", "numpy"}
    assert said["threads"] == torch.get_num_threads()
    assert said["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert said["device"] and json.loads(json.dumps(said)) == said


def test_with_a_gpu_the_cpu_is_named_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    said = machine.describe_machine("cuda")
    assert (said["device"], said["processor"]) == ("a GPU", machine.processor())


@pytest.mark.parametrize(
    ("mac", "word"), [(False, "No GPU found"), (True, "The GPU of this Mac is not used")]
)
def test_without_cuda_the_cpu_is_taken_with_a_word_on_what_suits_it(monkeypatch, capsys, mac, word):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mac)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert machine.pick_device() == torch.device("cpu")
    said = capsys.readouterr().out
    assert said.startswith(word) and all(w in said for w in ("CPU", "quick", "laptop"))


def test_with_a_gpu_it_is_taken_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert machine.pick_device() == torch.device("cuda")
    assert capsys.readouterr().out == ""
    assert not torch.backends.cudnn.allow_tf32  # float32 is float32


def test_a_gpu_that_this_torch_can_not_use_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert machine.pick_device() == torch.device("cpu")
    assert re.search("torch .* without CUDA.*driver.*pytorch.org", capsys.readouterr().out)


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


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1, r"5 epochs take about 1 min here$"),
        (299, r"5 epochs take about 5 min here$"),
        (36_000, r"5 epochs take about 10 hours here\. .*quick"),
    ],
)
def test_the_forecast_says_how_long_and_what_is_shorter_if_that_is_long(seconds, said):
    assert re.match(said, machine.forecast(seconds, "5 epochs"))


def test_set_up_says_where_it_runs_and_which_other_lab_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here, other = Path("/content/lab"), Path("/content/drive/lab copy")
    assert machine.set_up([here, here, other, here]) == torch.device("cpu")
    said = capsys.readouterr().out
    assert said.count("another copy of the lab") == 1 and f"not used: {other})" in said
    assert f"torch {torch.__version__.split('+')[0]}" in said
