"""Apple's GPU without a Mac: every tensor of the lab's way is one that says it lies on "mps", and
refuses what that device refuses: float64, operators without a kernel there, tensors elsewhere."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
from tiny import tiny_data, tiny_model, tiny_profile
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from utils import cost, export
from utils.choosing import judge
from utils.engine import Engine, choose_engine, pick_device, seconds_per_epoch
from utils.pruning import mask, plan_pruning, slim
from utils.repair import slim_repaired
from utils.run.lab import Trained
from utils.sparsity import is_collapsed, scaling_factors, swing
from utils.store.checkpoint import History, load
from utils.training import evaluate, fit

MPS = torch.device("mps:0")
MAY_MIX = ("aten.copy_", "aten.empty_like", "aten.index.", "aten.index_put_", "aten._to_copy")
"""Take a tensor of the CPU beside one of the GPU."""


class OnMac(Tensor):
    """A tensor that is on "mps" for whoever asks it in Python; its numbers are in `inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: MPS)

    @staticmethod
    def __new__(cls, inner):
        lies = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device="cpu", **lies
        )

    def __init__(self, inner):
        self.inner = inner

    def to(self, *args, **options):
        options.pop("copy", None)  # off the GPU always one
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **options)
        how = {"dtype": dtype or self.dtype} | ({"memory_format": layout} if layout else {})
        if device is None or device.type == "mps":
            return super().to(**how)
        return self.detach().inner.clone().to(device, **how)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, _, args=(), options=None):
        return computed(operator, args, options or {})


class Mac(TorchDispatchMode):
    def __torch_dispatch__(self, operator, _, args=(), options=None):
        return computed(operator, args, options or {})


def computed(operator, args, options):
    """What `operator` gives; on the GPU, if an input lies there or the result is to."""
    inputs = [t for t in tree_leaves((args, options)) if isinstance(t, Tensor)]
    on_mac = any(isinstance(t, OnMac) for t in inputs)
    plain_args, plain_options = tree_map_only(OnMac, lambda t: t.inner, (args, options))
    if options.get("device") is not None:
        on_mac = torch.device(options["device"]).type == "mps"
        plain_options["device"] = "cpu" if on_mac else options["device"]
    result = operator(*plain_args, **plain_options)
    if not on_mac:
        return result
    name = str(operator)
    assert runs_on_mps(name.removeprefix("aten.").removesuffix(".default")), f"{name}: no kernel"
    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    double = torch.float64 in (options.get("dtype"), *(t.dtype for t in (*inputs, *outputs)))
    assert not double, f"{name}: float64 on Apple's GPU"
    elsewhere = [t for t in inputs if not isinstance(t, OnMac) and t.dim() > 0]
    assert not elsewhere or name.startswith(MAY_MIX), f"{name}: tensors on two devices"
    on_mac_again = tree_map_only(Tensor, OnMac, result)
    return return_and_correct_aliasing(operator, args, options, on_mac_again)


@cache
def _operators() -> dict[str, str]:
    """Each operator's entry in the list that torch itself is built from."""
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    return {e.partition("(")[0]: e for e in re.split(r"(?m)^- func: ", file.read_text())[1:]}


def runs_on_mps(name: str) -> bool:
    entry = _operators()[name]
    if delegate := re.search(r"structured_delegate: (\S+)", entry):
        return runs_on_mps(delegate[1])
    kernels = re.findall(r"(?m)^    ([\w, ]+):", entry)  # none: made of other operators
    return not kernels or re.search(r"\b(MPS|Composite\w+)\b", " ".join(kernels)) is not None


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # a tensor like this can't be in it
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Mac():
        yield MPS
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def numbers(result):
    return vars(result) if isinstance(result, History) else list(map(float, result))


def test_the_whole_way_runs_on_apples_gpu_and_ends_as_on_the_cpu(mac, monkeypatch, tmp_path):
    def way(device):
        data, profile = tiny_data().to(device), tiny_profile(epochs=2)
        dense, file = tiny_model().to(device), tmp_path / f"{device.type}.safetensors"
        history = fit(dense, data, profile, l1_lambda=0.01, checkpoint=file)
        trained = {0.01: Trained(dense, history)}
        plan = plan_pruning(dense, 0.5)
        assert judge(trained, {0.01: plan}, data.train_labels, 0.9)[0.01].reason
        batches = list(data.plain_batches("train", 10))
        slimmed = slim_repaired(dense, plan, batches)
        assert is_collapsed(scaling_factors(slimmed), swing(0.1, 1.0, 0.9))
        assert_close(
            mask(dense, plan).eval()(batches[0][0]).tolist(),
            slim(dense, plan).eval()(batches[0][0]).tolist(),
        )
        tuned = fit(slimmed, data, profile, teacher=dense)
        test = evaluate(slimmed, data.plain_batches("test", 4))
        assert seconds_per_epoch(slimmed, data, profile) > 0
        assert cost.macs(slimmed) < cost.macs(dense)
        return history, tuned, test, [t.tolist() for t in load(file).state_dict.values()]

    found, expected = way(mac), way(torch.device("cpu"))
    for on_mac, on_cpu in zip(found[:3], expected[:3], strict=True):
        assert_close(numbers(on_mac), numbers(on_cpu), rtol=1e-4, atol=1e-4)
    for on_mac, on_cpu in zip(found[3], expected[3], strict=True):
        assert_close(on_mac, on_cpu, rtol=1e-4, atol=1e-5)


def test_what_is_exported_lies_on_the_cpu(mac, monkeypatch, tmp_path):
    exported = []

    def stop(model, *_, **__):
        exported.extend(model.state_dict().values())
        raise InterruptedError

    monkeypatch.setattr(torch.onnx, "export", stop)
    with pytest.raises(InterruptedError):
        export.export_onnx(tiny_model().to(mac).eval(), tmp_path / "x.onnx")
    assert exported and not any(isinstance(t, OnMac) for t in exported)


def test_weights_and_images_are_not_channels_last_there(mac):
    """torch's gradients of BN are wrong in that layout on Apple's GPU, its open fault."""
    model = tiny_model().to(mac)
    fit(model, tiny_data().to(mac), tiny_profile(epochs=1))
    assert all(p.is_contiguous() for p in model.parameters())


def test_it_is_taken_only_when_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device() == torch.device("cpu")
    assert "On a Mac: LAB_DEVICE=mps" in capsys.readouterr().out
    assert pick_device("mps") == torch.device("mps")
    assert "not run the lab on a Mac" in capsys.readouterr().out


def test_it_computes_in_float32_alone(mac):
    model, data = tiny_model().to(mac), tiny_data()
    assert choose_engine(model, data, tiny_profile(precision="auto")) == Engine("mps:0", "float32")
    for precision in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match=f"precision = '{precision}'.*LAB_DEVICE=cpu"):
            choose_engine(model, data, tiny_profile(precision=precision))


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda t: t.double(), "float64"),
        (lambda t: torch.zeros(3, dtype=torch.float64, device=MPS), "float64"),
        (lambda t: torch.linalg.eigvals(t), "no kernel"),
        (lambda t: t + torch.ones(3, 3), "two devices"),
    ],
)
def test_this_stand_in_refuses_what_a_mac_refuses(mac, work, said):
    with pytest.raises(AssertionError, match=said):
        work(torch.eye(3).to(mac))
