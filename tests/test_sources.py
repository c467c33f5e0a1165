"""Where images come from, and what happens when files or networks fail."""

import errno
import hashlib
import http.client
import io
import os
import pickle
import runpy
import shutil
import struct
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import zlib
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request

import numpy as np
import pytest
import torch
import torchvision
from faults import HTML, Trap
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder

from utils.images import prepare, sources
from utils.images.pictures import read_image
from utils.images.sources import load_data


def test_digits_are_those_of_scikit_learn_twice_as_large_in_two_balanced_splits():
    digits = load_data("digits")
    assert digits.classes == tuple("0123456789") and digits.input_shape == (3, 16, 16)
    label_of = {}
    for image, label in zip(load_digits().images, load_digits().target, strict=True):
        large = Image.fromarray((255 / 16 * image).astype(np.float32)).resize((16, 16), 2)
        label_of[np.round(large).astype(np.uint8).tobytes() * 3] = label
    found = {}
    for split, count in (("train", 1437), ("test", 360)):
        images, labels = getattr(digits, f"{split}_images"), getattr(digits, f"{split}_labels")
        assert len(images) == count and labels.bincount().max() - labels.bincount().min() <= 10
        found |= {i.numpy().tobytes(): int(k) for i, k in zip(images, labels, strict=True)}
    assert found == label_of and len(found) == 1797  # so none is in both


NO_UTF8 = b"\xbf\xdf.txt".decode("utf-8", "surrogateescape") if sys.platform == "linux" else "\t"
"""A name as an archive packed elsewhere may leave it; other systems refuse such names."""

COLOURS = {"猫": (250, 10, 20), "собака 2": (10, 240, 30)}


@pytest.fixture
def folder(tmp_path):
    """Two classes of one colour each, PNG and JPEG of 20×12 pixels, with a path that few tools
    expect."""
    root = tmp_path / "my images – Ünïcode 写真"
    for split, count in (("train", 3), ("test", 2)):
        for name, (red, green, blue) in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for k in range(count):  # no image of test is one of train
                colour = (red - k, green - k, blue + 3 * (split == "test"))
                file = root / split / name / f"{k} ä.{'png' if k % 2 else 'jpg'}"
                Image.new("RGB", (20, 12), colour).save(file, quality=95)
    return root


def noise(width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def contents(folder) -> dict[str, bytes]:
    """All files but the locks."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != ".locks"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_folder_is_read_as_torchvision_reads_it_and_without_a_word(folder, capsys):
    data = load_data(str(folder))
    assert capsys.readouterr().out == ""
    assert data.name == folder.name and data.input_shape == (3, 12, 20)
    for split in ("train", "test"):
        expected = ImageFolder(folder / split)
        assert list(data.classes) == expected.classes
        assert getattr(data, f"{split}_labels").tolist() == expected.targets
        pixels = np.stack([np.asarray(image) for image, _ in expected])
        found = getattr(data, f"{split}_images").permute(0, 2, 3, 1)
        assert np.array_equal(found.numpy(), pixels)


def test_what_rgb_can_hold_is_held_and_turned_upright(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # "turn by 90° clockwise"
    for image in (noise().quantize(16), *(noise().convert(mode) for mode in ("L", "1", "RGBA"))):
        image.save(tmp_path / "x.png", exif=turned)
        upright = np.rot90(image.convert("RGB"), -1)
        assert np.array_equal(read_image(tmp_path / "x.png"), upright)


def saved(image: Image.Image, ending: str, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, ending, **options)
        return file.getvalue()


def png_of_16_bits() -> bytes:
    """In RGB, which Pillow can't write."""
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(64)) * 3) * 32)
    parts = b"IHDR" + header, b"IDAT" + rows, b"IEND"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))
        for part in parts
    )


def one_clear_pixel() -> Image.Image:
    image = noise().convert("RGBA")
    image.putpixel((5, 5), (1, 2, 3, 254))
    return image


TWO = {"save_all": True, "append_images": [noise().rotate(90)]}
LOST = {
    "16-bit.png": saved(Image.fromarray(np.full((32, 32), 30_000, np.uint16)), "PNG"),
    "16-bit RGB.png": png_of_16_bits(),
    "CMYK.jpg": saved(noise().convert("CMYK"), "JPEG"),
    "clear pixel.png": saved(one_clear_pixel(), "PNG"),
    "clear colour.png": saved(noise().quantize(16), "PNG", transparency=3),
    "two.tif": saved(noise(), "TIFF", **TWO),
}


@pytest.mark.parametrize("name", LOST)
def test_what_rgb_would_lose_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(LOST[name])
    with pytest.raises(ValueError, match="8-bit RGB can't hold") as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_what_is_no_image_of_a_class_is_skipped_counted_and_named(folder, capsys):
    before = load_data(str(folder))
    cat = folder / "train" / "猫"
    for name in (".ipynb_checkpoints", "__MACOSX", "猫/more", "猫/looks like.png"):
        (folder / "train" / name).mkdir()
        noise().save(folder / "train" / name / "x.png")
    for name in ("._x.png", ".DS_Store", "Thumbs.db"):
        (cat / name).write_bytes(b"what systems leave behind")
    noise().save(folder / "train" / "loose.png")
    for name in (NO_UTF8, "a note.txt"):
        (cat / name).write_text("a note")
    assert load_data(str(folder)).digest == before.digest
    (said,) = capsys.readouterr().out.splitlines()
    assert "skipped 5 " in said and str(folder) in said
    assert all(name in said for name in ("more", "looks like.png", "loose.png", "note.txt"))


def test_test_images_that_are_training_images_are_counted(folder, capsys):
    for name in COLOURS:
        shutil.copytree(folder / "train" / name, folder / "test" / name, dirs_exist_ok=True)
    load_data(str(folder))
    assert "6 of the 6 test images" in capsys.readouterr().out


def test_a_class_is_named_by_its_folder_however_an_accent_is_spelt(folder):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        name = unicodedata.normalize(form, "café $5_to_$10 👩‍👧")
        (folder / split / "猫").rename(folder / split / name)
    data = load_data(str(folder))
    assert data.classes == ("café $5_to_$10 👩‍👧", "собака 2")
    assert data.train_labels.bincount().tolist() == [3, 3]
    assert data.test_labels.bincount().tolist() == [2, 2]


@pytest.mark.parametrize("name", ["two\nlines", "\u3000", NO_UTF8])
def test_what_can_not_name_a_class_is_refused(folder, name):
    for split in ("train", "test"):
        (folder / split / "猫").rename(folder / split / name)
    with pytest.raises(ValueError, match=r"can't be the name of a class.*rename") as caught:
        load_data(str(folder))
    assert repr(str(folder)) in str(caught.value) and repr(name) in str(caught.value)


def test_a_folder_is_found_however_its_path_is_typed(folder, monkeypatch):
    folder.rename(folder.with_name("digits"))  # by its path, it's no built-in data set
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for typed in ("./digits", "~/digits", f"'{folder.parent}/digits'"):
        assert load_data(typed).classes == tuple(sorted(COLOURS))


@pytest.mark.parametrize("typed", ["cifar100", "./digits"])
def test_where_no_folder_is_the_error_says_where_and_what_there_is(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    wanted = f"no image in {tmp_path / typed}/train/<class>; .*data = 'digits' and data = 'cifar10'"
    with pytest.raises(ValueError, match=wanted):
        load_data(typed)


CAT = "train/猫"


@pytest.mark.parametrize("content", [saved(noise(), "PNG")[:-100], HTML])
def test_a_broken_image_is_named(folder, content):
    (folder / CAT / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"{CAT}/x.png: can't be used as an image"):
        load_data(str(folder))


def test_images_of_two_sizes_or_too_large_are_named_and_the_way_out(folder):
    noise(12, 20).save(folder / "test/猫/1 ä.png")
    with pytest.raises(ValueError, match=r"utils\.images\.prepare") as caught:
        load_data(str(folder))
    assert f"{folder}/train/собака 2/0 ä.jpg: 20×12" in str(caught.value)
    assert f"{folder}/test/猫/1 ä.png: 12×20" in str(caught.value)
    for file in folder.rglob("*.*g"):
        Image.new("RGB", (20, 257)).save(file)
    with pytest.raises(ValueError, match=r"256×256(.|\n)*20×257(.|\n)*utils\.images\.prepare"):
        load_data(str(folder))


def empty(folder):
    for file in (folder / CAT).iterdir():
        file.rename(file.with_suffix(".gone"))


MISSING = {
    "no image in train/猫;": empty,
    "no image in test/猫;": lambda folder: shutil.rmtree(folder / "test/猫"),
    "two or more": lambda folder: [shutil.rmtree(folder / s / "猫") for s in ("train", "test")],
    "no image in test/собака 2, test/猫;": lambda folder: (folder / "test").rename(folder / "val"),
}


@pytest.mark.parametrize("said", MISSING)
def test_a_folder_that_does_not_fit_is_named(folder, said):
    MISSING[said](folder)
    with pytest.raises(ValueError, match=said) as caught:
        load_data(str(folder))
    assert f"data = {str(folder)!r}" in str(caught.value)


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    runpy.run_path(prepare.__file__, run_name="__main__")


def test_a_copy_has_one_size_and_the_source_stays(folder, tmp_path, monkeypatch, capsys):
    cat, target = folder / "train" / "猫", tmp_path / "new" / "copy"
    two_halves = Image.new("RGB", (300, 200), "white")
    two_halves.paste("black", (0, 0, 150, 200))  # on the left
    two_halves.save(cat / "9.jpg", quality=100)
    noise(40, 90).convert("L").save(cat / "9.png")  # differs from 9.jpg in its ending alone
    noise().save(cat / f"{'x' * 251}.png")  # as long as a name can be
    before = contents(folder)
    command(monkeypatch, folder, target, "--size", "24")
    assert contents(folder) == before
    said = capsys.readouterr().out
    assert "13 images" in said and str(target) in said
    data = load_data(str(target))
    assert data.input_shape == (3, 24, 24) and data.train_labels.bincount().tolist() == [3, 6]
    halves = data.train_images[6].float()
    assert halves[:, :, :10].max() < 10 and halves[:, :, 14:].min() > 245


def test_images_that_can_not_be_kept_are_all_named_and_nothing_is_left(
    folder, tmp_path, monkeypatch
):
    bad = [folder / "train" / "猫" / "clear.png", folder / "test" / "猫" / "page.jpg"]
    one_clear_pixel().save(bad[0])
    bad[1].write_bytes(HTML)
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, folder, tmp_path / "copy")
    assert all(str(file) in str(caught.value) for file in bad)
    assert "2 of 12 images" in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("where", "size"), [("copy", 32), ("new", 0), ("new", 257)])
def test_a_copy_is_never_made_over_something_or_of_no_size(
    folder, tmp_path, monkeypatch, where, size
):
    source = folder.rename(tmp_path / "images")
    (tmp_path / "copy").mkdir()
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, source, tmp_path / where, "--size", size)
    said = str(caught.value)
    assert f"size = {size}" in said if where == "new" else f"target = '{tmp_path / where}'" in said
    assert contents(tmp_path) == before


NAME = "cifar-10-python.tar.gz"


def stand_in() -> tuple[bytes, dict[str, bytes], np.ndarray]:
    """An archive with the layout of CIFAR-10, six images large, its files, and their pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)
    parts = {
        name: {"data": noise[k : k + 1], "labels": [k]}
        for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
    }
    parts["batches.meta"] = {"label_names": [f"class {k}" for k in range(10)]}
    packed, files = io.BytesIO(), {name: pickle.dumps(part) for name, part in parts.items()}
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, raw in sorted({**files, "readme.html": HTML}.items(), reverse=True):
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return packed.getvalue(), files, noise.reshape(6, 3, 32, 32)


ARCHIVE, FILES, PIXELS = stand_in()
KEPT = f"cifar-10-python-{hashlib.md5(ARCHIVE).hexdigest()[:8]}.tar.gz"


ANSWERS = {
    "good": ARCHIVE,
    "slow": ARCHIVE,
    "truncated": ARCHIVE[:500],
    "wrong": ARCHIVE[:-9] + b"123456789",
    "page": HTML,
    "missing": HTTPError("", 404, "Not Found", None, None),
    "stalled": TimeoutError("timed out"),
    "garbage": http.client.BadStatusLine("!?"),
    "nobody": URLError(ConnectionRefusedError("refused")),
}
ASKED: list[str] = []


class Answer(io.BytesIO):
    length = None  # as where a server does not tell it


def answer(request: Request, timeout: float) -> Answer:
    how = request.host
    ASKED.append(how)
    assert timeout == 30
    if how == "slow":
        time.sleep(0.5)
    if isinstance(ANSWERS[how], Exception):
        raise ANSWERS[how]
    return Answer(ANSWERS[how])


@pytest.fixture
def places(monkeypatch):
    """places("missing", "good"): CIFAR-10 comes from these, each of which fails in its own way."""
    sums = {name: hashlib.md5(raw).hexdigest() for name, raw in FILES.items()}
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(sources, "ARCHIVE_MD5", hashlib.md5(ARCHIVE).hexdigest())
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[n, sums[n]] for n, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setattr(sources, "urlopen", answer)
    ASKED.clear()

    def serve(*names):
        monkeypatch.setattr(sources, "CIFAR10_PLACES", tuple(f"http://{n}/{NAME}" for n in names))

    serve("missing")
    return serve


@pytest.fixture
def unpacked(tmp_path) -> Path:
    """What torchvision or tar left in tmp_path, and a note of the user's."""
    (folder := tmp_path / "cifar-10-batches-py").mkdir()
    for name, raw in {**FILES, "notes.txt": b"mine"}.items():
        (folder / name).write_bytes(raw)
    return folder


def assert_loads(root, asked=()) -> None:
    """CIFAR-10 is loaded from `root`, and these places have been asked, each once."""
    data = load_data("cifar10", root)
    assert data.name == "CIFAR-10" and data.classes == tuple(f"class {k}" for k in range(10))
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4] and data.test_labels.tolist() == [5]
    assert np.array_equal(torch.cat([data.train_images, data.test_images]).numpy(), PIXELS)
    assert list(asked) == ASKED


def test_when_one_place_fails_the_next_is_asked(places, tmp_path):
    asked = ["missing", "truncated", "wrong", "page", "stalled", "garbage", "good"]
    places(*asked, "nobody")
    for _ in range(2):  # fetched once, it needs no network
        assert_loads(tmp_path, asked)
        assert contents(tmp_path) == {KEPT: ARCHIVE}


def test_two_notebooks_at_once_fetch_it_once(places, tmp_path):
    places("slow")
    second = threading.Thread(target=load_data, args=("cifar10", tmp_path))
    second.start()
    load_data("cifar10", tmp_path)
    second.join()
    assert ASKED == ["slow"] and contents(tmp_path) == {KEPT: ARCHIVE}


def test_when_every_place_fails_each_is_named_and_the_way_out(places, tmp_path):
    places("missing", "page", "nobody")
    with pytest.raises(ConnectionError) as caught:
        load_data("cifar10", tmp_path)
    for said in ("//missing/", "//page/", "//nobody/", "404", "refused", f"{tmp_path} by hand"):
        assert said in str(caught.value)
    assert contents(tmp_path) == {}


def test_an_archive_or_a_folder_put_there_by_hand_is_used(places, tmp_path, unpacked):
    name = "cifar-10-python (1).tar.gz"  # as a browser may call it
    for _ in range(2):
        before = contents(tmp_path)
        assert_loads(tmp_path)
        assert contents(tmp_path) == before
        shutil.rmtree(unpacked, ignore_errors=True)
        (tmp_path / name).write_bytes(ARCHIVE)


@pytest.mark.parametrize("mine", [NAME, f"{NAME}/mine"])
def test_what_has_the_name_of_the_archive_stays_and_is_not_used(places, tmp_path, mine):
    places("good")
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_bytes(b"mine")
    for _ in range(2):  # the second time, what was fetched is found beside it
        assert_loads(tmp_path, ["good"])
    assert contents(tmp_path) == {mine: b"mine", KEPT: ARCHIVE}


@pytest.mark.parametrize("file", ["batches.meta", "data_batch_3", "test_batch"])
def test_a_folder_that_is_not_whole_is_named_and_left_as_it_is(places, tmp_path, unpacked, file):
    (unpacked / file).write_bytes(FILES[file][:-1] + b"\0")
    if file == "test_batch":
        (unpacked / file).unlink()
    before = contents(tmp_path)
    with pytest.raises(ConnectionError, match=f"{unpacked}: is damaged or not whole"):
        load_data("cifar10", tmp_path)
    assert contents(tmp_path) == before
    places("good")
    assert_loads(tmp_path, ["missing", "good"])
    assert contents(tmp_path) == before | {KEPT: ARCHIVE}


def test_no_pickle_is_run_before_its_checksum_is_compared(places, tmp_path, unpacked):
    trap = pickle.dumps(Trap(tmp_path / "canary"))
    for name in FILES:
        (unpacked / name).write_bytes(trap)
    with tarfile.open(tmp_path / NAME, "w:gz") as archive:
        archive.add(unpacked, unpacked.name)
    with pytest.raises(ConnectionError):
        load_data("cifar10", tmp_path)
    assert not (tmp_path / "canary").exists()


def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_folder_that_can_only_be_read_is_told_before_the_download(places, tmp_path, monkeypatch):
    places("good")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError):
        load_data("cifar10", tmp_path)
    (tmp_path / NAME).write_bytes(ARCHIVE)
    assert_loads(tmp_path)  # which a whole archive in it needs not


def test_a_disk_that_is_full_is_no_failed_download(places, tmp_path, monkeypatch):
    places("good")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="could not be written") as caught:
        load_data("cifar10", tmp_path)
    assert not isinstance(caught.value, ConnectionError)
    assert ASKED == ["good"] and contents(tmp_path) == {}
