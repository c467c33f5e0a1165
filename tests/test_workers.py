"""Jobs in processes: each gets its answer, whatever the others do to their workers."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killers import begun, jobs, pids, work

from utils.run import workers
from utils.run.workers import Killed, in_workers


def test_every_job_has_its_answer(tmp_path: Path):
    asked = jobs(tmp_path, sound="", failing="fail", killed_once="kill once")
    found = dict(in_workers(work, asked, workers=2))
    assert found.keys() == asked.keys()
    assert repr(found["failing"]) == "ValueError('no')"
    for name in ("sound", "killed_once"):
        pid, threads = found[name]
        assert pid != os.getpid() and threads == "1"
    assert begun(tmp_path)["killed_once"] == 2


def test_a_job_that_kills_its_worker_each_time_is_given_up_and_no_other(tmp_path: Path):
    asked = jobs(tmp_path, first="", killer="kill", last="")
    answers = list(in_workers(work, asked, workers=1))
    found = dict(answers)
    assert len(answers) == len(found) == 3
    assert isinstance(found["killer"], Killed) and "is memory short?" in str(found["killer"])
    assert isinstance(found["first"], tuple) and isinstance(found["last"], tuple)
    # Twice with the others, then alone; what is done is not done again.
    assert begun(tmp_path) == {"first": 1, "killer": 3, "last": 1}


def test_the_workers_of_a_loop_that_is_left_are_gone(tmp_path: Path):
    with contextlib.closing(
        in_workers(work, jobs(tmp_path, sound="", endless="wait"), workers=2)
    ) as answers:
        assert next(answers)[0] == "sound"
        _until(lambda: "endless" in begun(tmp_path))
    assert begun(tmp_path)["endless"] == 1
    assert not any(map(_lives, pids(tmp_path)))


def test_ctrl_c_ends_the_workers(tmp_path: Path):
    """Of the parent alone, as `kill -INT` does it: it ends at once, and no worker is left."""
    wait = (
        "import signal, sys; from pathlib import Path; from killers import jobs, work\n"
        "from utils.run.workers import in_workers\n"
        # What a shell starts in the background ignores this signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "list(in_workers(work, jobs(Path(sys.argv[1]), a='wait', b='wait'), workers=2))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", wait, tmp_path], env=environment, stderr=subprocess.DEVNULL
    )
    _until(lambda: len(begun(tmp_path)) == 2)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60) not in (0, None)
    assert begun(tmp_path) == {"a": 1, "b": 1}
    assert not any(map(_lives, pids(tmp_path)))


def test_a_gpu_has_one_worker_and_a_cpu_one_for_each_core(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers.joblib, "cpu_count", lambda: 5)
    devices = ("cpu", "cuda", "cuda:1", "mps")
    assert [workers.workers_for(torch.device(d)) for d in devices] == [5, 1, 1, 1]


def _until(condition) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
