"""What is missing, how long, on which machine: said before anything is done."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_data, tiny_model, tiny_profile

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
    [(40, "40 s"), (130, "2 min"), (7100, "118 min"), (7300, "2.0 hours"), (36_000, "10.0 hours")],
)
def test_a_duration_is_said_as_people_say_it(seconds, said):
    assert machine.duration(seconds) == said


def test_a_forecast_adds_up_every_training_and_is_compared_with_what_they_took(monkeypatch, capsys):
    data, wide, narrow = tiny_data(), tiny_model(), tiny_model(cfg=[2])
    measured, now = [], iter([5.0, 65.0, 70.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))

    def seconds_per_epoch(model, *_):
        measured.append(model.cfg)
        return 30.0 if model is wide else 1000.0

    monkeypatch.setattr(machine, "seconds_per_epoch", seconds_per_epoch)
    short, long = tiny_profile(epochs=2), tiny_profile(epochs=3)
    forecast = machine.Forecast("All", [(wide, short), (narrow, long), (wide, short)], data)
    forecast.compare()
    assert measured == [wide.cfg, narrow.cfg]  # of one shape once
    said = capsys.readouterr().out
    assert said.startswith("All takes about 52 min here (float32 on 1 CPU thread)")
    assert said.endswith("All took 60 s (forecast: 52 min)\n") and "Shorter" not in said
    machine.Forecast("All", [(narrow, tiny_profile(epochs=8))], data)
    assert "2.2 hours" in (said := capsys.readouterr().out) and "Shorter: fewer epochs" in said


def test_the_device_is_named_with_the_machine(capsys):
    assert machine.use_device("cpu") == torch.device("cpu")
    said = capsys.readouterr().out
    assert machine.processor() in said and f"torch {torch.__version__.split('+')[0]}" in said


def test_set_up_says_which_other_lab_is_not_used_and_refuses_another_projects_modules(
    tmp_path, capsys
):
    here, other = Path(__file__).parents[1], Path("/content/drive/lab copy")
    machine.set_up([here, here, other, here])
    said = capsys.readouterr().out
    assert said.count("another copy of the lab") == 1 and f"not used: {other})" in said
    with pytest.raises(ImportError, match=r"models/ is that of another project.*PYTHONPATH"):
        machine.set_up([tmp_path])
