"""utils/cost.py: parameters, MACs, bytes and seconds."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn

from models.vgg import VGG
from utils.cost import eager, file_size, fold_bn, latency, macs, num_parameters, take_turns

TINY = [3, "M", 4]


def small(cfg=TINY):
    """A network whose BN layers do something."""
    model = VGG(cfg).eval()
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2)
    nn.init.normal_(model.classifier.weight)
    return model


def test_vgg19_has_the_published_costs():
    with torch.device("meta"):
        model = VGG()
    assert num_parameters(model) == 20_035_018
    assert macs(model) == 398_136_320


def test_parameters_are_weights_gamma_and_beta_counted_by_hand():
    assert num_parameters(VGG(TINY)) == (3 * 3 * 9 + 2 * 3) + (3 * 4 * 9 + 2 * 4) + (4 * 10 + 10)


@pytest.mark.parametrize(
    ("shape", "images"), [((3, 8, 8), 1), ((1, 3, 8, 8), 1), ((5, 3, 8, 8), 5)]
)
def test_macs_of_a_slim_network_are_those_counted_by_hand(shape, images):
    per_image = 8 * 8 * (3 * 3 * 9) + 4 * 4 * (3 * 4 * 9) + 4 * 10
    assert macs(VGG(TINY), shape) == images * per_image


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "measure",
    [
        num_parameters,
        macs,
        file_size,
        fold_bn,
        lambda model: latency(model, 1, input_shape=(3, 8, 8), min_run_time=0.001),
    ],
    ids=["num_parameters", "macs", "file_size", "fold_bn", "latency"],
)
def test_measuring_leaves_the_network_unchanged(measure, training):
    model = small().train(training)
    before = copy.deepcopy(model.state_dict())
    measure(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(module.training is training for module in model.modules())


def test_folded_network_has_no_bn_and_gives_the_same_logits():
    model = small([3, 4, "M", 5])
    folded = fold_bn(model)
    images = torch.randn(4, 3, 8, 8)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)


def test_file_size_is_that_of_the_numbers_and_a_little_around_them():
    model = VGG([32, 64])
    numbers = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert numbers < file_size(model) < numbers + 1000 * len(model.state_dict())


def test_file_size_shrinks_with_the_network():
    assert file_size(VGG([32, 16])) < file_size(VGG([32, 64]))


def test_latency_is_a_positive_time_on_the_batch_and_the_number_of_threads_asked_for():
    model, seen = small(), []
    model.register_forward_pre_hook(lambda _, x: seen.append((x[0].shape, torch.get_num_threads())))
    assert latency(model, 2, input_shape=(3, 8, 8), num_threads=1, min_run_time=0.01) > 0
    assert set(seen) == {((2, 3, 8, 8), 1)}


def test_networks_are_timed_in_turns():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = take_turns(steps, rounds=2, min_run_time=1e-4)
    assert "".join(name for name, _ in itertools.groupby(calls)) == "abab"
    assert all(times[name].median > 0 and times[name].iqr >= 0 for name in "ab")
    assert all(len(times[name].times) > 1 for name in "ab")


def test_eager_computes_what_the_network_does():
    model, images = small(), torch.randn(2, 3, 8, 8)
    logits = eager(model, images)()
    torch.testing.assert_close(logits, model.eval()(images))
    assert not logits.requires_grad


def test_only_the_warning_of_a_toolkit_without_a_gpu_is_silenced(caplog):
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addHandler(caplog.handler)
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    logger.warning("another matter")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"another matter"}
