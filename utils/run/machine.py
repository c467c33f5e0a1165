"""The machine that a run uses: what a notebook asks of it, and what to write beside a figure."""

import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions, version
from pathlib import Path

import pandas as pd
import torch
from packaging.requirements import Requirement

from models.vgg import VGG
from utils.engine import choose_engine, pick_device, seconds_per_epoch
from utils.images.data import ImageData
from utils.profile import Profile


def set_up(labs: Sequence[Path]) -> None:
    """What a notebook does first. `labs`: the copies of the lab found, the one in use first. Raises
    ImportError for packages missing or too old, and for models/ or utils/ of another project."""
    check_requirements()
    for other in [lab for lab in dict.fromkeys(labs) if lab != labs[0]]:
        print(f"(another copy of the lab, not used: {other})")
    for name in ("models", "utils"):
        found = Path(sys.modules[name].__file__).parent
        if found.resolve() != (labs[0] / name).resolve():
            way_out = "restart the kernel, and start Jupyter without PYTHONPATH"
            raise ImportError(f"{name}/ is that of another project, {found}: {way_out}")
    pd.set_option("display.max_colwidth", None)  # a reason in a table is shown to its end
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell and "inline" not in (backend := os.environ.get("MPLBACKEND", "inline")):
        print(f"(MPLBACKEND = {backend!r} of your shell is not used: pictures are shown inline)")


def use_device(name: str | None = None) -> torch.device:
    """The device that `pick_device` finds, with a printed line on the machine."""
    device = pick_device(name)
    print(", ".join(f"{name} {value}" for name, value in describe_machine(device).items()))
    return device


def check_requirements(path: str = "requirements.txt") -> None:
    """Raise ImportError if a package that the lab imports is missing or older than its floor.
    Nothing is installed: on Colab an upgrade of what it ships would break the rest."""
    unmet = []
    for line in re.findall(r"^[^#\n]+", Path(path).read_text("utf-8"), re.M):
        needed = Requirement(line.strip())
        found = next((d.version for d in distributions(name=needed.name)), "none")
        met = found != "none" and needed.specifier.contains(found, prereleases=True)
        if not met and needed.name not in ("jupyter", "nbclient"):  # a reader has what opened it
            unmet.append(f"{needed} (found: {found})")
    if unmet:
        needs = f"the lab needs {', '.join(unmet)}, and this kernel runs {sys.executable}"
        install = "`pip install -r requirements.txt` with that one"
        raise ImportError(f"{needs}: choose a kernel that has them, or {install}")


class Forecast:
    """How long trainings take here: said before them, and compared with what they took."""

    def __init__(self, what: str, trainings: Iterable[tuple[VGG, Profile]], data: ImageData):
        self.what, self.seconds, each = what, 0.0, {}
        for model, profile in trainings:
            key = (*model.cfg, profile)
            if key not in each:  # networks of one shape take equally long
                each[key] = seconds_per_epoch(model, data, profile) * profile.epochs
            self.seconds += each[key]
        on = choose_engine(model, data, profile)
        print(f"{what} takes about {duration(self.seconds)} here ({on})")
        if self.seconds > 2 * 3600:
            print("Shorter: fewer epochs, a GPU, or a smaller profile, such as laptop or quick")
        self.began = time.monotonic()

    def compare(self) -> None:
        """Print what the trainings took."""
        took = duration(time.monotonic() - self.began)
        print(f"{self.what} took {took} (forecast: {duration(self.seconds)})")


def duration(seconds: float) -> str:
    """As people say it: "40 s", "12 min", "3.5 hours"."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def processor() -> str:
    """The name of the CPU, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return named[1].strip() if named else platform.processor() or platform.machine()


def describe_machine(device: torch.device | str) -> dict[str, str | int]:
    """Hardware, threads and versions: what a measured figure must be read with."""
    device, hardware = torch.device(device), {"device": processor()}
    if device.type == "cuda":  # the CPU counts, too: it computes the latencies, ONNX and int8
        hardware = {"device": torch.cuda.get_device_name(device), "processor": processor()}
    elif device.type == "mps":
        hardware = {"device": f"GPU of {processor()}"}
    software = {"threads": torch.get_num_threads(), "python": platform.python_version()}
    return hardware | software | {name: version(name) for name in ("torch", "torchvision", "numpy")}
