"""How a step is computed changes nothing of what is computed, beyond rounding."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import every_save_kept, same, tiny_data, tiny_model, tiny_profile
from torch import Tensor
from torch.testing import assert_close

from utils import engine
from utils.checkpoint import load
from utils.engine import Engine, TrainStep, choose_engine, seconds_per_epoch
from utils.training import fit

FLOAT32 = Engine("cpu", "float32")
SCALE = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def batch(size: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    return next(tiny_data(seed).plain_batches("train", size))


def step_with(how: Engine, *, l1_lambda: float = 0.1, **options) -> TrainStep:
    model = tiny_model().to(how.device)
    return TrainStep(model, tiny_profile(), how, l1_lambda=l1_lambda, **options)


def weights(step: TrainStep) -> dict[str, Tensor]:
    return {k: v.cpu() for k, v in step.model.state_dict().items()}


# --- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_taken_untimed(monkeypatch, precision):
    monkeypatch.setattr(engine, "_time_steps", None)
    found = choose_engine(tiny_model(), tiny_data(), tiny_profile(precision=precision))
    assert found == Engine("cpu", precision)
    assert str(found).startswith(precision)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"float32": 2, "bfloat16": 1}, Engine("cpu", "bfloat16")),
        ({"float32": 1, "bfloat16": 9}, Engine("cpu", "float32")),
        ({"float32": 1, "bfloat16": 0.95}, Engine("cpu", "float32")),  # not worth it
    ],
)
def test_the_fastest_is_chosen_and_exactness_kept_for_small_gains(monkeypatch, seconds, expected):
    def time(model, data, profile, how, size):
        return seconds[how.precision]

    monkeypatch.setattr(engine, "_time_steps", time)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    found = choose_engine(tiny_model(), tiny_data(), tiny_profile(precision="auto"))
    assert found == expected


def test_a_cpu_that_would_emulate_bfloat16_is_not_timed(monkeypatch):
    monkeypatch.setattr(engine, "_time_steps", None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = choose_engine(tiny_model(), tiny_data(), tiny_profile(precision="auto"))
    assert found == FLOAT32


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((6, 1), "float32")],
)
def test_on_cuda_the_generation_decides(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    model = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    assert choose_engine(model, None, tiny_profile(precision="auto")) == Engine("cuda", precision)
    asked_for = tiny_profile(precision="float32")
    assert choose_engine(model, None, asked_for) == Engine("cuda", "float32")


def test_the_timed_probe_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    choose_engine(model, tiny_data(), tiny_profile(precision="auto"))
    assert seconds_per_epoch(model, tiny_data(), tiny_profile(), FLOAT32) > 0
    assert same(dict(model.state_dict()), before)
    assert all(p.grad is None for p in model.parameters())


def test_the_seconds_of_an_epoch_are_those_of_its_steps(monkeypatch):
    monkeypatch.setattr(engine, "_time_steps", lambda *_: 4.0)
    found = seconds_per_epoch(tiny_model(), tiny_data(), tiny_profile(), FLOAT32)
    assert found == pytest.approx(4 * 25 / 10, abs=2)  # and the test images take a moment


def test_the_seconds_of_an_epoch_count_the_teacher(monkeypatch):
    teacher, timed = tiny_model(seed=5), []
    monkeypatch.setattr(engine, "_time_steps", lambda *args: timed.append(args) or 1.0)
    seconds_per_epoch(tiny_model(), tiny_data(), tiny_profile(), FLOAT32, teacher)
    assert timed[0][-1] is teacher


# --- the step ------------------------------------------------------------------------------------


def test_the_memory_layout_changes_nothing_but_rounding():
    step, plain = step_with(FLOAT32), tiny_model()
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
    exact, rough = step_with(FLOAT32), step_with(Engine("cpu", "bfloat16"))
    for k in range(3):
        for step in (exact, rough):
            step(*batch(seed=k))
    assert all(p.dtype == torch.float32 for p in rough.model.parameters())
    assert_close(weights(rough), weights(exact), atol=0.02, rtol=0.02)
    assert not same(weights(rough), weights(exact))  # it was not float32 all the same
    assert rough.read()[0] == pytest.approx(exact.read()[0], rel=0.01)


def test_read_is_the_mean_over_images_since_the_last_call():
    model, step = tiny_model(), step_with(FLOAT32)
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
        step = step_with(FLOAT32)
        step.set_lr(lr)
        step(*batch())
        moved.append((step.model.classifier.bias - tiny_model().classifier.bias).detach())
    assert moved[0].abs().max() == 0
    assert_close(moved[2], 2 * moved[1])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_step_never_waits_for_a_value(monkeypatch, with_teacher, precision):
    teacher = tiny_model(seed=5).eval() if with_teacher else None
    step, inputs = step_with(Engine("cpu", precision), teacher=teacher), batch()
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
    whole, first = step_with(FLOAT32), step_with(FLOAT32)
    for k in range(4):
        whole(*batch(seed=k))
    for k in range(2):
        first(*batch(seed=k))
    second, forgetful = step_with(FLOAT32), step_with(FLOAT32)
    for step in (second, forgetful):
        step.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for k in (2, 3):
        second(*batch(seed=k))
        forgetful(*batch(seed=k))
    assert same(weights(second), weights(whole))
    assert not same(weights(forgetful), weights(whole))


def test_with_float16_the_penalty_is_not_scaled_away():
    def gamma_after(how, l1_lambda):
        step = step_with(how, l1_lambda=l1_lambda)
        if how.precision == "float16":
            step.scaler.load_state_dict(SCALE | {"_growth_tracker": 0})
        step(*batch())
        assert not torch.equal(step.model.classifier.weight, tiny_model().classifier.weight)
        return step.model.feature[1].weight.detach()

    float16 = Engine("cpu", "float16")
    pulled = gamma_after(float16, 1.0) - gamma_after(float16, 0.0)
    assert_close(pulled, torch.full_like(pulled, -0.1), atol=1e-5, rtol=0)  # −lr·λ·sign(γ)
    assert_close(gamma_after(float16, 1.0), gamma_after(FLOAT32, 1.0), atol=2e-3, rtol=0)


def test_with_float16_a_gradient_that_overflows_skips_the_step():
    step = step_with(Engine("cpu", "float16"))
    step.scaler.load_state_dict(SCALE | {"scale": 2.0**60, "_growth_tracker": 0})
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    step(*batch())
    assert same({n: p.detach() for n, p in step.model.named_parameters()}, before)
    assert step.scaler.get_scale() == 2.0**59


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def exact_cuda(monkeypatch):
    """float32 that is float32, and algorithms that repeat."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return Engine("cuda", "float32")


def on_gpu(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return inputs[0].cuda(), inputs[1].cuda()


@needs_cuda
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_replayed_graph_computes_what_eager_steps_do(exact_cuda, with_teacher):
    teacher = tiny_model(seed=5).cuda().eval() if with_teacher else None
    graph, eager = (step_with(exact_cuda, teacher=teacher) for _ in range(2))
    eager.capture = False
    for k, (size, lr) in enumerate([(10, 0.1), (10, 0.1), (5, 0.1), (10, 0.01), (3, 0.01)]):
        for step in (graph, eager):
            step.set_lr(lr)
            step(*on_gpu(batch(size, seed=k)))
    assert graph.graph is not None and eager.graph is None
    assert_close(weights(graph), weights(eager), rtol=1e-5, atol=1e-6)
    assert graph.read() == pytest.approx(eager.read(), rel=1e-5)


@needs_cuda
def test_the_gpu_computes_what_the_cpu_does(exact_cuda):
    gpu, cpu = step_with(exact_cuda), step_with(FLOAT32)
    for k in range(3):
        gpu(*on_gpu(batch(seed=k)))
        cpu(*batch(seed=k))
    assert_close(weights(gpu), weights(cpu), rtol=1e-3, atol=1e-4)


@needs_cuda
def test_a_graph_never_waits_for_the_device(exact_cuda):
    step, inputs = step_with(exact_cuda), on_gpu(batch())
    step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_on_the_gpu_resumes_from_any_epoch(tmp_path, exact_cuda, precision):
    def run(path):
        model, profile = tiny_model().cuda(), tiny_profile(epochs=3, precision=precision)
        fit(model, tiny_data(), profile, l1_lambda=1e-3, checkpoint=path)
        return load(path)

    with every_save_kept() as after_epoch:
        whole = run(tmp_path / "whole.pt")
    for saved in after_epoch[:-1]:
        (tmp_path / "part.pt").write_bytes(saved)
        part = run(tmp_path / "part.pt")
        assert_close(dict(part.state_dict), dict(whole.state_dict), rtol=1e-3, atol=1e-4)
        assert part.history["lr"] == whole.history["lr"]
