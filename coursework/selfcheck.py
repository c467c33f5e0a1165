"""What stands below a blank of the student edition: which line is wrong, and why that matters.

No check holds an answer: autograd finds the sub-gradient, and every number of a network that is
copied tells its place."""

import inspect
import linecache
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coursework.blanks import BLANKS
from models.vgg import VGG
from utils.run.identity import RunError
from utils.sparsity import bn_layers
from utils.store.files import write_whole

WRITTEN = Path(__file__).with_name("copy_channels.py")  # the student's own function, for `slim`
COPIED = {blank.name: blank for blank in BLANKS if blank.fills}
CLASSES = 4


class Wrong(Exception):
    """What is wrong with a blank, in words: a notebook shows these instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [textwrap.fill(line, 96) for line in str(self).splitlines()]


def start() -> None:
    """Let this notebook say in words which blank is still empty, or which notebook comes first."""

    def say(shell, kind, error, trace, tb_offset=None) -> None:
        text = str(error) if isinstance(error, RunError) else still_empty(error)
        shell.showtraceback((Wrong, Wrong(text), None) if text else (kind, error, trace))

    shell = sys.modules["IPython"].get_ipython()  # who calls this runs in a notebook
    shell.set_custom_exc((NotImplementedError, RunError), say)
    print(f"{len(BLANKS)} blanks are yours: YOUR CODE HERE. Below each stands a check.")


@contextmanager
def in_words(blank: str) -> Iterator[None]:
    """Make one sentence, Wrong, of whatever a student's function does or leaves inside."""
    try:
        yield
    except Wrong as error:
        raise Wrong(f"{blank}: {error}") from None
    except Exception as error:
        line = "".join(_cell_until(error)[-1:]).strip()
        where = f"stops at\n{line}" if line else "can't be checked:"
        said = f"{blank}: your function {where}\n{type(error).__name__}: {error}"
        raise Wrong(still_empty(error) or said) from None


def still_empty(error: Exception) -> str:
    """Which blank raised `error`, and what to do; nothing if none did."""
    lines = _cell_until(error)
    titles = [line.strip("# \n") for line in lines if "# Blank " in line]
    if not titles or "raise NotImplementedError" not in lines[-1]:
        return ""
    way_out = "Write your own in place of raise NotImplementedError(), or pass to try the others;"
    return f"{titles[-1]} is still empty.\n{way_out} run that cell again, then its check."


def _cell_until(error: Exception) -> list[str]:
    """The lines of the cell that led to `error`, up to the one that did."""
    frames = traceback.walk_tb(error.__traceback__)  # those of a cell, not torch's or ours
    cells = [(f, line) for f, line in frames if f.f_globals.get("__name__") == "__main__"]
    return [text for f, n in cells[-1:] for text in linecache.getlines(f.f_code.co_filename)[:n]]


def lambdas(l1_lambdas: list[float]) -> None:
    """Check the blank λ. Raises Wrong."""
    with in_words(f"λ: l1_lambdas = {l1_lambdas!r:.60}"):
        if not isinstance(l1_lambdas, list | tuple):
            raise Wrong("must be a list of numbers, [0, …, …]. One network is trained for each.")
        for value in l1_lambdas:
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise Wrong(f"{value!r:.60} is no λ. A negative penalty would let γ grow.")
            if value >= 1:
                raise Wrong("1 or more is too strong: every γ is off within a few steps.")
        if 0 not in l1_lambdas:
            raise Wrong("0 is missing. Without it nothing shows what the penalty costs.")
        if len(different := {f"{value:g}" for value in l1_lambdas}) < len(l1_lambdas):
            raise Wrong("one is there twice. It would be the same training again.")
        if len(different) < 3:
            raise Wrong("two above 0 are asked for. One alone does not show what is too much.")
    print("✓ λ")


def subgradient(add_subgradient: Callable, device: str | torch.device = "cpu", seed=0) -> None:
    """Check what the student's function does to the gradients of a small network. Raises Wrong."""
    draw = torch.Generator().manual_seed(seed)
    l1_lambda = 0.01 + torch.rand((), generator=draw).item() / 100  # none that one would type in
    model = VGG([6, "M", 5], num_classes=2).to(device)
    for p in model.parameters():
        p.data, p.grad = (torch.randn(p.shape, generator=draw).to(device) for _ in range(2))
    gammas = [bn.weight for bn in bn_layers(model)]
    gammas[0].data[0] = 0  # |γ| has a kink there
    gamma, loss = torch.cat(gammas).detach(), torch.cat([g.grad for g in gammas])
    penalty = l1_lambda * sum(g.abs().sum() for g in gammas)
    slope = torch.cat(torch.autograd.grad(penalty, gammas))
    mistakes = {
        "nothing was added to γ.grad. Then no γ goes to zero.": 0 * slope,
        "its sign is wrong. A step goes against the gradient: this drives γ away from 0.": -slope,
        "the gradient of the loss is gone. The penalty comes on top of it.": slope - loss,
        "λ is not in it. Then every training gets the same penalty.": slope / l1_lambda,
        "it is as strong as γ is large. That is L2, which leaves no zeros.": l1_lambda * gamma,
        "it is as strong as |γ| is large. The slope of |γ| is not |γ|.": l1_lambda * gamma.abs(),
        "the sign is forgotten. A negative γ is driven away from 0.": 0 * slope + l1_lambda,
    }
    before = _numbers(model)
    with in_words("the sub-gradient"):
        add_subgradient(model, l1_lambda)
        own = {f"{n}.grad" for n, p in model.named_parameters() if any(p is g for g in gammas)}
        if more := {name for name, *_ in before ^ _numbers(model)} - own:
            raise Wrong(f"more than γ.grad was changed: {min(more)}. Only γ carries the penalty.")
        found = torch.cat([g.grad for g in gammas])
        if not torch.allclose(found, loss + slope, atol=1e-6):
            on = gamma != 0  # at the kink mistakes differ among themselves
            for said, added in mistakes.items():
                if torch.allclose(found[on], (loss + added)[on], atol=1e-6):
                    raise Wrong(said)
            raise Wrong("it is not what autograd finds for λ·Σ|γ|.")
    print("✓ the sub-gradient: equal to that of autograd")


def _numbers(model: VGG, cfg_mask: Iterable[Tensor] = ()) -> set[tuple]:
    """All tensors of a network, gradients and masks too, by name, as values to be compared."""
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    tensors = model.state_dict() | gradients | {f"cfg_mask[{k}]": m for k, m in enumerate(cfg_mask)}
    return {(k, t.dtype, t.device, str(t.tolist())) for k, t in tensors.items() if t is not None}


def copied(blank: str, copy_channels: Callable, device="cpu", seed: int = 0) -> None:
    """Check one blank of the student's copy_channels on a small network. Raises Wrong."""
    model, cfg_mask, origin = _numbered(seed, device)
    masks, before = [mask.tolist() for mask in cfg_mask], _numbers(model, cfg_mask)
    with in_words(blank):
        slimmed = copy_channels(model, [sum(mask) for mask in masks], cfg_mask)
        if not isinstance(slimmed, VGG):
            raise Wrong(f"copy_channels must return the slim network, not {slimmed!r:.60}")
        whole, found = model.state_dict(), slimmed.state_dict()
        for name in [name for name in whole if re.fullmatch(COPIED[blank].fills, name)]:
            if wrong := _wrong_copy(name, found[name], whole[name], masks, origin):
                raise Wrong(f"{name} {wrong}.\n{COPIED[blank].why}")
        for tensor in found.values():
            tensor.zero_()  # as training would: what shares its memory changes, too
        if changed := before ^ _numbers(model, cfg_mask):
            why = "It is cut again: .clone() what you copy, or both change together."
            raise Wrong(f"the dense network was changed, too: {min(changed)[0]}. {why}")
    print(f"✓ {blank}")


def keep(copy_channels: Callable, device="cpu") -> None:
    """Write the student's function down for `slim`, if it is right by itself. Raises Wrong."""
    with in_words(f"{WRITTEN.name}, where all that it needs must stand inside the function"):
        source = f"import torch\nfrom models.vgg import VGG\n\n{inspect.getsource(copy_channels)}"
        for blank in COPIED:
            copied(blank, kept_copy_channels(device, source), device)
    write_whole(WRITTEN, source.encode("utf-8"))
    print(f"{WRITTEN}: your function, for what follows")


def kept_copy_channels(device: str | torch.device, source: str = "") -> Callable | None:
    """The student's own function; None if none was kept yet."""
    if not source and not WRITTEN.exists():
        return None
    namespace = {"device": device}  # as in the notebook
    exec(compile(source or WRITTEN.read_text("utf-8"), str(WRITTEN), "exec"), namespace)
    return namespace["copy_channels"]


def _numbered(seed: int, device) -> tuple[VGG, list[Tensor], dict[float, tuple]]:
    """A network, a mask, and where each number stands: its tensor, row and column."""
    draw = torch.Generator().manual_seed(seed)
    widths = sorted(torch.randint(5, 8, (3,), generator=draw).tolist())  # no number is too large
    model, origin = VGG(widths, num_classes=CLASSES), {}
    for name, tensor in model.state_dict().items():
        matrix = tensor[:, None] if tensor.dim() == 1 else tensor
        for place in np.ndindex(matrix.shape[:2]) if tensor.dim() else ():  # the rest: counters
            number = 10_000 + 10 * len(origin)  # no other's double, half or neighbour
            matrix[place], origin[number] = number, (name, *place)
    cfg_mask = [torch.rand(width, generator=draw) < 0.5 for width in widths]
    for mask in cfg_mask:
        mask[[0, 1, -1]] = torch.tensor([False, True, True])  # so never the first n
    cfg_mask[1][:-1] = False  # one channel is left
    return model.to(device), [mask.to(device) for mask in cfg_mask], origin


def _wrong_copy(name: str, found: Tensor, whole: Tensor, masks: list, origin: dict) -> str:
    """What is wrong with what was copied from the tensor `whole`; nothing, if it is right."""
    kind, wanted = (f"{tensor.dtype} on {tensor.device}" for tensor in (found, whole))
    if kind != wanted:
        return f"is {kind}, in the dense network {wanted}"
    values = found.flatten().tolist()
    if foreign := [v for v in values if v not in origin]:
        if all(abs(v) < 100 for v in foreign):
            return "was not copied: it holds what a fresh network begins with"
        return f"holds {foreign[0]:g}, which the dense network has nowhere"
    held = [origin[v] for v in values]
    if others := {place[0] for place in held} - {name}:
        return f"holds numbers of {min(others)}"
    layer = int(name.split(".")[1]) // 3 if name.startswith("feature") else -1
    axes = [*masks, [True] * CLASSES][layer], [[True] * 3, *masks][layer]
    rows, columns = ([k for k, stays in enumerate(axis) if stays] for axis in axes)
    columns = columns if whole.ndim > 1 else [0]
    for what, axis, wanted in (("channels", 1, rows), ("columns", 2, columns)):
        got = list(dict.fromkeys(place[axis] for place in held))
        if got != wanted:
            swapped = "" if {*got} & {*wanted} else ": those whose entry in cfg_mask is 0"
            return f"holds the {what} {got} of the dense network, not {wanted}{swapped}"
    shape = (len(rows), len(columns), *whole.shape[2:])[: whole.ndim]
    if found.shape != shape:
        return f"has the shape {tuple(found.shape)}, not {shape}"
    right = [(name, r, c) for r in rows for c in columns for _ in range(whole.shape[2:].numel())]
    return "" if held == right else "has its numbers in another order"
