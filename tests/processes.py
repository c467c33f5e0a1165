"""Functions in a process of their own, to be killed."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch

# One server imports torch once; its children are forked, so a process to kill costs milliseconds.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch._dynamo", "tiny"])


def start(function: Callable, *args: object) -> multiprocessing.Process:
    """`function(*args)` in a process of its own, with one thread and without output."""
    child = CHILDREN.Process(target=_quietly, args=(function, *args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server finds tiny
        child.start()
    return child


def run(function: Callable, *args: object) -> int:
    """The exit code of `function(*args)` in a process of its own: −9 is SIGKILL."""
    child = start(function, *args)
    child.join(60)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def _quietly(function: Callable, *args: object) -> None:
    torch.set_num_threads(1)
    # A shell lets what it starts in the background ignore this signal; a notebook does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    function(*args)
