"""What stands below a blank of the student edition: which line is wrong, and why that matters.

No check holds an answer. The sub-gradient is compared to autograd; a copied network to one in which
every number tells its place, so that a wrong one says where it came from.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coursework.blanks import Wrong, call
from models.vgg import VGG
from utils.sparsity import bn_layers

WHY = {
    "indices of kept channels": "All that is copied goes by these numbers: with others, what stays "
    "is not what was chosen.",
    "BN weight and bias": "γ and β decide what a channel sends on; γ is what the sparsity training "
    "was for.",
    "running mean and variance": "An evaluated network normalises by them: with others the "
    "accuracy falls to guessing.",
    "linear weight": "It has a column for each channel of the last layer: with others, the classes "
    "listen to channels that they have not learned from.",
    "linear bias": "It has a number for each class, and no class goes: without it each loses its "
    "offset.",
}
"""For each blank of copy_channels: why it matters."""
CLASSES = 4
TAG = 10_000


def lambdas(l1_lambdas: Sequence[float]) -> None:
    """Check the blank λ. Raises Wrong."""
    wrong = f"λ: l1_lambdas = {l1_lambdas!r}"
    if not isinstance(l1_lambdas, list | tuple):
        raise Wrong(f"{wrong}: must be a list of numbers. One network is trained for each.")
    for value in l1_lambdas:
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise Wrong(f"{wrong}: {value!r} is no λ. A negative penalty would let γ grow.")
    if 0 not in l1_lambdas:
        raise Wrong(f"{wrong}: 0 is missing. Without it nothing shows what the penalty costs.")
    if not any(l1_lambdas):
        raise Wrong(f"{wrong}: all are 0. Without a penalty no γ goes to zero: nothing to cut.")
    if len(set(l1_lambdas)) < len(l1_lambdas):
        raise Wrong(f"{wrong}: one is there twice. It would be the same training again.")
    print("✓ λ")


def subgradient(add_subgradient: Callable, device: str | torch.device = "cpu", seed=0) -> None:
    """Check what the student's function does to the gradients of a small network. Raises Wrong."""
    blank, l1_lambda, draw = "the sub-gradient", 0.01, torch.Generator().manual_seed(seed)
    model = VGG([6, "M", 5], num_classes=2).double().to(device)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=p.dtype).to(device)
        p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype).to(device)
    gammas = [bn.weight for bn in bn_layers(model)]
    gammas[0].data[0] = 0  # |γ| has a kink there
    gamma, before = torch.cat(gammas).detach(), torch.cat([g.grad for g in gammas])
    penalty = l1_lambda * sum(g.abs().sum() for g in gammas)
    wanted = torch.cat(torch.autograd.grad(penalty, gammas))
    others = [p.grad for p in model.parameters() if all(p is not g for g in gammas)]
    unchanged = [t.clone() for t in (*others, *(p.data for p in model.parameters()))]

    call(blank, add_subgradient, model, l1_lambda)
    if not all(map(torch.equal, (*others, *(p.data for p in model.parameters())), unchanged)):
        raise Wrong(f"{blank}: more than γ.grad was changed. Only γ carries the penalty.")
    added = torch.cat([g.grad for g in gammas]) - before
    mistakes = {
        "nothing was added to γ.grad. Then no γ goes to zero.": 0 * wanted,
        "its sign is wrong. A step goes against the gradient: this drives γ away from 0.": -wanted,
        "the gradient of the loss is gone. The penalty comes on top of it.": wanted - before,
        "λ is not in it. Then every training gets the same penalty.": wanted / l1_lambda,
        "it is as strong as γ is large. That is L2, which leaves no zeros.": l1_lambda * gamma,
        "it is as strong as |γ| is large. The slope of |γ| is not |γ|.": l1_lambda * gamma.abs(),
        "the sign is forgotten. A negative γ is driven away from 0.": 0 * wanted + l1_lambda,
    }
    if not torch.allclose(added, wanted):
        slope = gamma != 0  # at the kink mistakes differ among themselves
        found = [t for t, m in mistakes.items() if torch.allclose(added[slope], m[slope])]
        raise Wrong(f"{blank}: {(*found, 'it is not what autograd finds for λ·Σ|γ|.')[0]}")
    print(f"✓ {blank}: equal to that of autograd")


def copied(
    blank: str, copy_channels: Callable, device: str | torch.device = "cpu", seed: int = 0
) -> None:
    """Check one blank of the student's copy_channels on two small networks. Raises Wrong."""
    for one_left in (False, True):
        model, cfg_mask = _numbered(seed, one_left, device)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        kept = [[c for c, stays in enumerate(m.tolist()) if stays] for m in cfg_mask]
        asked = f"{blank}, where one channel is left" if one_left else blank
        slimmed = call(asked, copy_channels, model, [len(k) for k in kept], cfg_mask)
        if not isinstance(slimmed, VGG):
            raise Wrong(f"{blank}: copy_channels must return the slim network, not {slimmed!r}")
        for name, (rows, columns) in _places(kept)[blank].items():
            if wrong := _wrong_copy(name, slimmed.state_dict()[name], before, rows, columns):
                raise Wrong(f"{asked}: {name} {wrong}.\n{WHY[blank]}")
        if any(not torch.equal(v, before[k]) for k, v in model.state_dict().items()):
            raise Wrong(f"{blank}: the dense network was changed, too. It is cut again later.")
    print(f"✓ {blank}")


def _numbered(seed: int, one_left: bool, device: str | torch.device) -> tuple[VGG, list[Tensor]]:
    """A network whose numbers tell their tensor, row and column (TAG · tensor + 100 · row + column)
    and a mask that keeps the last channel of each layer but not its first, so never the first n."""
    draw = torch.Generator().manual_seed(seed)
    widths = sorted(torch.randint(5, 8, (3,), generator=draw).tolist())  # no number is too large
    model = VGG(widths, num_classes=CLASSES)
    for number, tensor in enumerate(model.state_dict().values(), start=1):
        if tensor.dim() > 0:  # the rest are counters
            matrix = (
                tensor.view(*tensor.shape[:2], -1) if tensor.dim() > 1 else tensor[:, None, None]
            )
            rows, columns = (torch.arange(n) for n in matrix.shape[:2])
            matrix.copy_((TAG * number + 100 * rows[:, None] + columns)[:, :, None])
    cfg_mask = [torch.rand(width, generator=draw) < 0.5 for width in widths]
    for k, mask in enumerate(cfg_mask):
        mask[[0, 1, -1]] = torch.tensor([False, True, True])
        if one_left and k != 1:
            mask[:-1] = False
    return model.to(device), [mask.to(device) for mask in cfg_mask]


def _places(kept: list[list[int]]) -> dict[str, dict[str, tuple[list[int], list[int]]]]:
    """For each blank, the tensors that it fills: which rows and columns they must hold."""
    inputs, classes = [[0, 1, 2], *kept], list(range(CLASSES))

    def bn(*parts: str) -> dict:
        return {
            f"feature.{3 * k + 1}.{p}": (rows, [0]) for k, rows in enumerate(kept) for p in parts
        }

    return {
        "indices of kept channels": {
            f"feature.{3 * k}.weight": (rows, inputs[k]) for k, rows in enumerate(kept)
        },
        "BN weight and bias": bn("weight", "bias"),
        "running mean and variance": bn("running_mean", "running_var"),
        "linear weight": {"classifier.weight": (classes, kept[-1])},
        "linear bias": {"classifier.bias": (classes, [0])},
    }


def _wrong_copy(
    name: str, found: Tensor, before: dict[str, Tensor], rows: list[int], columns: list[int]
) -> str:
    """What is wrong with the tensor that was copied from `before`; nothing, if it is right."""
    if found.dim() != before[name].dim():
        return (
            f"has the shape {tuple(found.shape)}, in the dense network {tuple(before[name].shape)}"
        )
    matrix = found if found.dim() > 1 else found[:, None]
    values, names = matrix.flatten().tolist(), list(before)
    sources = {names[int(v) // TAG - 1] if v >= TAG and v % 1 == 0 else None for v in values}
    if None in sources:
        return "was not copied: it holds what a fresh network begins with"
    if sources != {name}:
        return f"holds numbers of {', '.join(sorted(sources - {name}))}"
    held = [divmod(int(v) % TAG, 100) for v in values]
    held_rows, held_columns = (list(dict.fromkeys(axis)) for axis in zip(*held, strict=True))
    if held_rows != rows:
        swapped = "" if {*held_rows} & {*rows} else ": those whose entry in cfg_mask is 0"
        return f"holds the channels {held_rows} of the dense network, not {rows}{swapped}"
    if held_columns != columns:
        return f"holds the columns {held_columns} of the dense network, not {columns}"
    taps = matrix[0, 0].numel()
    right = [(row, column) for row in rows for column in columns for _ in range(taps)]
    return "" if held == right else "has its numbers in another order"
