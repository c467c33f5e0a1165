"""Tasks that fail or kill their worker; without torch, so that workers start fast."""

import os
import signal
from pathlib import Path
from typing import NamedTuple


class Fake(NamedTuple):
    """What sweep.workers knows of a task."""

    number: int

    @property
    def cell(self) -> tuple[float, float, int]:
        return 0.0, 0.0, self.number

    @property
    def name(self) -> str:
        return f"fake {self.number}"

    def row(self, reason: str | None = None) -> dict:
        return {"l1_lambda": 0.0, "pruning_ratio": 0.0, "seed": self.number, "reason": reason}


def die(task: Fake, once: Path | None = None) -> dict:
    """The first task kills its worker, each time or only `once`, which a file remembers."""
    if task.number == 0 and not (once and once.exists()):
        if once:
            once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task.row()


def fail(task: Fake) -> dict:
    raise ValueError("no")
