"""What the benchmarks compare is the same work."""

import math
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny import tiny_data, tiny_model, tiny_profile
from torch.testing import assert_close

from benchmarks import train_speed, trials
from benchmarks.train_speed import reference_optimizer, reference_step
from utils.step import TrainStep


def test_the_reference_loop_trains_as_the_engine_does(monkeypatch):
    monkeypatch.setattr(train_speed, "L1_LAMBDA", 0.1)  # enough to be seen
    profile, batches = tiny_profile(), [*tiny_data().plain_batches("train", 10)]
    plain, ours = tiny_model(), tiny_model()
    optimizer = reference_optimizer(plain, profile)
    step = TrainStep(ours, profile, "float32", l1_lambda=0.1)
    total = correct = 0.0
    for images, labels in batches:
        loss, hits = reference_step(plain, optimizer, images, labels)
        total, correct = total + loss * len(labels), correct + hits
        step(images, labels)
    assert_close(dict(ours.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-6)
    count = sum(len(labels) for _, labels in batches)
    assert_close(torch.tensor(step.read()), torch.tensor([total, 100 * correct]) / count)


def test_a_trial_says_by_how_many_standard_errors_a_way_is_better():
    reached = {trials.BASE: (60, 70, 80), "better": (62, 74, 86), "noise": (70, 60, 80)}
    rows = [
        {"way": way, "seed": seed, "accuracy (%)": accuracy, "MACs (M)": 2.0}
        for way, accuracies in reached.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    table = trials.compare(pd.DataFrame(rows))
    assert list(table.index) == list(reached)
    assert table.loc["better", "gain"] == pytest.approx(4)  # 2, 4 and 6: deviation 2
    assert table.loc["better", "gain in standard errors"] == pytest.approx(4 / (2 / math.sqrt(3)))
    assert table.loc["noise", "gain"] == pytest.approx(0)
    assert table.loc["better", "± (standard deviation)"] == pytest.approx(12)


def test_a_way_whose_floor_forbids_the_cut_is_left_out_and_the_others_are_tried(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    profile = tiny_profile(epochs=1, finetune_epochs=1, distillation=0.0)
    chosen = ["min_channels=9", "crop_padding=0", "l1_lambda=0", "same_macs=True"]
    rows = trials.one_seed(profile, tiny_data(), torch.device("cpu"), 0.02, chosen)
    trained, base, *others = rows
    assert [row["way"] for row in rows] == [trials.TRAINED, trials.BASE, *chosen[1:]]
    assert re.search("min_channels=9: left out, min_channels = 9.*lower", capsys.readouterr().out)
    assert base["MACs (M)"] < trained["MACs (M)"]
    assert others[-1]["MACs (M)"] <= base["MACs (M)"]


def test_every_way_of_a_trial_is_settings_of_a_profile():
    profile = tiny_profile()
    for way in trials.ways(profile):
        change = trials.settings(way)
        replace(profile, **{k: v for k, v in change.items() if k not in ("same_macs", "l1_lambda")})
    with pytest.raises(ValueError, match=r"'width 0\.5': must be settings"):
        trials.settings("width 0.5")
