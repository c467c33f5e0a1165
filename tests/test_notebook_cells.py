"""What the notebooks write out: wrong variants of it stop at a check that names the line."""

from types import SimpleNamespace

import pytest
import torch
from cells import changed, execute, find, imported, lab_cells
from tiny import tiny_data, tiny_profile

from models.vgg import VGG

TRAIN, PRUNE = lab_cells("sparsity_train"), lab_cells("vggprune")
PENALTY = "bn.weight.grad += l1_lambda * bn.weight.detach().sign()"


def run_penalty(source: str, monkeypatch) -> None:
    """The cells that check the sub-gradient: against autograd, and in a whole step."""
    namespace = imported(TRAIN, monkeypatch)
    namespace |= {"data": tiny_data(count=60), "profile": tiny_profile(seed=3)}
    execute(source, namespace)
    for mark in ("by_autograd =", "def training_step", "TrainStep(fast"):
        execute(find(TRAIN, mark), namespace)


def test_the_penalty_that_is_written_out_passes_its_checks(monkeypatch):
    run_penalty(find(TRAIN, "def add_subgradient"), monkeypatch)


@pytest.mark.parametrize(
    "wrong",
    [
        PENALTY.replace("+=", "-="),
        PENALTY.replace(".sign()", ""),
        PENALTY.replace(".sign()", ".abs()"),
        PENALTY.replace(".detach()", ".detach().abs()"),
        PENALTY.replace("l1_lambda * ", ""),
        "pass",
    ],
)
def test_a_wrong_subgradient_is_named(wrong, monkeypatch):
    source = changed(find(TRAIN, "def add_subgradient"), PENALTY, wrong)
    with pytest.raises(AssertionError, match="see add_subgradient"):
        run_penalty(source, monkeypatch)


def test_a_penalty_that_overwrites_the_gradient_of_the_loss_shows_in_the_first_step(monkeypatch):
    source = changed(find(TRAIN, "def add_subgradient"), "grad +=", "grad.data =")
    with pytest.raises(AssertionError, match=r"feature\.\d\.weight: the two steps differ"):
        run_penalty(source, monkeypatch)


COPY = find(PRUNE, "def copy_channels")
CHOOSE = find(PRUNE, "def choose_channels")
FIRST = "[: len(out_idx)]"
WRONG_COPIES = [
    ("feature.0.weight", "conv.weight.data[out_idx]", f"conv.weight.data{FIRST}"),
    ("feature.3.weight", "[out_idx][:, in_idx]", "[out_idx][:, : len(in_idx)]"),
    ("feature.1.weight", "bn.weight.data[out_idx]", f"bn.weight.data{FIRST}"),
    ("feature.1.bias", "bn.bias.data[out_idx]", f"bn.bias.data{FIRST}"),
    ("feature.1.running_mean", "bn.running_mean[out_idx]", f"bn.running_mean{FIRST}"),
    ("feature.1.running_var", "bn.running_var[out_idx]", f"bn.running_var{FIRST}"),
    ("feature.1.weight", "new_bn.weight.data = ", "_ = "),
    ("feature.1.bias", "new_bn.bias.data = ", "_ = "),
    ("feature.1.running_mean", "new_bn.running_mean = ", "_ = "),
    ("feature.1.running_var", "new_bn.running_var = ", "_ = "),
    ("feature.1.running_var", "bn.running_var[out_idx]", "bn.running_var[in_idx]"),
    ("feature.1.weight", "bn.weight.data[out_idx]", "bn.bias.data[out_idx]"),
    ("classifier.weight", "classifier.weight.data[:, in_idx]",
     "classifier.weight.data[:, : len(in_idx)]"),
    ("classifier.weight", "slimmed.classifier.weight.data = ", "_ = "),
    ("classifier.bias", "slimmed.classifier.bias.data = ", "_ = "),
]  # fmt: skip
GOES = "order[: round(len(order) * pruning_ratio)]"
WRONG_MASKS = [
    (GOES, "order[round(len(order) * pruning_ratio) :]"),  # 0 and 1 swapped
    (GOES, "order[: round(len(order) * pruning_ratio) - 1]"),
    (GOES, "order[: round(len(order) * pruning_ratio) + 1]"),
    (".abs()", ".clone()"),
]


RECALIBRATE = find(PRUNE, "def recalibrate")
WRONG_REPAIRS = [
    ("len(images) / seen", "0.1"),
    ("deepcopy(network).train()", "deepcopy(network)"),
]


def run_toy(choose: str, copy: str, monkeypatch) -> None:
    """The example that can be checked by eye."""
    namespace = imported(PRUNE, monkeypatch)
    for source in (choose, copy, find(PRUNE, "toy = VGG("), find(PRUNE, "by_hand = {")):
        execute(source, namespace)


def run_real(choose: str, copy: str, monkeypatch, *more: str) -> None:
    """The same on a network whose every number differs, cut by a half, and its logits."""
    namespace = imported(PRUNE, monkeypatch)
    model = VGG([6, 7, "M", 8], num_classes=3).eval()
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.copy_(torch.linspace(0.1, 1, len(tensor)).roll(2))
    for _, bn in model.blocks():
        bn.weight.data[::2] *= -1
    data, profile = tiny_data(), tiny_profile(pruning_ratios=(0.5,), min_channels=1)
    namespace |= {"sources": {0.5: model}, "data": data, "run": SimpleNamespace(profile=profile)}
    namespace["calibration"] = [*data.plain_batches("train", 26)]
    for source in (
        choose,
        copy,
        find(PRUNE, "slims, plans = {}, {}"),
        find(PRUNE, "masked_logits"),
        *more,
    ):
        execute(source, namespace)


@pytest.mark.parametrize("run", [run_toy, run_real])
def test_mask_and_copy_as_they_are_written_out_pass_their_checks(run, monkeypatch):
    run(CHOOSE, COPY, monkeypatch)


@pytest.mark.parametrize(("name", "right", "wrong"), WRONG_COPIES)
def test_a_wrong_copy_is_named_by_the_toy(name, right, wrong, monkeypatch):
    with pytest.raises(AssertionError, match=f"{name} was copied wrongly"):
        run_toy(CHOOSE, changed(COPY, right, wrong), monkeypatch)


@pytest.mark.parametrize(("name", "right", "wrong"), WRONG_COPIES)
def test_a_wrong_copy_is_named_on_the_real_network(name, right, wrong, monkeypatch):
    with pytest.raises(AssertionError, match=r"(feature\.\d|classifier)\.\w+ was copied wrongly"):
        run_real(CHOOSE, changed(COPY, right, wrong), monkeypatch)


@pytest.mark.parametrize("run", [run_toy, run_real])
@pytest.mark.parametrize(("right", "wrong"), WRONG_MASKS)
def test_a_wrong_mask_is_named(right, wrong, run, monkeypatch):
    with pytest.raises(AssertionError, match="cfg"):
        run(changed(CHOOSE, right, wrong), COPY, monkeypatch)


def test_recalibration_as_it_is_written_out_passes_its_check(monkeypatch):
    run_real(CHOOSE, COPY, monkeypatch, RECALIBRATE)


@pytest.mark.parametrize(("right", "wrong"), WRONG_REPAIRS)
def test_a_wrong_recalibration_is_stopped(right, wrong, monkeypatch):
    with pytest.raises(AssertionError, match=r"feature\.\d\.(running|num_batches)"):
        run_real(CHOOSE, COPY, monkeypatch, changed(RECALIBRATE, right, wrong))
