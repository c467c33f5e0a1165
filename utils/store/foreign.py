"""Weights in files that this lab did not save: from the original lab and from other people."""

import io
import re
import zipfile
from reprlib import repr as short

import torch
from torch import Tensor

SAVE_ANEW = (
    "With torch 1.6 or newer, save weights and plain numbers alone: torch.save({'cfg': "
    "[v if v == 'M' else int(v) for v in cfg], 'state_dict': model.state_dict()}, path)"
)
ANOTHER_VERSION = "Move it away and run the notebook that wrote it again, or use that version"


class Unreadable(Exception):
    """What is wrong with a file, in a few words; then the way out, if it is a special one."""


def read_torch(content: bytes) -> object:
    """The plain values and tensors that `torch.save` put into a file; an Exception for anything
    else. No code in it is run."""
    if content.startswith(b"\x80"):  # a pickle without an archive around it, so without checksums
        raise Unreadable("is older than torch 1.6, or not of torch", SAVE_ANEW)
    archive = zipfile.ZipFile(io.BytesIO(content))
    entries = archive.infolist()
    # torch stores its entries as they are, from the first byte of the file on and without
    # attributes. Another archive could inflate, or be read differently by torch than here.
    odd = any(e.compress_type or e.external_attr for e in entries)
    if odd or min(e.header_offset for e in entries) > 0:
        raise Unreadable("is damaged, or not an archive as torch writes it")
    if bad := archive.testzip():  # torch itself does not check the CRCs it writes
        raise Unreadable(f"is damaged (wrong checksum in {bad})")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for one reason: not plain values
        asked = ", ".join(re.findall(r"GLOBAL ([\w.]+)", str(error)))
        what = f"holds other than plain values and tensors ({asked})"
        raise Unreadable(what, SAVE_ANEW) from error


def cfg_and_weights(found: object) -> tuple[list, dict[str, Tensor]]:
    """The cfg, read from the weights if it is missing, and the weights in float32, of `{'cfg',
    'state_dict'}`, a `{'state_dict'}` or bare weights; an Exception if there are none."""
    if isinstance(found, dict) and {"format", "kind"} <= found.keys():
        what = f"is of an older version of this lab (format {short(found['format'])})"
        raise Unreadable(what, ANOTHER_VERSION)
    try:
        cfg, weights = found.get("cfg"), found.get("state_dict", found)
        weights = {  # without what DataParallel and torch.compile put in front of each name
            re.sub(r"^(module\.|_orig_mod\.)+", "", name): _converted(name, t)
            for name, t in weights.items()
        }
    except (AttributeError, TypeError) as error:
        held = short(list(found) if isinstance(found, dict) else found)
        raise Unreadable(f"has no weights by name; it holds {held}", SAVE_ANEW) from error
    # Files from before torch 0.4.1 lack this counter; nothing depends on its value.
    for name in [name for name in weights if name.endswith("running_var")]:
        weights.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return _cfg_of(weights) if cfg is None else [v if v == "M" else int(v) for v in cfg], weights


def _converted(name: str, value: Tensor) -> Tensor:
    """Floating-point numbers of any precision as float32, those of a counter as int64."""
    # Few numbers, repeated by their strides to look like many, would take memory to convert.
    if value.nbytes > value.untyped_storage().nbytes():
        raise Unreadable(f"has no plain tensor for {name}", SAVE_ANEW)
    dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
    return value.detach().to(dtype) if value.is_floating_point() else value


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
    if not convs:
        held = ", ".join(list(weights)[:3])
        what = f"is not the VGG of this lab, feature.0.weight … classifier.bias (it has {held} …)"
        raise Unreadable(what, "Rename its weights, if it is the same network")
    cfg, expected = [], 0
    for number, width in sorted(convs.items()):
        cfg += ["M"] * (number - expected) + [width]
        expected = number + 3
    return cfg
