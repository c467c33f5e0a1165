"""The networks taken along: their files, and how fast each is on each runtime."""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from models.vgg import VGG
from utils import export
from utils.cost import eager, take_turns
from utils.images.data import ImageData
from utils.run.identity import Run

EAGER, FLOAT32, INT8 = "eager float32", "ONNX float32", "ONNX int8"
IMAGES = {"1 image": 1, "256 images": 256}  # at a time
Files = dict[str, dict[str, Path]]


def take_along(
    run: Run, data: ImageData, networks: Mapping[str, VGG], accuracy: Mapping[str, float],
    batches: list, test: list,
) -> tuple[Files, dict[str, float]]:  # fmt: skip
    """Export each of `networks` to ONNX, in float32 and in int8: its files, and its accuracy in
    int8 in %; says what that loses of `accuracy`. Without the packages, only a printed line."""
    files, in_int8 = {}, {}
    try:
        for name, network in networks.items():
            stem = re.sub(r"\W+", "_", name.removesuffix("% pruned"))
            stem = stem if name == "dense" else f"slim_{stem}"
            file, file8 = run.figures / f"{stem}.onnx", run.figures / f"{stem}_int8.onnx"
            export.export_onnx(network, file, classes=data.classes, input_shape=data.input_shape)
            difference = export.check_parity(network, file, test[0][0][:256])
            export.quantize_int8(file, batches, file8)
            in_int8[name] = export.accuracy(export.session(file8), test)
            files[name] = {FLOAT32: file, INT8: file8}
            lost = accuracy[name] - in_int8[name]
            warning = "  ← more than half a point lost" if lost > 0.5 else ""
            print(f"{name}: logits differ by {difference:.0e} of the largest; ", end="")
            print(f"int8 loses {lost:.2f} points{warning}")
    except export.ExportError as error:
        print(f"left out: {error}")
    return files, in_int8


def latencies(networks: Mapping[str, VGG], files: Files, data: ImageData) -> list[dict]:
    """A row for each network, runtime and number of images: median and IQR in milliseconds. All
    take turns on the CPU with the same number of threads; on a GPU too, where `data` is there."""
    device, threads, steps = data.train_images.device, torch.get_num_threads(), {}
    for size in IMAGES.values():
        images = torch.randn(size, *data.input_shape)  # what they show does not matter
        for name, network in networks.items():
            steps[name, EAGER, size] = eager(copy.deepcopy(network).cpu(), images)
            if device.type != "cpu":
                steps[name, f"{EAGER}, GPU", size] = eager(network, images.to(device))
            for runtime, file in files.get(name, {}).items():
                opened = export.session(file, num_threads=threads)
                steps[name, runtime, size] = partial(export.logits, opened, images.numpy())
    return [
        {"network": name, "runtime": runtime, "images": size}
        | {"ms": 1e3 * m.median, "IQR (ms)": 1e3 * m.iqr}
        for (name, runtime, size), m in take_turns(steps, min_run_time=0.05).items()
    ]


def gains(speed: Sequence[dict]) -> list[dict]:
    """How many times faster than the dense network: in all, against it in eager float32, and by
    pruning, against it on the same runtime."""
    times = {(row["network"], row["runtime"], row["images"]): row["ms"] for row in speed}
    rows = [{"network": k, "runtime": on} for k, on in dict.fromkeys(key[:2] for key in times)]
    for row in rows:
        for images, size in IMAGES.items():
            for part, of in (("in all", EAGER), ("by pruning", row["runtime"])):
                factor = times["dense", of, size] / times[row["network"], row["runtime"], size]
                row[f"{images}, {part}"] = f"{factor:.1f} ×"
    return rows


def points(
    speed: Sequence[dict], accuracy: Mapping[str, float], in_int8: Mapping[str, float]
) -> list[dict]:
    """Accuracy against the latency of one image: the rows that the picture of it takes."""
    return [
        {"network": row["network"], "runtime": row["runtime"]}
        | {"accuracy": (in_int8 if row["runtime"] == INT8 else accuracy)[row["network"]]}
        | {"seconds": row["ms"] / 1e3, "iqr": row["IQR (ms)"] / 1e3}
        for row in speed
        if row["images"] == 1
    ]
