"""How a step is computed: decided by the hardware alone, and a refused CUDA graph is no harm."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_step import batch, step_with, weights
from tiny import file_after_each_epoch, same, tiny_data, tiny_model, tiny_profile, train
from torch import Tensor
from torch.testing import assert_close

from utils.engine import (
    Engine,
    GraphedStep,
    choose_engine,
    fast_precision,
    make_step,
    seconds_per_epoch,
)
from utils.profile import PROFILES
from utils.step import TrainStep
from utils.store.checkpoint import load

# --- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has", "precision"),
    [
        ("avx512_bf16 avx512_fp16 amx_bf16", "bfloat16"),  # Sapphire Rapids
        ("avx512_bf16 avx512_fp16", "float32"),  # the same in a machine that hides AMX
        ("avx512_bf16", "bfloat16"),  # Zen 4, Cooper Lake
        ("avx512_f avx512_vnni", "float32"),
        ("avx2", "float32"),
        ("", "float32"),
    ],
)
def test_on_a_cpu_its_instructions_decide(monkeypatch, has, precision):
    names = ("amx_bf16", "avx512_bf16", "avx512_fp16", "avx512_f", "avx512_vnni", "avx2")
    found = {name: name in has.split() for name in names} | {"cpu_name": "some", "l2": 2**21}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert fast_precision("cpu") == fast_precision(torch.device("cpu")) == precision
    model, auto = tiny_model(), tiny_profile(precision="auto")
    assert {choose_engine(model, tiny_data(), auto) for _ in range(40)} == {
        Engine("cpu", precision)
    }


def test_an_older_torch_that_can_not_tell_trains_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_precision("cpu") == "float32"


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((10, 0), "bfloat16"),
        ((9, 0), "bfloat16"),
        ((8, 0), "bfloat16"),
        ((7, 5), "float16"),
        ((7, 0), "float16"),
        ((6, 1), "float32"),
    ],
)
def test_on_cuda_the_generation_of_the_models_own_device_decides(
    monkeypatch, capability, precision
):
    def get_device_capability(device):
        return capability if device == torch.device("cuda:1") else (3, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    where = SimpleNamespace(device=torch.device("cuda:1"))
    model = SimpleNamespace(parameters=lambda: iter([where]))

    def chosen(**changes):
        return choose_engine(model, None, tiny_profile(**changes))

    graph = precision != "float16"
    assert chosen(precision="auto") == Engine("cuda", precision, graph)
    assert chosen(precision="float32") == Engine("cuda", "float32", True)
    assert chosen(precision="auto", cuda_graph=False) == Engine("cuda", precision, False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_taken_whatever_the_hardware(monkeypatch, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    found = choose_engine(tiny_model(), tiny_data(), tiny_profile(precision=precision))
    assert found == Engine("cpu", precision)
    assert str(found).startswith(f"{precision} channels_last on ")


def test_quick_is_computed_alike_on_every_machine():
    assert PROFILES["quick"].precision == "float32"


# --- how long ------------------------------------------------------------------------------------


def test_measuring_the_seconds_of_an_epoch_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert seconds_per_epoch(model, tiny_data(), tiny_profile()) > 0
    assert same(dict(model.state_dict()), before)
    assert all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.parametrize(("images", "seconds"), [(26, 26 / 10 + 1), (1000, 1000 / 10 + 1)])
def test_the_seconds_of_an_epoch_are_those_of_its_steps_and_of_its_test(
    monkeypatch, images, seconds
):
    clock = iter(range(1000))  # between two looks a second passes
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found = seconds_per_epoch(tiny_model(), tiny_data(count=images), tiny_profile())
    assert found == pytest.approx(seconds)


# --- a CUDA graph that is refused ----------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """The streams of CUDA, as names; what is current in the end."""
    now = {"current": "the usual stream"}
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now["current"])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.update(current=stream))
    return now


def refused(monkeypatch, fake_cuda, error):
    def capture(step, images, labels):
        TrainStep.__call__(step, images, labels)  # warms up
        fake_cuda["current"] = "the stream of the capture"
        raise error

    monkeypatch.setattr(GraphedStep, "_capture", capture)
    return make_step(tiny_model(), tiny_profile(), Engine("cpu", "float32", True), l1_lambda=0.1)


def test_where_a_graph_is_refused_each_step_is_launched_by_itself(monkeypatch, fake_cuda, capsys):
    error = RuntimeError("operation not permitted when stream is capturing\nCompile with …")
    step, plain = refused(monkeypatch, fake_cuda, error), step_with("float32")
    for k in range(3):
        step(*batch(seed=k))
        plain(*batch(seed=k))
    assert same(weights(step), weights(plain))  # the warm-up left nothing behind
    assert same(step.state_dict(), plain.state_dict())
    assert step.read() == plain.read()
    assert fake_cuda["current"] == "the usual stream"
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("no CUDA graph here (operation not permitted when stream is capturing)")


def while_ending(cause: Exception) -> RuntimeError:
    """What ending a broken capture raises, `cause` having broken it."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


def test_the_reason_for_a_refusal_is_the_one_that_came_first(monkeypatch, fake_cuda, capsys):
    step = refused(monkeypatch, fake_cuda, while_ending(RuntimeError("a kernel that waits")))
    step(*batch())
    assert "no CUDA graph here (a kernel that waits)" in capsys.readouterr().out


@pytest.mark.parametrize("hidden", [False, True])
def test_a_gpu_that_is_too_small_for_the_graph_is_an_error(monkeypatch, fake_cuda, hidden):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    step = refused(monkeypatch, fake_cuda, while_ending(error) if hidden else error)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="out of memory"):
        step(*batch())
    assert fake_cuda["current"] == "the usual stream"


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def exact_cuda(monkeypatch):
    """float32 that is float32, and algorithms that repeat."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def gpu_step(*, graph: bool, **options) -> TrainStep:
    how = Engine("cuda", "float32", graph)
    return make_step(tiny_model().cuda(), tiny_profile(), how, l1_lambda=0.1, **options)


def on_gpu(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return inputs[0].cuda(), inputs[1].cuda()


def assert_like(step: TrainStep, other: TrainStep, **tolerances) -> None:
    found, wanted = ({k: v.cpu() for k, v in weights(s).items()} for s in (step, other))
    assert_close(found, wanted, **tolerances)


@pytest.mark.cuda
@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_replayed_graph_computes_what_single_launches_do(exact_cuda, with_teacher):
    teacher = tiny_model(seed=5).cuda().eval() if with_teacher else None
    graphed, eager = (gpu_step(graph=graph, teacher=teacher) for graph in (True, False))
    for k, (size, lr) in enumerate([(10, 0.1), (10, 0.1), (5, 0.1), (10, 0.01), (3, 0.01)]):
        for step in (graphed, eager):
            step.set_lr(lr)
            step(*on_gpu(batch(size, seed=k)))
    assert graphed.graph is not None
    assert_like(graphed, eager, rtol=1e-5, atol=1e-6)
    assert graphed.read() == pytest.approx(eager.read(), rel=1e-5)


@pytest.mark.cuda
def test_the_gpu_computes_what_the_cpu_does(exact_cuda):
    gpu, cpu = gpu_step(graph=True), step_with("float32")
    for k in range(3):
        gpu(*on_gpu(batch(seed=k)))
        cpu(*batch(seed=k))
    assert_like(gpu, cpu, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
def test_a_graph_never_waits_for_the_device(exact_cuda):
    step, inputs = gpu_step(graph=True), on_gpu(batch())
    step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_on_the_gpu_resumes_from_any_epoch(tmp_path, exact_cuda, precision):
    how = {"model": tiny_model().cuda(), "profile": tiny_profile(precision=precision)}
    *after_epoch, _ = file_after_each_epoch(tmp_path / "whole.pt", **how)
    whole = load(tmp_path / "whole.pt")
    for saved in after_epoch:
        (tmp_path / "part.pt").write_bytes(saved)
        train(tmp_path / "part.pt", **how | {"model": tiny_model().cuda()})
        part = load(tmp_path / "part.pt")
        assert_close(part.state_dict, whole.state_dict, rtol=1e-3, atol=1e-4)
        assert part.history["lr"] == whole.history["lr"]
