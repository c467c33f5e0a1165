"""utils/export.py: the files that leave the lab, and what runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from models.vgg import VGG
from utils import export
from utils.export import (
    ExportError,
    accuracy,
    check_parity,
    classify,
    export_onnx,
    logits,
    quantize_int8,
    session,
)

onnx = pytest.importorskip("onnx", reason="pip install -r requirements-export.txt")
pytest.importorskip("onnxscript", reason="pip install -r requirements-export.txt")
pytest.importorskip("onnxruntime", reason="pip install -r requirements-export.txt")

ROOT = Path(__file__).parent.parent
HEIGHT, WIDTH = 16, 24
CLASSES = ("cat", "dog", "☂")


def network(seed: int = 0) -> VGG:
    """A network whose BN layers do something and that sees every class in noise."""
    torch.manual_seed(seed)
    model = VGG([4, "M", 6, "M", 5], num_classes=3)
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
            bn.momentum = 1  # the statistics are those of the next batch
    nn.init.normal_(model.classifier.weight)
    with torch.no_grad():
        model(noise(seed=1))
        model.eval().classifier.bias -= model(noise(seed=1)).mean(0)
    return model


def noise(n: int = 256, seed: int = 0) -> torch.Tensor:
    """Images from −1 to 1, of many colours: each channel of each has a brightness of its own."""
    draw = torch.Generator().manual_seed(seed)
    light = torch.rand(n, 3, 1, 1, generator=draw)
    return (
        torch.rand(n, 3, HEIGHT, WIDTH, generator=draw).sub(1).mul(light).add(light).mul(2).sub(1)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """The network in float32 and in int8: one export, which takes seconds, for all tests."""
    folder = tmp_path_factory.mktemp("export")
    path, path8 = folder / "network.onnx", folder / "network_int8.onnx"
    export_onnx(network(), path, classes=CLASSES, input_shape=(3, HEIGHT, WIDTH))
    quantize_int8(path, [(noise(seed=1), torch.zeros(256))], path8)
    return path, path8


@pytest.fixture
def labels() -> torch.Tensor:
    """What torch says of `noise()`."""
    with torch.inference_mode():
        found = network()(noise()).argmax(1)
    assert len(found.unique()) == 3, "a network that says one thing proves nothing"
    return found


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = noise(1).add(1).mul(127.5).round().to(torch.uint8)[0]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize("batch", [1, 7])
def test_the_file_gives_the_logits_of_the_network_at_any_batch_size(files, batch):
    images = noise(batch)
    with torch.inference_mode():
        expected = network()(images)
    assert_close(torch.from_numpy(logits(session(files[0]), images.numpy())), expected)


def test_parity_holds_for_the_network_that_was_exported_and_for_no_other(files):
    assert 0 < check_parity(network(), files[0], noise()) <= 2e-5
    nearly = network()
    with torch.no_grad():
        nearly.classifier.bias[0] += 1e-3
    for other in (nearly, network(seed=1)):
        with pytest.raises(ExportError, match="is not this network"):
            check_parity(other, files[0], noise(9))
    with pytest.raises(ExportError, match="is not this network"):
        check_parity(network(), files[0], noise(9) * float("nan"))


def test_parity_sees_a_difference_that_shows_in_one_image_only(files):
    """Where there is no red, it does not matter what the network makes of red."""
    images, other = noise(9), network()
    images[:-1, 0] = 0
    with torch.no_grad():
        other.feature[0].weight[:, 0] *= 2
    assert check_parity(other, files[0], images[:-1]) <= 2e-5
    with pytest.raises(ExportError, match=r"network\.onnx .*[01] of 9 images"):
        check_parity(other, files[0], images)


@pytest.mark.parametrize(
    ("found", "share"), [([4.0, 1.0, 2.00004], 1e-5), ([4.0, 1.0, 2.0001], None)]
)
def test_parity_is_the_largest_difference_as_a_share_of_the_largest_logit(
    monkeypatch, found, share
):
    model = network()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([4.0, 1.0, 2.0]))
    monkeypatch.setattr(export, "session", lambda path: path)
    monkeypatch.setattr(export, "logits", lambda _, images: np.float32(len(images) * [found]))
    if share is None:
        with pytest.raises(ExportError, match=r"logits differ by 2\.5e-05 of the largest"):
            check_parity(model, "x", noise(2))
    else:
        assert check_parity(model, "x", noise(2)) == pytest.approx(share, rel=0.02)


def test_parity_refuses_another_class_however_near_the_logits_are(monkeypatch):
    model = network()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([4.0, 4.00001, 1.0]))
    monkeypatch.setattr(export, "session", lambda path: path)
    swapped = np.float32([[4.00001, 4.0, 1.0]])
    monkeypatch.setattr(export, "logits", lambda _, images: np.repeat(swapped, len(images), 0))
    with pytest.raises(ExportError, match="2 of 2 images get another class"):
        check_parity(model, "x", noise(2))


def test_the_same_network_gives_the_same_bytes_in_one_file_wherever_it_lies(files, tmp_path):
    model = network().train().to(memory_format=torch.channels_last)
    shape = (3, HEIGHT, WIDTH)
    export_onnx(model, tmp_path / "again.onnx", classes=CLASSES, input_shape=shape)
    assert (tmp_path / "again.onnx").read_bytes() == files[0].read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.onnx"]
    assert model.training, "the network itself is left as it was"


def test_images_are_32_wide_and_high_if_nothing_else_is_said(monkeypatch, tmp_path):
    class Seen(Exception):
        pass

    def export(_, inputs, **__):
        raise Seen(tuple(inputs[0].shape[1:]))

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(Seen, match=r"3, 32, 32"):
        export_onnx(network(), tmp_path / "network.onnx")


def test_the_classes_are_in_both_files_and_neither_tells_where_it_was_made(files):
    for path in files:
        stored = session(path).get_modelmeta().custom_metadata_map
        assert {k: json.loads(v) for k, v in stored.items()} == {"classes": list(CLASSES)}
        content = path.read_bytes()
        for trace in (ROOT, Path(torch.__file__).parent, path.parent):
            assert str(trace).encode() not in content
        assert b"vgg.py" not in content


def test_int8_says_what_the_network_says_with_signed_weights_of_a_scale_a_channel(files, labels):
    batches = [*zip(noise().split(100), labels.split(100), strict=True)]
    assert accuracy(session(files[0]), batches) == 100
    assert accuracy(session(files[1]), batches) >= 97
    stored = {t.name: t for t in onnx.load(files[1]).graph.initializer}
    weights = [t for t in stored.values() if len(t.dims) == 4]
    assert sorted(t.dims[0] for t in weights) == [4, 5, 6]
    for t in weights:
        assert t.data_type == onnx.TensorProto.INT8
        scale = stored[t.name.replace("_quantized", "_scale")]
        assert list(scale.dims) == [t.dims[0]]
        # Seven bits: the products of old processors don't overflow.
        assert 60 <= abs(onnx.numpy_helper.to_array(t).astype(int)).max() <= 64


def test_int8_is_calibrated_with_every_batch(files, tmp_path):
    dark, bright = noise(8, seed=2) * 0.1, noise(8, seed=3)
    for name, batches in (("two", (dark, bright)), ("one", (torch.cat([dark, bright]),))):
        quantize_int8(files[0], [(images, None) for images in batches], tmp_path / name)
    quantize_int8(files[0], [(dark, None)], tmp_path / "dark")
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert content["two"] == content["one"] != content["dark"]


def test_accuracy_counts_images_not_batches(files, labels):
    half_wrong = labels.clone()
    half_wrong[:64] = (labels[:64] + 1) % 3
    batches = [*zip(noise().split(200), half_wrong.split(200), strict=True)]
    assert accuracy(session(files[0]), batches) == 75


def test_a_picture_is_classified_where_torch_cannot_be_imported(files, picture):
    """ONNX Runtime, numpy and Pillow do; the classes come with the file."""
    without = "import runpy, sys\n" + "".join(
        f"sys.modules[{name!r}] = None\n" for name in ("torch", "torchvision", "onnx", "onnxscript")
    )
    run = "runpy.run_module('utils.export', run_name='__main__', alter_sys=True)"
    assert Image.open(picture).size == (WIDTH, HEIGHT)
    done = subprocess.run(
        [sys.executable, "-c", without + run, str(files[0]), str(picture)],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():  # 8 bits a colour move the probabilities a little
        shares = network()(noise(1)).softmax(1)[0]
    order = shares.argsort(descending=True).tolist()
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for _, name in lines] == [CLASSES[k] for k in order]
    found = torch.tensor([float(share.rstrip("%")) / 100 for share, _ in lines])
    assert_close(found, shares[order], atol=0.02, rtol=0)


def test_a_picture_of_another_size_is_resized_to_what_the_network_takes(files, picture):
    large = Image.open(picture).resize((3 * WIDTH, 3 * HEIGHT), Image.Resampling.NEAREST)
    large.save(picture.with_name("large.png"))
    same = Image.open(picture).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
    same.save(picture)
    small, found = classify(files[0], picture), classify(files[0], picture.with_name("large.png"))
    assert sum(found.values()) == pytest.approx(1) and list(found) == list(small)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_file_without_classes_numbers_them(files, picture, tmp_path):
    bare = onnx.load(files[0])
    bare.ClearField("metadata_props")
    onnx.save(bare, tmp_path / "bare.onnx")
    found, named = classify(tmp_path / "bare.onnx", picture), classify(files[0], picture)
    assert [CLASSES[int(name.removeprefix("class "))] for name in found] == list(named)


def test_what_is_no_picture_is_refused(files, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.png: can't be used as an image"):
        classify(files[0], tmp_path / "page.png")


def test_what_is_no_network_of_the_lab_is_refused(files, tmp_path):
    with pytest.raises(ExportError, match=r"gone\.onnx: .*File doesn't exist"):
        session(tmp_path / "gone.onnx")
    (tmp_path / "page.onnx").write_text("<html>")
    with pytest.raises(ExportError, match=r"page\.onnx: ONNX Runtime .* can't run it"):
        session(tmp_path / "page.onnx")
    unknown = onnx.load(files[0])
    unknown.graph.node[0].op_type = "FutureConv"
    onnx.save(unknown, tmp_path / "unknown.onnx")
    with pytest.raises(ExportError, match=r"FutureConv.*get a newer runtime"):
        session(tmp_path / "unknown.onnx")
    free = onnx.load(files[0])
    free.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(free, tmp_path / "free.onnx")
    for use in (session, lambda path: quantize_int8(path, [(noise(1), None)], tmp_path / "8.onnx")):
        with pytest.raises(ExportError, match=r"'height', 24.*, not the lab's images"):
            use(tmp_path / "free.onnx")


def test_classes_must_be_one_for_each_logit(tmp_path):
    with pytest.raises(ExportError, match="2 classes for 3 logits"):
        export_onnx(network(), tmp_path / "network.onnx", classes=CLASSES[:2])


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("onnx", lambda path: export_onnx(network(), path)),
        ("onnxscript", lambda path: export_onnx(network(), path)),
        ("onnx", lambda path: quantize_int8(path, [(noise(1), None)], path)),
        ("onnxruntime", session),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(files, monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    before = files[0].read_bytes()
    with pytest.raises(ExportError, match=rf"{package}.*pip install -r requirements-export\.txt"):
        use(files[0])
    assert files[0].read_bytes() == before


def test_a_session_takes_the_threads_it_is_given(files):
    options = session(files[0], num_threads=2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_one_wrong_command_line_is_answered_in_one_line(monkeypatch):
    for arguments, answer in (["gone.onnx", "a.png"], r"^gone\.onnx: .*exist"), ([], "^usage"):
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        with pytest.raises(SystemExit, match=answer):
            export.main()
