"""A network taken along: an ONNX file, its int8 form, and what runs them without torch.

    python -m utils.export figures/<run>/slim_90_int8.onnx picture.png

needs ONNX Runtime, numpy and Pillow alone: torch is imported only where a network is given.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from utils.images.pictures import read_image

INPUT, OUTPUT = "images", "logits"
TOLERANCE = 2e-5  # of the largest |logit|, between torch and ONNX Runtime


class ExportError(Exception):
    """A file or network that can't be exported, quantized or run; the message names the way out."""


def export_onnx(
    model, path: str | Path, *, classes: Sequence[str] = (), input_shape=(3, 32, 32)
) -> None:
    """Write `model`, BN folded, to one ONNX file: "images" (batch, 3, h, w) → "logits".

    The batch size is free; the same network gives the same bytes. `classes`, one for each logit,
    are kept in the file. Raises ExportError for classes that don't fit."""
    _needed("onnx")
    _needed("onnxscript")  # torch would name it, but not the way out
    import torch

    from utils.cost import fold_bn

    wanted = model.classifier.out_features
    if classes and len(classes) != wanted:
        raise ExportError(f"{len(classes)} classes for {wanted} logits: pass one for each")
    content = torch.onnx.export(
        fold_bn(model).to("cpu", memory_format=torch.contiguous_format),
        (torch.zeros(2, *input_shape),),  # not one: that would be taken for a constant
        input_names=[INPUT], output_names=[OUTPUT], dynamo=True, external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
    ).model_proto  # fmt: skip
    graph = content.graph
    parts = [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for part in (content, graph, *parts):
        # Each node carries the source lines it came from, with this machine's absolute paths.
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    _write(content, {"classes": json.dumps(list(classes))}, path)


def check_parity(model, path: str | Path, images) -> float:
    """The largest difference between the logits of `model` and of the float32 file made from it,
    as a share of the largest |logit|, over `images` (n, 3, h, w) from −1 to 1. Raises ExportError
    where it is over TOLERANCE, or where an image gets another class."""
    from utils.cost import fold_bn

    expected = fold_bn(model).cpu()(images.cpu()).detach().numpy()
    found = logits(session(path), images.cpu().numpy())
    share = float(np.abs(found - expected).max() / np.abs(expected).max())
    changed = int((found.argmax(1) != expected.argmax(1)).sum())
    if not share <= TOLERANCE or changed:  # `not`: NaN is no parity
        raise ExportError(
            f"{path} is not this network: {changed} of {len(images)} images get another class, "
            f"logits differ by {share:.2g} of the largest. Export the network that is compared."
        )
    return share


def quantize_int8(path: str | Path, batches: Iterable[tuple], path8: str | Path) -> None:
    """Write the int8 form of the ONNX file `path` to `path8`: static, weights per output channel.

    `batches` yields (images, labels) of the training set; an activation's range is the one seen
    there. Raises ExportError where `session` does."""
    onnx = _needed("onnx")
    properties = session(path).get_modelmeta().custom_metadata_map
    from onnxruntime.quantization import quant_pre_process, quantize_static

    feeds = ({INPUT: images.cpu().numpy()} for images, _ in batches)
    reader = SimpleNamespace(get_next=partial(next, feeds, None))
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        # Weights of 7 bits: x86 without VNNI adds pairs of products in 16 bits, where 8 overflow.
        quantize_static(prepared, quantized, reader, per_channel=True, reduce_range=True)
        _write(onnx.load(quantized), properties, path8)


def session(path: str | Path, num_threads: int = 1):
    """The file as an InferenceSession of ONNX Runtime, on `num_threads` of the CPU. Raises
    ExportError where it is missing, can't be run, or takes other images than the lab's."""
    runtime = _needed("onnxruntime")
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
    takes = [(i.name, i.type, i.shape) for i in opened.get_inputs()]
    match takes:
        case [(name, "tensor(float)", [_, 3, int(), int()])] if name == INPUT:
            return opened
    raise ExportError(f"{path}: takes {takes}, not the lab's images; choose a file of export_onnx")


def logits(opened, images: np.ndarray) -> np.ndarray:
    """What a session makes of (n, 3, h, w) float32 from −1 to 1: (n, classes)."""
    return opened.run([OUTPUT], {INPUT: images})[0]


def accuracy(opened, batches: Iterable[tuple]) -> float:
    """Of a session, in %, over (images, labels) batches; at least one."""
    hits = [logits(opened, x.cpu().numpy()).argmax(1) == y.cpu().numpy() for x, y in batches]
    return 100 * float(np.concatenate(hits).mean())


def classify(path: str | Path, picture: str | Path) -> dict[str, float]:
    """The probability of each class for an image file, in the size that the network takes; the
    likeliest first. Raises ValueError where the picture can't be read, ExportError as `session`."""
    opened = session(path)
    height, width = opened.get_inputs()[0].shape[2:]
    image = read_image(Path(picture)).resize((width, height))
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


def _write(content, properties: dict[str, str], path: str | Path) -> None:
    from onnx.helper import set_model_props

    from utils.store.files import write_whole

    set_model_props(content, properties)
    write_whole(path, content.SerializeToString(deterministic=True))


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # names of classes, on Windows too
    if len(sys.argv) != 3:
        sys.exit("usage: python -m utils.export <network>.onnx <picture>")
    try:
        for name, share in list(classify(*sys.argv[1:]).items())[:3]:
            print(f"{share:6.1%}  {name}")
    except (ExportError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
