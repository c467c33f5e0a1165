"""A file of torch, read without running code in it: plain values and tensors, or Unreadable."""

import contextlib
import io
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

SAVE_ANEW = (
    "In the program that wrote it, save the weights alone: "
    "torch.save({'cfg': cfg, 'state_dict': model.state_dict()}, path)"
)
PLAIN_NUMBERS = (
    "In the program that wrote it, make them Python's, as in "
    "cfg = [v if v == 'M' else int(v) for v in cfg], and save it again"
)
TO_THE_NEW_FORMAT = (
    "Write it anew, without running code in it: torch.save(torch.load(path, map_location='cpu', "
    "weights_only=True), new_path)"
)
BEFORE_TORCH_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""What such a file begins with: a pickled magic number."""


class Unreadable(Exception):
    """What is wrong with a file, in a few words, and the way out if it is a special one."""

    def __init__(self, what: str, way_out: str = ""):
        super().__init__(what)
        self.way_out = way_out


def read(file: io.BufferedIOBase) -> dict:
    """The content of a file that is a sound archive of plain values and tensors.

    Raises Unreadable for anything else. No code in the file is run.
    """
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        # torch stores its entries as they are, from the first byte of the file on and without
        # attributes. Another archive could inflate, or be read differently by torch than here.
        if any(e.compress_type != zipfile.ZIP_STORED or e.external_attr for e in entries):
            raise Unreadable("is not a checkpoint (not an archive as torch writes it)")
        if min((e.header_offset for e in entries), default=1) != 0:
            raise Unreadable("is damaged or no checkpoint (more than one archive in it)")
        bad = archive.testzip()  # torch itself does not check the CRCs it writes
    except zipfile.BadZipFile as error:
        raise _why_no_archive(file) from error
    except (EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise Unreadable(f"is damaged or no checkpoint ({error})") from error
    if bad:
        raise Unreadable(f"is damaged (wrong checksum in {bad})")
    file.seek(0)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for one reason: not a safe, whole file
        raise _why_unsafe(archive, error) from error
    if not isinstance(content, dict):
        raise Unreadable("is not a checkpoint (not a dictionary)")
    return content


def _why_no_archive(file: io.BufferedIOBase) -> Unreadable:
    """What a file that is no zip archive, as torch has written them since 1.6, may be."""
    file.seek(0)
    beginning = file.read(len(BEFORE_TORCH_1_6))
    if not beginning.startswith(b"\x80"):
        return Unreadable("is damaged or no checkpoint (not an archive of torch)")
    file.seek(0)
    if special := _special(file):
        return special
    if beginning == BEFORE_TORCH_1_6:
        return Unreadable("is in the format of torch before 1.6", TO_THE_NEW_FORMAT)
    return Unreadable("is a pickle that torch.save did not write", SAVE_ANEW)


def _why_unsafe(archive: zipfile.ZipFile, error: Exception) -> Unreadable:
    """Why a sound archive is not one of plain values and tensors, as `error` found out."""
    for name in archive.namelist():
        if name.endswith("data.pkl") and (special := _special(io.BytesIO(archive.read(name)))):
            return special
    # Only the first sentence: torch goes on to recommend a load that runs code.
    reason = re.split(r"\. |\n", str(error) or type(error).__name__)[0]
    return Unreadable(f"can't be read safely ({reason})")


def _special(pickled: io.BufferedIOBase) -> Unreadable | None:
    """What is wrong with pickled content that asks for more than plain values and tensors."""
    for name in _names_in(pickled):
        if name.startswith("numpy."):
            return Unreadable(f"holds numbers of numpy ({name})", PLAIN_NUMBERS)
        if not re.match(r"(torch\.(\w+$|_|storage\.)|collections\.|_codecs\.)", name):
            what = f"holds an object of the class {name}, as a whole pickled model does"
            return Unreadable(what, SAVE_ANEW)
    return None


def _names_in(pickled: io.BufferedIOBase) -> Iterator[str]:
    """The classes and functions that pickles one after the other ask for; none of them is run."""
    texts = ["", ""]
    with contextlib.suppress(Exception):  # it need not be a pickle at all
        while True:
            for operation, value, _ in pickletools.genops(pickled):
                if operation.name == "GLOBAL":
                    yield value.replace(" ", ".")
                elif operation.name == "STACK_GLOBAL":
                    yield ".".join(texts)
                elif isinstance(value, str):
                    texts = [texts[1], value]


def plain(value: object) -> object:
    """Single numbers of numpy and torch, at any depth, as Python's; all else as it is."""
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    single = isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0
    return value.item() if single else value


def odd_types_in(value: object) -> set[type]:
    """The types of all that is nested in `value` and no plain value; each object is looked at
    only once."""
    odd, seen, waiting = set(), set(), [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is dict:
            waiting += [*value.keys(), *value.values()]
        elif type(value) in (list, tuple):
            waiting += value
        elif type(value) not in (str, int, float, bool, type(None)):
            odd.add(type(value))
    return odd


def is_finite(value: object) -> bool:
    """Whether `value` is a plain number that is not NaN and not infinite."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def check_tensor(name: str, value: object, expected: Tensor) -> None:
    """Raise Unreadable unless `value` is a plain, finite tensor of `expected`'s shape and type."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.is_nested:
        raise Unreadable(f"has no readable tensor for {name}")
    if (
        value.layout != torch.strided
        or value.shape != expected.shape
        or value.dtype != expected.dtype
    ):
        raise Unreadable(
            f"has {name} of shape {tuple(value.shape)} and {value.dtype}, its cfg asks for "
            f"{tuple(expected.shape)} and {expected.dtype}"
        )
    # Few numbers, repeated by their strides to look like many, would take memory to check.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise Unreadable(f"has {name} with fewer numbers than its shape says")
    if not value.isfinite().all():
        raise Unreadable(f"has values in {name} that are not finite")
