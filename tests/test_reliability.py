"""The table of reliability: a test is a row, its docstring the property. `--soak` runs for hours.

The negative controls at the end break a guarantee on purpose and expect the difference to be seen.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import Trap, at_each_moment, damage
from processes import run, start
from tiny import TINY_CFG, file_after_each_epoch, same, tiny_checkpoint, train

from utils import training
from utils.engine import TrainStep
from utils.images import data
from utils.store import checkpoint
from utils.store.checkpoint import CheckpointError, load, save

pytestmark = pytest.mark.reliability

EPOCHS = 6  # of the runs that are killed
OLD, NEW = tiny_checkpoint(seed=1), tiny_checkpoint(seed=2)


def bytes_of(path: Path, content: checkpoint.Checkpoint) -> bytes:
    save(path, content)
    return path.read_bytes()


def bytes_of_torch(path: Path, weights: dict) -> bytes:
    torch.save({"cfg": TINY_CFG, "state_dict": weights}, path)
    return path.read_bytes()


# --- runs that are cut off -----------------------------------------------------------------------


def test_resume_from_every_epoch_boundary(tmp_path, soak, times):
    """resume from every epoch boundary gives the same bytes"""
    path, epochs = tmp_path / "x.safetensors", 50 if soak else 5
    after_epoch = file_after_each_epoch(path, epochs=epochs)
    for k in times(5, 50):
        path.write_bytes(after_epoch[k])
        train(path, epochs=epochs)
        assert path.read_bytes() == after_epoch[-1]


def train_and_tell(path: Path, told: Path) -> None:
    """Train; write down each epoch as it begins, since a killed process can't be asked."""
    run_epoch = training._run_epoch

    def tell(step, images, profile, epoch, *rest):
        with told.open("a") as file:
            file.write(f"{epoch}\n")
        return run_epoch(step, images, profile, epoch, *rest)

    training._run_epoch = tell
    train(path, epochs=EPOCHS)


class Runs:
    """One training, cut off at random moments and started again until it is done; then anew."""

    def __init__(self, folder: Path, draw: random.Random):
        self.path, self.told, self.draw = folder / "x.safetensors", folder / "told", draw
        assert run(time.sleep, 0) == 0  # the server of the processes is there from now on
        begun = time.monotonic()
        self.finish(expected=None)
        self.seconds = time.monotonic() - begun

    def cut_off(self, number: int) -> None:
        """Send the signal `number` to the run at a random moment before its end."""
        while True:
            child = start(train_and_tell, self.path, self.told)
            child.join(self.draw.uniform(0, self.seconds))
            if child.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it may end just now
                    os.kill(child.pid, number)
            child.join(60)
            assert child.exitcode is not None, "the run hangs"
            if self.path.exists():
                load(self.path, kind="trained")
            if child.exitcode != 0:
                assert number != signal.SIGKILL or child.exitcode == -signal.SIGKILL
                return
            self.finish(self.whole)  # it was faster than the signal

    def finish(self, expected: bytes | None) -> None:
        assert run(train_and_tell, self.path, self.told) == 0
        self.whole = self.path.read_bytes()
        as_expected = expected in (None, self.whole)  # apart, so that no bytes are printed
        assert as_expected, "not what the run that was left alone gives"
        begun = [int(line) for line in self.told.read_text().split()]
        assert set(begun) == set(range(EPOCHS))
        again = [b - a for a, b in itertools.pairwise(begun)]
        assert set(again) <= {0, 1}, "more than the epoch that was cut off is repeated"
        locks = self.path.parent / ".locks"
        assert {*self.path.parent.iterdir()} == {self.path, self.told, locks}
        self.path.unlink()
        self.told.unlink()


@pytest.fixture
def runs(tmp_path, draw):
    return Runs(tmp_path, draw)


def test_killed_at_random_moments(runs, times):
    """SIGKILL at random moments, restarted until done: same bytes, ≤ 1 epoch repeated"""
    for _ in times(10, 500):
        runs.cut_off(signal.SIGKILL)
    runs.finish(runs.whole)


def test_stopped_with_the_stop_button(runs, times):
    """SIGINT (the stop button), run again: same bytes, ≤ 1 epoch repeated"""
    for _ in times(2, 50):
        runs.cut_off(signal.SIGINT)
    runs.finish(runs.whole)


def test_a_clock_that_jumps(tmp_path, monkeypatch, draw, times):
    """a clock that jumps changes nothing"""
    train(tmp_path / "whole")
    for k in times(1, 100):
        with monkeypatch.context() as patch:
            for name in ("time.time", "time.monotonic", "tqdm.std.time"):
                patch.setattr(name, lambda: draw.uniform(-1e9, 1e9))
            train(tmp_path / f"{k}")
        assert (tmp_path / f"{k}").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_folder_that_vanishes(tmp_path, monkeypatch, times):
    """a folder that vanishes during a run is made again, and nothing is lost"""
    train(tmp_path / "whole")
    path = tmp_path / "drive" / "folder" / "x.safetensors"

    def vanish_and_save(*args):
        shutil.rmtree(tmp_path / "drive", ignore_errors=True)
        save(*args)

    monkeypatch.setattr(training, "save", vanish_and_save)
    for _ in times(1, 100):
        train(path)
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()


# --- files ---------------------------------------------------------------------------------------


def save_and_die(path: Path, at: int) -> None:
    at_each_moment(partial(save, path, NEW), lambda: os.kill(os.getpid(), signal.SIGKILL), at)


def test_killed_at_each_step_inside_save(tmp_path, times):
    """killed at each step inside save(): the old file or the new one, whole"""
    path = tmp_path / "x.safetensors"
    new, old = bytes_of(path, NEW), bytes_of(path, OLD)
    for _ in times(1, 20):
        found = []
        for at in itertools.count(1):
            path.write_bytes(old)
            if run(save_and_die, path, at) == 0:  # it has no such moment
                break
            found.append(path.read_bytes())
            assert found[-1] in (old, new)
            load(path)
        assert found == sorted(found, key=[old, new].index)
        assert {old, new} == set(found)


def test_damaged_checkpoints(tmp_path, draw, times):
    """damaged checkpoints: CheckpointError, or every bit as it was; no code run"""
    path, canary = tmp_path / "x.safetensors", tmp_path / "canary"
    finished = replace(OLD, settings={"epochs": 2}, optimizer={})
    whole, short, other = (bytes_of(path, c) for c in (OLD, finished, NEW))
    torch.save({"cfg": TINY_CFG, "state_dict": OLD.state_dict, "x": Trap(canary)}, path)
    trapped = path.read_bytes()
    refused = []
    for _ in times(300, 20_000):
        what, broken = damage(draw.choice([whole, whole, short, trapped]), other, draw)
        path.write_bytes(broken)
        try:
            found = load(path)
        except CheckpointError as error:
            refused.append(True)
            assert str(path) in str(error)
        else:  # a letter of the header in another case, say
            refused.append(False)
            assert any(same(found, sound) for sound in (OLD, finished, NEW)), what
        assert path.read_bytes() == broken and not canary.exists(), what
    assert sum(refused) > 0.9 * len(refused)


def test_damaged_files_of_torch(tmp_path, draw, times):
    """damaged files from elsewhere: CheckpointError, or every bit as it was"""
    path = tmp_path / "x.pt"
    sound = [bytes_of_torch(path, content.state_dict) for content in (OLD, NEW)]
    for _ in times(100, 5_000):
        what, broken = damage(*sound, draw)
        path.write_bytes(broken)
        with contextlib.suppress(CheckpointError):
            found = load(path).state_dict
            assert same(found, OLD.state_dict) or same(found, NEW.state_dict), what


# --- negative controls ---------------------------------------------------------------------------


def resumed_differs(tmp_path: Path, break_it: Callable[[], None] = lambda: None) -> bool:
    """Whether a run resumed after its first epoch, things broken, ends with other weights."""
    after_epoch = file_after_each_epoch(tmp_path / "whole")
    (tmp_path / "part").write_bytes(after_epoch[0])
    break_it()
    train(tmp_path / "part")
    whole, part = load(tmp_path / "whole"), load(tmp_path / "part")
    return not same(whole.state_dict, part.state_dict)


def test_control_nothing_broken(tmp_path):
    """negative control: with nothing broken no difference is seen"""
    assert not resumed_differs(tmp_path)


def test_control_wrong_seed(tmp_path, monkeypatch):
    """negative control: a run resumed with a wrong seed is seen"""
    right = data._generator
    wrong = partial(monkeypatch.setattr, data, "_generator", lambda s, e: right(s + 1, e))
    assert resumed_differs(tmp_path, wrong)


def test_control_random_numbers_that_depend_on_the_past(tmp_path, monkeypatch):
    """negative control: an epoch's RNG not derived from (seed, epoch) is seen"""
    one_for_all = torch.Generator().manual_seed(1)
    monkeypatch.setattr(data, "_generator", lambda seed, epoch: one_for_all)
    assert resumed_differs(tmp_path)


def test_control_momentum_forgotten(tmp_path, monkeypatch):
    """negative control: momentum that is not restored is seen"""
    monkeypatch.setattr(TrainStep, "load_state_dict", lambda *_: None)
    assert resumed_differs(tmp_path)


def unseen(path: Path, whole: bytes) -> int:
    """How many of 200 damaged files are loaded with other weights."""
    path.write_bytes(whole)
    sound, draw, count = load(path), random.Random(0), 0
    for _ in range(200):
        path.write_bytes(damage(whole, whole, draw)[1])
        with contextlib.suppress(CheckpointError):
            count += not same(load(path).state_dict, sound.state_dict)
    return count


def test_control_seal_unchecked(tmp_path, monkeypatch):
    """negative control: without the check of the seal damage goes unseen"""
    whole = bytes_of(tmp_path / "x", OLD)
    assert unseen(tmp_path / "x", whole) == 0
    always_equal = type("Seal", (str,), {"__eq__": lambda *_: True, "__ne__": lambda *_: False})
    monkeypatch.setattr(checkpoint, "_seal", lambda *_: always_equal())
    assert unseen(tmp_path / "x", whole) > 0


def test_control_checksums_unchecked(tmp_path, monkeypatch):
    """negative control: without the CRC check of files from elsewhere damage goes unseen"""
    whole = bytes_of_torch(tmp_path / "x", OLD.state_dict)
    assert unseen(tmp_path / "x", whole) == 0
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: None)
    assert unseen(tmp_path / "x", whole) > 0


def test_control_written_in_place(tmp_path, monkeypatch):
    """negative control: a save() that writes in place is seen"""
    path = tmp_path / "x.safetensors"
    new, old = bytes_of(path, NEW), bytes_of(path, OLD)

    monkeypatch.setattr(Path, "with_name", lambda self, _: self)  # no file beside the target
    found = set()

    def look():
        if path.exists():
            found.add(path.read_bytes())

    for at in itertools.count(1):
        path.write_bytes(old)
        if not at_each_moment(partial(save, path, NEW), look, at):
            break
    assert found - {old, new}
