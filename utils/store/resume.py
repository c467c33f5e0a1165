"""How far a training came."""

from pathlib import Path

from torch import nn

from utils.store.checkpoint import CheckpointError, History, load
from utils.store.identity import differences


def resume(path: str | Path | None, kind: str, facts: dict, model: nn.Module) -> tuple:
    """The History that the file at `path` holds, and what the next step needs; sets the weights.

    Raises CheckpointError if the file follows from anything but `facts`.
    """
    if not path or not Path(path).exists():
        return History(), {}
    saved = load(path, kind=kind)
    if differ := differences(saved.settings, facts):
        raise CheckpointError(
            f"{Path(path).resolve()} was made with {'; '.join(differ)}. Set that back to go on "
            "with it, move the file away to start anew, or set run_name: a run of its own."
        )
    model.load_state_dict(saved.state_dict)
    return History(**saved.history), saved.optimizer
