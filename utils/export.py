"""A network taken along: an ONNX file, its int8 form, and what runs them without torch.

    python -m utils.export figures/<run>/slim_90_int8.onnx picture.png

needs ONNX Runtime, numpy and Pillow alone: torch is imported only where a network is given.
"""

import importlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.images.pictures import read_image

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import Tensor

    from models.vgg import VGG

INPUT, OUTPUT, SHAPE = "images", "logits", (3, 32, 32)
TOLERANCE = 2e-5
"""Largest difference between torch and ONNX Runtime, as a share of the largest |logit|."""


class ExportError(Exception):
    """A file or network that can't be exported, quantized or run; the message names the way out."""


def export_onnx(model: "VGG", path: str | Path, *, classes: Sequence[str] = ()) -> None:
    """Write `model`, BN folded, to one ONNX file: "images" (batch, 3, 32, 32) → "logits".

    The batch size is free. `classes`, one for each logit, are kept in the file for whoever runs it.
    The same network gives the same bytes. Raises ExportError for classes that don't fit.
    """
    onnx = _needed("onnx")
    _needed("onnxscript")  # torch would name it, but not the way out
    import torch

    from utils.cost import fold_bn

    logits_count = model.classifier.out_features
    if classes and len(classes) != logits_count:
        raise ExportError(f"{len(classes)} classes for {logits_count} logits: pass one for each")
    program = torch.onnx.export(
        fold_bn(model).to("cpu", memory_format=torch.contiguous_format),
        (torch.zeros(2, *SHAPE),),  # not one: that would be taken for a constant
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    content = program.model_proto
    graph = content.graph
    parts = [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for part in (content, graph, *parts):
        # Each node carries the source lines it came from, with this machine's absolute paths.
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    content.ClearField("producer_version")
    onnx.helper.set_model_props(content, {"classes": json.dumps(list(classes))})
    _write(content, path)


def check_parity(model: "VGG", path: str | Path, images: "Tensor") -> float:
    """The largest difference between the logits of `model` and of the float32 file made from it.

    As a share of the largest |logit|, over `images` (n, 3, 32, 32) from −1 to 1. Raises ExportError
    where it is over TOLERANCE, or where an image gets another class.
    """
    import torch

    from utils.cost import fold_bn

    with torch.inference_mode():
        expected = fold_bn(model).cpu()(images.cpu()).numpy()
    found = logits(session(path), images.cpu().numpy())
    difference = float(np.abs(found - expected).max())
    largest = float(np.abs(expected).max())
    changed = int((found.argmax(1) != expected.argmax(1)).sum())
    if not difference <= TOLERANCE * largest or changed:  # `not`: NaN is no parity
        raise ExportError(
            f"{path} is not this network: {changed} of {len(images)} images get another class, "
            f"logits differ by {difference:.2g} (at most {TOLERANCE * largest:.2g}). Export the "
            "network that is compared."
        )
    return difference / largest if largest else 0.0


def quantize_int8(
    path: str | Path, batches: Iterable[tuple["Tensor", "Tensor"]], path8: str | Path
) -> None:
    """Write the int8 form of the ONNX file `path` to `path8`: static, weights per output channel.

    `batches` yields (images, labels) of the training set; an activation's range is the one seen
    there, labels are not used. Weights and activations are signed, which is fast on Arm; on x86
    ONNX Runtime makes the activations unsigned as it loads them; where 8 bits
    would overflow, weights have 7. Raises ExportError without an image, or where `session` does.
    """
    onnx = _needed("onnx")
    properties = session(path).get_modelmeta().custom_metadata_map
    from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static

    feeds = [{INPUT: images.cpu().numpy()} for images, _ in batches if len(images)]
    if not feeds:
        raise ExportError("int8 has no image to be calibrated with: pass training batches")

    class Calibration(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return feeds.pop(0) if feeds else None

    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        # Its defaults: QDQ, signed weights, signed activations.
        quantize_static(
            prepared, quantized, Calibration(), per_channel=True, reduce_range=_int8_overflows()
        )
        content = onnx.load(quantized)
    onnx.helper.set_model_props(content, properties)
    content.ClearField("producer_version")
    _write(content, path8)


def _int8_overflows() -> bool:
    """x86 without VNNI adds pairs of int8 products in 16 bits, where only 7 bits always fit."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the safe side
        return True


def session(path: str | Path, num_threads: int = 1) -> "InferenceSession":
    """The file in ONNX Runtime, on `num_threads` of the CPU.

    Raises ExportError where it is missing, can't be run, or takes other images than the lab's.
    """
    runtime = _needed("onnxruntime")
    if not Path(path).is_file():
        raise ExportError(f"{path}: there is no such file; train_prune_model.ipynb writes them")
    options = runtime.SessionOptions()
    # By itself it takes as many threads as the host has cores, however few are ours.
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 4  # what goes wrong is raised as well
    try:
        opened = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise ExportError(
            f"{path}: ONNX Runtime {runtime.__version__} can't run it ({error}). Export it again, "
            "or get a newer runtime: pip install -U -r requirements-export.txt"
        ) from error
    inputs = [(i.name, i.type, i.shape[1:]) for i in opened.get_inputs()]
    if inputs != [(INPUT, "tensor(float)", list(SHAPE))]:
        raise ExportError(
            f"{path}: takes {inputs}, must take float32 {INPUT!r} of shape (batch, 3, 32, 32); "
            "choose a file that export_onnx or quantize_int8 wrote"
        )
    return opened


def logits(opened: "InferenceSession", images: np.ndarray) -> np.ndarray:
    """(n, 3, 32, 32) float32 from −1 to 1 → (n, classes)."""
    return opened.run([OUTPUT], {INPUT: images})[0]


def accuracy(opened: "InferenceSession", batches: Iterable[tuple["Tensor", "Tensor"]]) -> float:
    """In %, over (images, labels) batches. Raises ValueError without a batch."""
    hits = [logits(opened, x.cpu().numpy()).argmax(1) == y.cpu().numpy() for x, y in batches]
    if not hits:
        raise ValueError("accuracy: no batches given; pass at least one batch of images")
    return 100 * float(np.concatenate(hits).mean())


def classify(path: str | Path, picture: str | Path) -> dict[str, float]:
    """The probability of each class for an image file, resized to 32×32; the likeliest first.

    Raises ExportError where the picture can't be read, or `session` does.
    """
    opened = session(path)
    try:
        image = read_image(Path(picture)).resize(SHAPE[1:])
    except ValueError as error:
        raise ExportError(str(error)) from error
    pixels = (np.asarray(image, np.float32).transpose(2, 0, 1) / 255 - 0.5) / 0.5
    scores = logits(opened, pixels[None])[0]
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    names = json.loads(opened.get_modelmeta().custom_metadata_map.get("classes", "[]"))
    names = names or [f"class {k}" for k in range(len(shares))]
    return {names[k]: float(shares[k]) for k in np.argsort(-shares)}


def _needed(package: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        way_out = "pip install -r requirements-export.txt"
        raise ExportError(f"export needs {package} ({error}): {way_out}") from error


def _write(content, path: str | Path) -> None:
    from utils.store.files import write_whole

    write_whole(path, content.SerializeToString(deterministic=True))


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # names of classes, on Windows too
    if len(sys.argv) != 3:
        sys.exit("usage: python -m utils.export <network>.onnx <picture>")
    try:
        for name, share in list(classify(*sys.argv[1:]).items())[:3]:
            print(f"{share:6.1%}  {name}")
    except ExportError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
