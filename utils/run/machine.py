"""The machine that a run uses: which device, and what to write beside a figure it produced."""

import ctypes
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch
from packaging.requirements import Requirement


def set_up(labs: Sequence[Path]) -> torch.device:
    """What a notebook does first: check the packages, find the device, say where it runs.

    `labs` are the copies of the lab that were found, the one in use first.
    """
    check_requirements()
    for other in [lab for lab in dict.fromkeys(labs) if lab != labs[0]]:
        print(f"(another copy of the lab, not used: {other})")
    pd.set_option("display.max_colwidth", None)  # a reason in a table is shown to its end
    device = pick_device()
    print(", ".join(f"{name} {value}" for name, value in describe_machine(device).items()))
    return device


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU, with a printed line that names what suits it.

    On CUDA float32 is float32 from then on: torch would compute its convolutions in TF32, whose
    rounding is coarser than the lab's checks and comparisons allow.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda")
    _keep_freed_memory()
    missing = "No GPU found"
    if torch.backends.mps.is_available():
        missing = "The GPU of this Mac is not used"
    elif shutil.which("nvidia-smi"):  # pip's torch for Windows, for one, is without CUDA
        missing = (
            f"No GPU that torch {torch.__version__} can use: it is a build without CUDA, or the "
            "driver is too old for it (pytorch.org, Get started, has the command that fits)"
        )
    print(
        missing,
        "— running on the CPU, for which the profiles quick (minutes) and laptop (a few hours) are "
        "made. In Colab: Runtime → Change runtime type → GPU.",
    )
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Let glibc keep the large blocks that a step frees, for the next step to use.

    By default it gives them back to the system, which has to clear each page again when the next
    step asks for it: a sixth of the time of a step of the laptop profile.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt:  # other systems have other allocators
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def check_requirements(path: str = "requirements.txt") -> None:
    """Raise ImportError if a package that the lab imports is missing or older than its floor.

    Nothing is installed: on Colab an upgrade of what it ships would break the rest.
    """
    unmet = []
    with open(path, encoding="utf-8") as file:
        wanted = [line.split("#")[0].strip() for line in file]
    for requirement in map(Requirement, filter(None, wanted)):
        if requirement.name in ("jupyter", "nbclient"):
            continue  # whoever reads this in a notebook has what opened it
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement} (found: {found})")
    if unmet:
        raise ImportError(f"the lab needs {', '.join(unmet)}: pip install -r requirements.txt")


def forecast(seconds: float, what: str) -> str:
    """A sentence: `what` takes `seconds` on this machine, and what to choose if that is long."""
    if seconds < 2 * 3600:
        return f"{what} take about {max(1, round(seconds / 60))} min here"
    return (
        f"{what} take about {seconds / 3600:.0f} hours here. Shorter: fewer epochs, a GPU, or a "
        "smaller profile (laptop is a sixteenth of the work of cifar10, quick takes minutes)"
    )


def processor() -> str:
    """The name of the CPU, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device | str) -> dict[str, str | int]:
    """Hardware, threads and versions: what a measured figure must be read with."""
    device = torch.device(device)
    hardware = {"device": processor()}
    if device.type == "cuda":  # the CPU counts, too: it computes the latencies, ONNX and int8
        hardware = {"device": torch.cuda.get_device_name(device), "processor": processor()}
    return {
        **hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "numpy")},
    }
