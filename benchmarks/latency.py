"""What pruning, lower precision and a runtime bring to inference, alone and together.

    .venv/bin/python -m benchmarks.latency           # a few minutes on one thread

The networks have random weights, which take as long as trained ones. All take turns, in every form,
so that a busy moment hits them all; a time is the median. The absolute times hold for one machine.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from models.vgg import VGG, VGG_CFGS
from utils.cost import fold_bn, macs
from utils.export import export_onnx, logits, quantize_int8, session, take_turns
from utils.machine import describe_machine

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


def forms(model: VGG, folder: Path, batch: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Each way to run `model` on `batch`: eager float32 and bfloat16, ONNX Runtime's two."""
    path, path8 = folder / "network.onnx", folder / "network_int8.onnx"
    export_onnx(model, path)
    quantize_int8(path, [(torch.randn(64, 3, 32, 32), None)], path8)

    def eager(dtype: torch.dtype) -> Callable[[], object]:
        folded = fold_bn(model).to(dtype, memory_format=torch.channels_last)
        images = batch.to(dtype).contiguous(memory_format=torch.channels_last)
        return torch.inference_mode()(partial(folded, images))

    return {
        "eager float32": eager(torch.float32),
        "eager bfloat16": eager(torch.bfloat16),
        "ONNX Runtime float32": partial(logits, session(path), batch.numpy()),
        "ONNX Runtime int8": partial(logits, session(path8), batch.numpy()),
    }


def measure(batch_size: int, rounds: int) -> list[dict]:
    """One row for each network and form."""
    torch.manual_seed(1)
    batch = torch.randn(batch_size, 3, 32, 32)
    models = {name: VGG(cfg) for name, cfg in NETWORKS.items()}
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            (name, form): step
            for name, model in models.items()
            for form, step in forms(model, Path(folder), batch).items()
        }
    times = take_turns(steps, rounds=rounds)
    plain = times["dense", "eager float32"].median
    return [
        {
            "network": name,
            "MACs (M)": round(macs(models[name]) / 1e6, 1),
            "form": form,
            "batch": batch_size,
            "ms": round(1e3 * time.median, 3),
            "IQR (ms)": round(1e3 * time.iqr, 3),
            "times faster than dense eager float32": round(plain / time.median, 1),
        }
        for (name, form), time in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each network and form")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/latency_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for size in BATCH_SIZES for row in measure(size, options.rounds)]
    table = pd.DataFrame(rows).pivot(
        index=["batch", "network", "MACs (M)"], columns="form", values="ms"
    )
    print(table.to_string())
    report = {"machine": describe_machine("cpu"), "rounds": options.rounds, "latency": rows}
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
