"""What goes wrong with files: moments of a write at which something happens, and damage."""

import builtins
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

HTML = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>\n" * 40


class Moments:
    """Calls `action` at the `at`-th moment that the disk sees: before and after each open, fsync
    and replace, and in the middle of each write."""

    def __init__(self, patch: pytest.MonkeyPatch, action: Callable[[], None], at: int):
        self.action, self.left, self.met = action, at, []
        patch.setattr(builtins, "open", self._around("open", open, self._in_halves))
        for name in ("fsync", "replace"):
            patch.setattr(os, name, self._around(name, getattr(os, name)))

    def _around(self, name: str, real: Callable, of_result: Callable = lambda x: x) -> Callable:
        def call(*args, **options):
            self._moment(f"before {name}")
            result = of_result(real(*args, **options))
            self._moment(f"after {name}")
            return result

        return call

    def _moment(self, name: str) -> None:
        self.met.append(name)
        self.left -= 1
        if self.left == 0:
            self.action()

    def _in_halves(self, file):
        whole_write = file.write

        class Halves:
            def __getattr__(_, name):
                return getattr(file, name)

            def __enter__(halves):
                return halves

            def __exit__(_, *error):
                file.close()

            def write(_, content):
                middle = len(content) // 2
                whole_write(content[:middle])
                file.flush()
                self._moment("half written")
                return whole_write(content[middle:])

        return Halves()


def at_each_moment(write: Callable[[], None], action: Callable[[], None], at: int) -> bool:
    """Call `write`, and `action` at the `at`-th moment of it; False if it has fewer."""
    with pytest.MonkeyPatch.context() as patch:
        moments = Moments(patch, action, at)
        write()
    return moments.left <= 0


class Trap:
    """Code that unpickling would run."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def damage(whole: bytes, other: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A file as disks, networks and people break it, and what was done; never `whole` itself."""
    at = draw.randrange(len(whole))
    broken = bytearray(whole)
    match draw.choice(["cut", "flip", "flip", "burst", "splice", "insert", "html", "empty"]):
        case "cut":
            return f"cut at {at}", whole[:at]
        case "flip":
            bit = draw.randrange(8)
            broken[at] ^= 1 << bit
            return f"bit {bit} of byte {at} flipped", bytes(broken)
        case "burst":
            length = draw.randrange(1, 600)
            broken[at : at + length] = draw.randbytes(len(broken[at : at + length]))
            what = f"noise of {length} bytes at {at}"
        case "splice":
            broken = whole[:at] + other[draw.choice([at, draw.randrange(len(other))]) :]
            what = f"another checkpoint from {at} on"
        case "insert":
            broken[at:at] = draw.randbytes(draw.randrange(1, 100))
            what = f"bytes inserted at {at}"
        case "html":
            broken = HTML[: 1 + at % len(HTML)]
            what = "a web page"
        case "empty":
            broken = bytes(at % 3)
            what = "empty or zeros"
    if bytes(broken) in (whole, other):
        return damage(whole, other, draw)
    return what, bytes(broken)
