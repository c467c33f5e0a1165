"""models/vgg.py: its size, its names, what it computes, how it starts, what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.vgg import VGG, VGG_CFGS, scale_cfg, smallest_image

SMALL = [3, 4, "M", 5]


@pytest.mark.parametrize(
    ("depth", "parameters"), [(11, 9_228_362), (13, 9_413_066), (16, 14_724_042), (19, 20_035_018)]
)
def test_dense_networks_have_the_published_number_of_parameters(depth, parameters):
    with torch.device("meta"):  # shapes only
        assert sum(p.numel() for p in VGG(VGG_CFGS[depth]).parameters()) == parameters


def test_on_the_meta_device_no_random_number_is_drawn_and_no_compiler_imported():
    code = (
        "import sys, torch; from models.vgg import VGG; before = torch.get_rng_state()\n"
        "with torch.device('meta'): assert all(p.is_meta for p in VGG().parameters())\n"
        "assert torch.equal(torch.get_rng_state(), before) and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_vgg19_is_the_default():
    with torch.device("meta"):
        assert VGG().cfg == VGG_CFGS[19]


@pytest.mark.parametrize(
    ("cfg", "num_classes", "parameters"),
    [
        ([1], 2, (27 + 2) + (2 + 2)),
        (SMALL, 10, (81 + 6) + (108 + 8) + (180 + 10) + (50 + 10)),
        ([2, "M", "M", 7], 3, (54 + 4) + (126 + 14) + (21 + 3)),
    ],
)
def test_slim_networks_have_the_parameters_counted_by_hand(cfg, num_classes, parameters):
    model = VGG(cfg, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("num_classes", [1, 10])
def test_output_is_one_row_of_logits_per_image(size, num_classes):
    logits = VGG(SMALL, num_classes=num_classes)(torch.randn(2, 3, size, size))
    assert logits.shape == (2, num_classes)


def test_vgg19_halves_a_32_pixel_image_four_times():
    with torch.device("meta"):
        assert VGG().feature(torch.empty(1, 3, 32, 32)).shape == (1, 512, 2, 2)


def test_forward_is_conv_bn_relu_pool_mean_linear():
    model = VGG([3, "M", 4]).eval()
    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    images = torch.randn(2, 3, 8, 8)

    x = images
    for conv, bn, pooled in [("feature.0", "feature.1", True), ("feature.4", "feature.5", False)]:
        x = F.conv2d(x, weights[f"{conv}.weight"], padding=1)
        # Fresh running statistics: mean 0, variance 1, and BN's eps of 1e-5.
        gamma, beta = weights[f"{bn}.weight"], weights[f"{bn}.bias"]
        x = x / math.sqrt(1 + 1e-5) * gamma[:, None, None] + beta[:, None, None]
        x = x.clamp_min(0)
        x = F.max_pool2d(x, 2) if pooled else x
    logits = x.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]

    torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)


def test_blocks_are_the_convolutions_with_their_batch_norms_in_forward_order():
    model = VGG([3, 4, "M", 5])
    pairs = [(model.feature[i], model.feature[i + 1]) for i in (0, 3, 7)]
    assert len(model.blocks()) == 3
    for (conv, bn), (expected_conv, expected_bn) in zip(model.blocks(), pairs, strict=True):
        assert conv is expected_conv
        assert bn is expected_bn


def test_state_dict_keys_are_those_of_the_original_lab():
    batch_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(VGG([3, "M", 4]).state_dict()) == [
        "feature.0.weight",
        *(f"feature.1.{name}" for name in batch_norm),
        "feature.4.weight",
        *(f"feature.5.{name}" for name in batch_norm),
        "classifier.weight",
        "classifier.bias",
    ]


def test_initialisation_is_that_of_the_lab():
    model = VGG([64, 64, "M", 96], num_classes=200)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.all(bn.weight == 0.5)
        assert torch.all(bn.bias == 0)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        expected = math.sqrt(2 / (9 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(conv.weight.mean().item()) < 0.1 * expected
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.all(model.classifier.bias == 0)


def test_the_callers_cfg_is_neither_changed_nor_kept():
    cfg = list(SMALL)
    model = VGG(cfg)
    cfg.append(99)
    assert model.cfg == SMALL
    with torch.device("meta"):
        VGG().cfg.append(99)
        assert VGG().cfg[-1] == 512


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        *[({"cfg": cfg}, "cfg", repr(cfg)) for cfg in ([], ["M"], "M", 5, {3: 4})],
        *[({"cfg": [4, v]}, "cfg", repr(v)) for v in (0, -3, 2.5, "m", "8", None, True, [4])],
        *[({"cfg": [4], "num_classes": n}, "num_classes", repr(n)) for n in (0, -1)],
    ],
)
def test_bad_arguments_raise_an_error_that_names_field_and_value(arguments, field, value):
    with pytest.raises(ValueError) as error:
        VGG(**arguments)
    assert field in str(error.value)
    assert value in str(error.value)


@pytest.mark.parametrize(
    ("width", "scaled"),
    [(1, [3, 4, "M", 8]), (0.5, [2, 2, "M", 4]), (2, [6, 8, "M", 16]), (0.01, [1, 1, "M", 1])],
)
def test_scale_cfg_scales_every_layer_and_leaves_at_least_one_channel(width, scaled):
    cfg = [3, 4, "M", 8]
    assert scale_cfg(cfg, width) == scaled
    assert cfg == [3, 4, "M", 8]
    VGG(scaled)  # a cfg that the network takes


@pytest.mark.parametrize(
    ("cfg", "least"), [([4], 1), ([4, "M", 4, "M"], 4), (["M", 2] * 6, 64), (VGG_CFGS[19], 16)]
)
def test_an_image_too_small_for_the_pools_is_told_by_cfg_and_size(cfg, least):
    assert smallest_image(cfg) == least
    model = VGG(cfg).eval()
    assert model(torch.rand(1, 3, least + 5, least)).shape == (1, 10)
    if least > 1:
        said = rf"'M'.*of {least}×{least - 1}; it needs at least {least}×{least}"
        with pytest.raises(ValueError, match=said):
            model(torch.rand(1, 3, least, least - 1))
