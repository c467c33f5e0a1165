"""What the benchmarks compare is the same work."""

import torch
from tiny import tiny_data, tiny_model, tiny_profile
from torch.testing import assert_close

from benchmarks import train_speed
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
