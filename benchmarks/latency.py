"""What pruning, lower precision and a runtime bring to inference, alone and together.

    .venv/bin/python -m benchmarks.latency           # a few minutes on one thread

The networks have random weights, which take as long as trained ones. All take turns in every form;
a time is the median of the seconds that the one thread itself computed, so that other work on the
machine counts only by what it takes from the caches. The absolute times hold for one machine.

Widths in 16s made the 90 % network 1.6 to 2.2 times faster in ONNX Runtime and 1.2 to 1.3 in eager
float32, with 8 % fewer MACs. What they do to the accuracy has not been tried.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from models.vgg import VGG, VGG_CFGS
from utils.cost import eager, macs, take_turns
from utils.export import export_onnx, logits, quantize_int8, session
from utils.run.machine import describe_machine
from utils.store.files import write_json

SLIM_50 = [32, 32, "M", 64, 64, "M", *[128] * 4, "M", *[256] * 4, "M", *[256] * 4]
"""Half the channels of every layer."""
SLIM_90 = [22, 41, "M", 68, 71, "M", 82, 64, 34, 31, "M", 17, 8, 8, 8, "M", 8, 8, 10, 70]
"""What a run on CIFAR-10 kept: λ = 1e-3, at least 8 channels a layer."""


def rounded(cfg: list[int | str], multiple: int) -> list[int | str]:
    """The same widths, each the nearest multiple."""
    return [v if v == "M" else max(1, round(v / multiple)) * multiple for v in cfg]


NETWORKS = {
    "dense": VGG_CFGS[19],
    "50% pruned": SLIM_50,
    "90% pruned": SLIM_90,
    "90%, widths in 8s": rounded(SLIM_90, 8),
    "90%, widths in 16s": rounded(SLIM_90, 16),
}
BATCH_SIZES = (1, 256)


def forms(model: VGG, path: Path, batch: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Each way to run `model`, or its files at `path`, on `batch`."""
    return {
        "eager float32": eager(model, batch),
        "eager bfloat16": eager(model, batch.bfloat16()),
        "ONNX Runtime float32": partial(logits, session(path), batch.numpy()),
        "ONNX Runtime int8": partial(logits, session(int8(path)), batch.numpy()),
    }


def int8(path: Path) -> Path:
    return path.with_suffix(".int8.onnx")


def export(models: dict[str, VGG], folder: Path) -> dict[str, Path]:
    """Each network as two files; the path is that of the float32 one."""
    paths = {name: folder / f"{k}.onnx" for k, name in enumerate(models)}
    for name, path in paths.items():
        export_onnx(models[name], path)
        quantize_int8(path, [(torch.randn(64, 3, 32, 32), None)], int8(path))
    return paths


def measure(
    models: dict[str, VGG], paths: dict[str, Path], batch_size: int, rounds: int
) -> list[dict]:
    """One row for each network and form."""
    batch = torch.randn(batch_size, 3, 32, 32)
    steps = {
        (name, form): step
        for name, model in models.items()
        for form, step in forms(model, paths[name], batch).items()
    }
    times = take_turns(steps, num_threads=1, rounds=rounds, timer=time.thread_time)
    plain = times["dense", "eager float32"].median
    return [
        {
            "network": name,
            "MACs (M)": round(macs(models[name]) / 1e6, 1),
            "form": form,
            "batch": batch_size,
            "ms": round(1e3 * taken.median, 3),
            "IQR (ms)": round(1e3 * taken.iqr, 3),
            "times faster than dense eager float32": round(plain / taken.median, 1),
        }
        for (name, form), taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each network and form")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    models = {name: VGG(cfg) for name, cfg in NETWORKS.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = export(models, Path(folder))
        rows = [row for size in BATCH_SIZES for row in measure(models, paths, size, options.rounds)]
    table = pd.DataFrame(rows).pivot(
        index=["batch", "MACs (M)", "network"], columns="form", values="ms"
    )
    print(table.to_string())
    report = {
        "machine": describe_machine("cpu") | {"onnxruntime": version("onnxruntime")},
        "clock": "seconds computed by the one thread (time.thread_time)",
        "rounds": options.rounds,
        "latency": rows,
    }
    if options.out:
        write_json(options.out, report)


if __name__ == "__main__":
    main()
