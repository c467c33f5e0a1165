"""One training step against its plain form; precision and layout change nothing but rounding."""

import pytest
import torch
import torch.nn.functional as F
from tiny import same, tiny_data, tiny_model, tiny_profile
from torch import Tensor
from torch.testing import assert_close

from utils.step import TrainStep

SCALE = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


def batch(size: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    return next(tiny_data(seed).plain_batches("train", size))


def step_with(precision: str, *, l1_lambda: float = 0.1, **options) -> TrainStep:
    return TrainStep(tiny_model(), tiny_profile(), precision, l1_lambda=l1_lambda, **options)


def weights(step: TrainStep) -> dict[str, Tensor]:
    return dict(step.model.state_dict())


def test_the_memory_layout_changes_nothing_but_rounding():
    step, plain = step_with("float32"), tiny_model()
    assert step.model.feature[3].weight.is_contiguous(memory_format=torch.channels_last)
    images, labels = batch()
    F.cross_entropy(plain(images), labels).backward()
    with torch.no_grad():
        for p in plain.parameters():
            is_gamma = any(p is m.weight for m in plain.modules() if "BatchNorm" in str(type(m)))
            p -= 0.1 * (p.grad + 1e-4 * p + 0.1 * p.sign() * is_gamma)
    step(images, labels)
    assert_close(weights(step), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32_and_keeps_float32_weights():
    exact, rough = step_with("float32"), step_with("bfloat16")
    for k in range(3):
        for step in (exact, rough):
            step(*batch(seed=k))
    assert all(p.dtype == torch.float32 for p in rough.model.parameters())
    assert_close(weights(rough), weights(exact), atol=0.02, rtol=0.02)
    assert not same(weights(rough), weights(exact))  # it was not float32 all the same
    assert rough.read()[0] == pytest.approx(exact.read()[0], rel=0.01)


def test_read_is_the_mean_over_images_since_the_last_call():
    model, step = tiny_model(), step_with("float32")
    step.set_lr(0.0)
    losses, hits = 0.0, 0
    for size in (10, 3):
        images, labels = batch(size, seed=size)
        step(images, labels)
        logits = model(images)
        losses += F.cross_entropy(logits, labels, reduction="sum").item()
        hits += (logits.argmax(1) == labels).sum().item()
    assert step.read() == (pytest.approx(losses / 13, rel=1e-5), pytest.approx(100 * hits / 13))
    step(*batch(3, seed=3))
    alone = step.read()
    step(*batch(3, seed=3))
    assert step.read() == alone


def test_set_lr_decides_how_far_a_step_goes():
    moved = []
    for lr in (0.0, 0.1, 0.2):
        step = step_with("float32")
        step.set_lr(lr)
        step(*batch())
        moved.append((step.model.classifier.bias - tiny_model().classifier.bias).detach())
    assert moved[0].abs().max() == 0
    assert_close(moved[2], 2 * moved[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_step_never_waits_for_a_value(monkeypatch, with_teacher, precision):
    teacher = tiny_model(seed=5).eval() if with_teacher else None
    step, inputs = step_with(precision, teacher=teacher), batch()
    step(*inputs)

    def wait(self, *_):
        raise AssertionError("the step asks for a value")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, wait)
        step(*inputs)
        with pytest.raises(AssertionError, match="asks for a value"):
            step.read()


def test_a_step_needs_its_weights_and_its_state_dict_to_go_on():
    whole, first = step_with("float32"), step_with("float32")
    for k in range(4):
        whole(*batch(seed=k))
    for k in range(2):
        first(*batch(seed=k))
    second, forgetful = step_with("float32"), step_with("float32")
    for step in (second, forgetful):
        step.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for k in (2, 3):
        second(*batch(seed=k))
        forgetful(*batch(seed=k))
    assert same(weights(second), weights(whole))
    assert not same(weights(forgetful), weights(whole))


def test_with_float16_the_penalty_is_not_scaled_away():
    def gamma_after(precision, l1_lambda):
        step = step_with(precision, l1_lambda=l1_lambda)
        if precision == "float16":
            step.scaler.load_state_dict(SCALE | {"_growth_tracker": 0})
        step(*batch())
        assert not torch.equal(step.model.classifier.weight, tiny_model().classifier.weight)
        return step.model.feature[1].weight.detach()

    pulled = gamma_after("float16", 1.0) - gamma_after("float16", 0.0)
    assert_close(pulled, torch.full_like(pulled, -0.1), atol=1e-5, rtol=0)  # −lr·λ·sign(γ)
    assert_close(gamma_after("float16", 1.0), gamma_after("float32", 1.0), atol=2e-3, rtol=0)


def test_with_float16_a_gradient_that_overflows_skips_the_step():
    step = step_with("float16")
    step.scaler.load_state_dict(SCALE | {"scale": 2.0**60, "_growth_tracker": 0})
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    step(*batch())
    assert same({n: p.detach() for n, p in step.model.named_parameters()}, before)
    assert step.scaler.get_scale() == 2.0**59


def test_the_penalty_that_is_handed_over_is_the_one_that_trains():
    calls = []
    step = step_with("float32", l1_lambda=0.3, penalty=lambda *given: calls.append(given))
    step(*batch())
    assert calls == [(step.model, 0.3)]
    without = step_with("float32", l1_lambda=0.0)
    without(*batch())
    assert same(weights(step), weights(without))
