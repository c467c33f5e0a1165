"""Device, precision, graph: as asked for, or as the hardware has them; how long an epoch takes."""

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from test_step import batch, step_with, weights
from tiny import file_after_each_epoch, same, tiny_data, tiny_model, tiny_profile, train
from torch import Tensor
from torch.testing import assert_close

from models.vgg import VGG
from utils.engine import (
    Engine,
    choose_engine,
    fast_precision,
    fits_in_memory,
    make_step,
    pick_device,
    seconds_per_epoch,
)
from utils.images.data import ImageData
from utils.profile import PROFILES
from utils.step import TrainStep
from utils.store.checkpoint import load

# --- the device ----------------------------------------------------------------------------------

WHEEL = ["sm_75", "sm_80", "sm_90", "sm_100", "compute_120"]


@pytest.fixture
def gpus(monkeypatch):
    """Lets torch see GPUs of these capabilities; what it is told about them."""
    told = {}

    def see(*capabilities, built_for=WHEEL):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: capabilities[k])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: f"GPU {'ABC'[k]}")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
        monkeypatch.setattr(torch.cuda, "set_device", lambda d: told.update(current=d))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        monkeypatch.setattr("shutil.which", lambda _: None)
        return told

    return see


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((6, 1), WHEEL, False),  # Pascal with a current wheel
        ((7, 0), WHEEL, False),  # a smaller minor
        ((7, 5), WHEEL, True),
        ((8, 9), WHEEL, True),  # a larger minor of the same major
        ((11, 0), WHEEL, False),  # sm_100 is of another major
        ((12, 0), WHEEL, True),
        ((13, 1), WHEEL, True),  # compute_120 is compiled when it is loaded
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["gfx90a"], True),  # AMD
    ],
)
def test_a_gpu_is_taken_if_this_torch_has_kernels_for_it(gpus, capsys, capability, built_for, runs):
    gpus(capability, built_for=built_for)
    assert pick_device() == torch.device("cuda:0" if runs else "cpu")
    said = capsys.readouterr().out
    assert said == "" if runs else ("no kernels for cuda:0, GPU A (sm_" in said and "CPU" in said)


def test_the_first_gpu_that_works_is_taken_and_is_the_current_one(gpus):
    told = gpus((6, 1), (8, 0), (9, 0))
    for name, index in ((None, 1), ("cuda", 1), ("cuda:2", 2), (" CUDA:2 ", 2)):
        assert pick_device(name) == told["current"] == torch.device("cuda", index)
        assert not torch.backends.cudnn.allow_tf32  # float32 is float32


def test_the_parameter_is_asked_before_the_environment(gpus, monkeypatch, capsys):
    gpus((8, 0), (8, 0))
    monkeypatch.setenv("LAB_DEVICE", "cuda:1")
    assert pick_device() == pick_device("") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    assert capsys.readouterr().out == ""  # it was asked for


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:0", "torch .* has no kernels for cuda:0, GPU A .sm_61.; choose one of "),
        ("mps", "choose one of cpu, cuda:1$"),
    ],
)
def test_a_device_that_is_not_there_says_which_are(gpus, monkeypatch, name, said):
    gpus((6, 1), (8, 0))
    with pytest.raises(ValueError, match=f"device_name = '{name}'.*{said}"):
        pick_device(name)
    monkeypatch.setenv("LAB_DEVICE", name)
    with pytest.raises(ValueError, match=f"LAB_DEVICE = '{name}'.*{said}"):
        pick_device()


def test_cuda_is_not_there_if_no_gpu_works(gpus):
    gpus((6, 1))
    with pytest.raises(ValueError, match=r"no kernels for cuda:0.*choose one of cpu$"):
        pick_device("cuda")


def test_without_a_gpu_the_cpu_is_taken_with_a_word_on_what_suits_it(gpus, monkeypatch, capsys):
    gpus()
    assert pick_device() == torch.device("cpu")
    said = capsys.readouterr().out
    assert said.startswith("No CUDA GPU found") and all(
        w in said for w in ("CPU", "quick", "laptop")
    )
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert pick_device() == torch.device("cpu")
    assert re.search("torch .* no CUDA.*pytorch.org.*driver", capsys.readouterr().out)


# --- the precision -------------------------------------------------------------------------------


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
        ((8, 0), "bfloat16"),
        ((7, 5), "float16"),
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
    assert chosen(precision="auto") == Engine("cuda:1", precision, graph)
    assert chosen(precision="float32") == Engine("cuda:1", "float32", True)
    assert chosen(precision="auto", cuda_graph=False) == Engine("cuda:1", precision, False)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_asked_for_is_taken_whatever_the_hardware(monkeypatch, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", None, raising=False)
    found = choose_engine(tiny_model(), tiny_data(), tiny_profile(precision=precision))
    assert found == Engine("cpu", precision)
    assert str(found).startswith(f"{precision} on ")


def test_quick_is_computed_alike_on_every_machine():
    assert PROFILES["quick"].precision == "float32"


# --- how long ------------------------------------------------------------------------------------


def test_measuring_the_seconds_of_an_epoch_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert seconds_per_epoch(model, tiny_data(), tiny_profile()) > 0
    assert same(dict(model.state_dict()), before)
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_the_seconds_of_an_epoch_are_those_of_its_batches_steps_and_test(monkeypatch):
    """By hand: 100 images in batches of 10 that take 1 s to make and 3 to compute, and 10 test
    images, 4 of which take 0.5 s to make and 0.7 to compute. Each first one takes longer."""
    now, first = [0.0], {"make": 50, "step": 100, "forward": 70}
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def takes(seconds, what, work):
        def slow(*args, **options):
            now[0] += seconds + first.pop(what, 0)
            return work(*args, **options)

        return slow

    def made(seconds, batches):
        def slowly(*args, **options):
            for made_now in batches(*args, **options):
                now[0] += seconds + first.pop("make", 0)
                yield made_now

        return slowly

    monkeypatch.setattr(ImageData, "train_batches", made(1, ImageData.train_batches))
    monkeypatch.setattr(ImageData, "plain_batches", made(0.5, ImageData.plain_batches))
    monkeypatch.setattr(TrainStep, "compute", takes(3, "step", TrainStep.compute))
    model, forward = tiny_model(), VGG.forward
    tested = takes(0.7, "forward", forward)
    monkeypatch.setattr(
        VGG, "forward", lambda self, x: (forward if self.training else tested)(self, x)
    )
    profile = tiny_profile(test_batch_size=4)
    found = seconds_per_epoch(model, tiny_data(count=100), profile)
    assert found == pytest.approx(100 * (1 + 3) / 10 + 10 * (0.5 + 0.7) / 4)


@pytest.mark.parametrize("count", [4, 26])
def test_a_set_smaller_than_the_batch_counts_as_what_it_is(monkeypatch, count):
    monkeypatch.setattr("time.perf_counter", iter(range(100)).__next__)  # a second each
    found = seconds_per_epoch(tiny_model(), tiny_data(count=count), tiny_profile(batch_size=100))
    assert found == pytest.approx(1 + 1)


# --- a CUDA graph that is refused ----------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """The streams of CUDA, as stand-ins; which one is current in the end."""
    now = {"current": Stream()}
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now["current"])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.update(current=stream))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    return now


class Stream:
    def wait_stream(self, other):
        pass


def refused(monkeypatch, fake_cuda, error):
    @contextlib.contextmanager
    def capture(graph, stream, **_):
        fake_cuda["current"] = stream
        yield
        raise error

    monkeypatch.setattr(torch.cuda, "graph", capture)
    return make_step(tiny_model(), tiny_profile(), Engine("cpu", "float32", True), l1_lambda=0.1)


def while_ending(cause: Exception) -> RuntimeError:
    """What ending a broken capture raises, `cause` having broken it."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = cause
    return error


@pytest.mark.parametrize("error", [RuntimeError, while_ending])
def test_a_graph_that_is_refused_says_why_and_what_to_set(monkeypatch, fake_cuda, error):
    cause = RuntimeError("a kernel that waits")
    step = refused(monkeypatch, fake_cuda, cause if error is RuntimeError else error(cause))
    before = step_with("float32")
    with pytest.raises(RuntimeError, match=r"a kernel that waits; .* cuda_graph = False"):
        step(*batch())
    assert same(weights(step), weights(before))  # the warm-up left nothing behind
    assert same(step.state_dict(), before.state_dict())


@pytest.mark.parametrize("hidden", [False, True])
def test_a_gpu_too_small_for_the_graph_is_told_by_the_batch_size(monkeypatch, fake_cuda, hidden):
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    step = refused(monkeypatch, fake_cuda, while_ending(error) if hidden else error)
    with pytest.raises(MemoryError, match="batch_size = 9: "), fits_in_memory("batch_size", 9):
        step(*batch())


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
