"""Weights that this lab did not save: from the original lab and from other people."""

import re
from reprlib import repr as short

import torch
from torch import Tensor

from utils.store.archive import SAVE_ANEW, Unreadable, plain

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
"""What DataParallel and torch.compile put in front of the name of each weight."""


def as_checkpoint(content: dict) -> dict:
    """The 'kind', 'cfg' and 'state_dict' of a file without a format: `{'cfg', 'state_dict'}`, a
    `{'state_dict'}` or bare weights, their names with or without `module.` in front.

    A cfg that is missing is read from the weights. Raises Unreadable if there are none.
    """
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()
    ):
        found = ", ".join(map(short, list(content)[:5]))
        raise Unreadable(f"is not a checkpoint (no weights by name; it holds {found})", SAVE_ANEW)
    if all(map(WRAPPERS.match, weights)):
        weights = {WRAPPERS.sub("", name): value for name, value in weights.items()}
    # Files from before torch 0.4.1 lack this counter; nothing depends on its value.
    for name in [name for name in weights if name.endswith("running_var")]:
        weights.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    cfg = content.get("cfg")
    cfg = _cfg_of(weights) if cfg is None else _whole_numbers(plain(cfg))
    return {"kind": "original lab", "cfg": cfg, "state_dict": weights}


def _cfg_of(weights: dict[str, Tensor]) -> list[int | str]:
    """The cfg that the shapes and numbers of the layers tell.

    Convolution, BN and ReLU have a number each, so one that is left out is a max-pool. (One after
    the last convolution would leave no trace; the VGGs of the original lab have none there.)
    """
    convs = {
        int(found[1]): value.shape[0]
        for name, value in weights.items()
        if (found := re.fullmatch(r"feature\.(\d{1,3})\.weight", name)) and value.dim() == 4
    }
    cfg, expected = [], 0
    for number, width in sorted(convs.items()):
        cfg += ["M"] * (number - expected) + [width]
        expected = number + 3
    if not cfg:
        raise Unreadable(
            f"is not the VGG of this lab (its weights are {', '.join(list(weights)[:3])} …; needed "
            "are feature.0.weight … classifier.bias)",
            "Only this VGG can be read; rename the weights if it is the same network",
        )
    return cfg


def _whole_numbers(cfg: object) -> object:
    """`cfg` as a list, its whole floats as ints."""
    if not isinstance(cfg, list | tuple):
        return cfg
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in cfg]
