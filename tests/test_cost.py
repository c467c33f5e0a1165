"""utils/cost.py: parameters, MACs, bytes and seconds."""

import copy
import itertools
import logging

import pytest
import torch
from torch import nn

from models.vgg import VGG
from utils import cost
from utils.cost import file_size, fold_bn, latency, macs, num_parameters

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


def test_latency_is_a_positive_time_on_the_asked_number_of_threads():
    options = {"input_shape": (3, 8, 8), "num_threads": 1, "min_run_time": 0.01}
    assert latency(small(), 2, **options) > 0
    (taken,) = cost.compare_latency({"one": small()}, 2, rounds=1, **options).values()
    assert taken.iqr >= 0
    assert taken.num_threads == 1


def test_networks_are_measured_in_turns_on_the_batch_that_was_asked_for():
    networks, seen = {"dense": small([3, "M", 4]), "slim": small([1, "M", 2])}, []
    for name, model in networks.items():
        model.register_forward_pre_hook(lambda _, x, name=name: seen.append((name, x[0].shape)))
    taken = cost.compare_latency(
        networks, 2, rounds=2, input_shape=(3, 8, 8), num_threads=1, min_run_time=0.005
    )
    assert [name for name, _ in itertools.groupby(name for name, _ in seen)] == [*networks] * 2
    assert {shape for _, shape in seen} == {(2, 3, 8, 8)}
    assert list(taken) == list(networks)
    for measurement in taken.values():
        assert measurement.median > 0
        assert len(measurement.times) >= 2  # one or more of each round


def test_only_the_warning_of_a_toolkit_without_a_gpu_is_silenced(caplog):
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addHandler(caplog.handler)
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
    logger.warning("another matter")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"another matter"}
