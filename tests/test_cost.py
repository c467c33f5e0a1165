"""utils/cost.py: parameters, MACs, bytes and seconds."""

import copy
import itertools
import logging

import pytest
import safetensors.torch
import torch
from torch import nn

from models.vgg import VGG
from utils.cost import eager, file_size, fold_bn, macs, num_parameters, take_turns

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
        lambda model: eager(model, torch.ones(1, 3, 8, 8))(),
    ],
    ids=["num_parameters", "macs", "file_size", "fold_bn", "eager"],
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


def test_file_size_is_that_of_the_file_whatever_the_memory_format(tmp_path):
    model = VGG([32, 64])
    safetensors.torch.save_file(model.state_dict(), tmp_path / "file")
    for form in (torch.contiguous_format, torch.channels_last):
        assert file_size(model.to(memory_format=form)) == (tmp_path / "file").stat().st_size
    assert file_size(VGG([32, 16])) < file_size(model) - 4 * 9 * 32 * 48


def test_steps_are_timed_on_the_threads_and_by_the_clock_asked_for():
    """A clock that goes on by eight seconds whenever it is looked at."""
    seen, clock = set(), itertools.count(0, 8)
    (taken,) = take_turns(
        {"": lambda: seen.add(torch.get_num_threads())},
        num_threads=2,
        rounds=1,
        min_run_time=1.0,
        timer=lambda: next(clock),
    ).values()
    assert 2 in seen and torch.get_num_threads() == 1
    assert taken.raw_times and set(taken.raw_times) == {8}


def test_networks_are_timed_in_turns():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = take_turns(steps, rounds=2, min_run_time=1e-4)
    assert "".join(name for name, _ in itertools.groupby(calls)) == "abab"
    assert all(times[name].median > 0 and times[name].iqr >= 0 for name in "ab")
    assert all(len(times[name].times) > 1 for name in "ab")


def test_eager_computes_what_the_network_in_use_does():
    model, images = small().train(), torch.randn(2, 3, 8, 8)
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
