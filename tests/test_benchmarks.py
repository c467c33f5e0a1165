"""What the benchmarks compare is the same work."""

import math
import re

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
    once = {"multipass_ratios": ()}
    chosen = {trials.BASE: once, "a floor": once | {"min_channels": 9}, "no crop": once}
    rows = trials.one_seed(profile, tiny_data(), torch.device("cpu"), 0.02, chosen)
    assert [row["way"] for row in rows] == [trials.BASE, "no crop"]
    assert re.search("a floor: left out, min_channels = 9.*lower", capsys.readouterr().out)


def test_each_way_of_a_trial_changes_one_thing_of_a_cut_at_once():
    profile = tiny_profile()
    ways = trials.ways(profile)
    base = ways.pop(trials.BASE)
    assert ways.pop(trials.UNPENALIZED) == base  # of another network
    both = ways.pop("twice the lr, weight decay 5e-4")
    assert both == ways["twice the lr"] | ways["weight decay 5e-4"]
    for way in ways.values():
        changed = {k for k, v in way.items() if v != base.get(k)}
        assert len(changed) == 1 or changed == {"finetune_schedule", "finetune_lr"}
