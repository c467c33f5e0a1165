"""Where images come from, and what happens when files or networks fail."""

import errno
import hashlib
import io
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import time
import unicodedata
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision
from faults import HTML
from PIL import Image
from torch.testing import assert_close
from torchvision.datasets import ImageFolder

from utils.images import prepare, sources
from utils.images.data import ImageData
from utils.images.sources import load_data
from utils.store import files
from utils.store.files import file_lock

# --- digits --------------------------------------------------------------------------------------


def test_digits_are_1797_different_places_in_two_balanced_disjoint_splits():
    digits = load_data("digits")
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.classes == tuple("0123456789")
    shares = digits.test_labels.bincount() / (
        digits.train_labels.bincount() + digits.test_labels.bincount()
    )
    assert_close(shares, torch.full((10,), 0.2), atol=0.01, rtol=0)
    sizes = digits.train_labels.bincount()
    assert sizes.max() - sizes.min() <= 10

    def contents(images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        assert images.min() == 0 and images.max() > 240
        return Counter(image.numpy().tobytes() for image in images)

    assert not contents(digits.train_images) & contents(digits.test_images)
    assert load_data("digits").digest == digits.digest


# --- a folder of images --------------------------------------------------------------------------

COLOURS = {"猫": (250, 10, 20), "собака 2": (10, 240, 30)}


@pytest.fixture
def folder(tmp_path):
    """Two classes of one colour each, PNG and JPEG, with a path that few tools expect."""
    root = tmp_path / "my images – Ünïcode 写真"
    for split, count in (("train", 3), ("test", 2)):
        for name, (red, green, blue) in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for k in range(count):  # no image of test is one of train
                colour = (red - k, green - k, blue + 3 * (split == "test"))
                file = root / split / name / f"{k} ä.{'png' if k % 2 else 'jpg'}"
                Image.new("RGB", (32, 32), colour).save(file, quality=95)
    return root


def noise(size: tuple[int, int] = (32, 32)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_a_folder_is_read_as_torchvision_reads_it_and_without_a_word(folder, capsys):
    data = load_data(str(folder))
    assert capsys.readouterr().out == ""
    assert data.name == folder.name
    for split in ("train", "test"):
        expected = ImageFolder(folder / split)
        assert list(data.classes) == expected.classes
        assert getattr(data, f"{split}_labels").tolist() == expected.targets
        pixels = np.stack([np.asarray(image) for image, _ in expected])
        found = getattr(data, f"{split}_images").permute(0, 2, 3, 1)
        assert np.array_equal(found.numpy(), pixels)


def last_image_when_added(folder, image, name="9.png", **options):
    """The pixels of the last training image, (32, 32, 3), with `image` saved as that one."""
    image.save(folder / "train" / "猫" / name, **options)
    return load_data(str(folder)).train_images[-1].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "image",
    [noise().convert("L"), noise().convert("1"), noise().quantize(16), noise().convert("RGBA")],
    ids=lambda image: image.mode,
)
def test_what_rgb_can_hold_is_held(folder, image):
    found = last_image_when_added(folder, image)
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["9.png", "9.webp", "9.tif"])
def test_a_picture_is_turned_upright(folder, name):
    turned = Image.Exif()
    turned[0x0112] = 6  # "turn by 90° clockwise"
    options = {"exif": turned} | ({"lossless": True} if name == "9.webp" else {})
    found = last_image_when_added(folder, noise(), name, **options)
    assert np.array_equal(found, np.rot90(np.asarray(noise()), -1))


def png_of_16_bits(colour_type: int, channels: int) -> bytes:
    """Pillow can't write this one: 16 bits for each of several channels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 32, 32, 16, colour_type, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(64)) * channels) * 32)
    parts = (b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _saved(image, **options):
    def save(path):
        image.save(path, **options)

    return save


def _one_clear_pixel(mode="RGBA"):
    image = noise().convert("RGBA")
    image.putpixel((5, 5), (1, 2, 3, 254))
    return image.convert(mode)


LOST = {
    "16-bit grey": ("png", _saved(Image.fromarray(np.full((32, 32), 30_000, np.uint16)))),
    "16-bit RGB": ("png", lambda path: path.write_bytes(png_of_16_bits(2, 3))),
    "16-bit grey and alpha": ("png", lambda path: path.write_bytes(png_of_16_bits(4, 2))),
    "16-bit TIFF": ("tif", _saved(Image.fromarray(np.full((32, 32), 30_000, np.uint16)))),
    "32-bit integers": ("tif", _saved(Image.fromarray(np.full((32, 32), 30_000, np.int32)))),
    "float": ("tif", _saved(Image.fromarray(np.full((32, 32), 0.5, np.float32)))),
    "CMYK": ("jpg", _saved(noise().convert("CMYK"))),
    "Lab": ("tif", _saved(noise().convert("LAB"))),
    "alpha": ("png", _saved(_one_clear_pixel())),
    "grey and alpha": ("png", _saved(_one_clear_pixel("LA"))),
    "a clear palette colour": ("png", _saved(noise().quantize(16), transparency=3)),
    "animation": ("webp", _saved(noise(), save_all=True, append_images=[noise().rotate(90)])),
    "two pages": ("tif", _saved(noise(), save_all=True, append_images=[noise().rotate(90)])),
}


@pytest.mark.parametrize(("ending", "save"), LOST.values(), ids=LOST)
def test_what_rgb_would_lose_is_refused_by_name(folder, ending, save):
    file = folder / "train" / "猫" / f"lost.{ending}"
    save(file)
    with pytest.raises(ValueError, match="8-bit RGB can't hold") as caught:
        load_data(str(folder))
    assert str(file) in str(caught.value)


def test_what_is_no_image_of_a_class_is_skipped_counted_and_named(folder, capsys):
    before = load_data(str(folder))
    cat = folder / "train" / "猫"
    for name in (".ipynb_checkpoints", "猫/more"):
        (folder / "train" / name).mkdir()
        noise().save(folder / "train" / name / "x.png")
    (cat / "._x.png").write_bytes(b"what a Mac leaves behind")
    noise().save(folder / "train" / "loose.png")
    for k in range(8):
        (cat / f"{k}.txt").write_text("a note")
    found = load_data(str(folder))
    assert found.digest == before.digest
    (said,) = capsys.readouterr().out.splitlines()
    for part in ("2 hidden", ".ipynb_checkpoints", "._x.png", "1 folder", "more", "1 image"):
        assert part in said
    for part in ("loose.png", "8 other file", "4.txt", "3 more", str(folder)):
        assert part in said


def test_test_images_that_are_training_images_are_counted(folder, capsys):
    for name in COLOURS:
        shutil.copytree(folder / "train" / name, folder / "test" / name, dirs_exist_ok=True)
    load_data(str(folder))
    (said,) = capsys.readouterr().out.splitlines()
    assert "6 of the 6 test images" in said


def test_a_class_has_one_name_however_its_accent_is_spelt(folder):
    for split, form in (("train", "NFC"), ("test", "NFD")):
        (folder / split / "猫").rename(folder / split / unicodedata.normalize(form, "café"))
    data = load_data(str(folder))
    assert data.classes == ("café", "собака 2")
    assert data.train_labels.bincount().tolist() == [3, 3]
    assert data.test_labels.bincount().tolist() == [2, 2]


# --- how a folder is named -----------------------------------------------------------------------


def test_a_folder_is_found_however_its_path_is_typed(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for typed in (
        folder.name,
        f"./{folder.name}",
        f"~/{folder.name}",
        f"'{folder}'",
        f'"{folder}"',
    ):
        assert load_data(typed).name == folder.name
    monkeypatch.chdir(folder)
    assert load_data(".").name == folder.name


def test_a_folder_with_the_name_of_a_built_in_data_set_is_a_folder_by_its_path(folder):
    own = folder.rename(folder.with_name("digits"))
    assert load_data(str(own)).classes == tuple(sorted(COLOURS))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("cifar100", "train/<class>/"),
        ("CIFAR-10", "data = 'cifar10'"),
        ("Digits", "data = 'digits'"),
        ("./digits", "data = 'digits'"),
    ],
)
def test_where_no_folder_is_the_error_says_where_and_what_was_meant(
    tmp_path, monkeypatch, typed, said
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        load_data(typed)
    assert f"no folder {tmp_path / typed}" in str(caught.value)


# --- a folder that does not fit ------------------------------------------------------------------


def _wrong_size(folder):
    file = folder / "test" / "猫" / "1 ä.png"
    Image.new("RGB", (31, 40)).save(file)
    return [file, "31×40", "utils.images.prepare"]


def _broken(file, content):
    def break_it(folder):
        path = folder / "train" / "猫" / file
        path.write_bytes(content(path.read_bytes()))
        return [path]

    return break_it


def _a_second_page_without_a_width(_):  # Pillow's error is a TypeError
    page = Image.new("RGB", (32, 32))
    with io.BytesIO() as file:
        page.save(file, "TIFF", save_all=True, append_images=[page])
        head, width, rest = file.getvalue().rpartition(b"\x00\x01\x04\x00")
        return head + b"\xff" + width[1:] + rest


def _empty_class(folder):
    for file in (folder / "train" / "猫").iterdir():
        file.rename(file.with_suffix(".gone"))
    return [folder, "train/猫", ".png"]


def _moved(source, target):
    def move(folder):
        (folder / source).rename(folder / target)
        return [folder, source.split("/")[-1]]

    return move


def _one_class(folder):
    for split in ("train", "test"):
        (folder / split / "猫").rename(folder.parent / split)
    return [folder, "two classes"]


def _no_folder(folder):
    folder.rename(folder.parent / "elsewhere")
    return [folder]


SPOILS = {
    "wrong size": _wrong_size,
    "cut PNG": _broken("1 ä.png", lambda png: png[: len(png) // 2]),
    "cut JPEG": _broken("0 ä.jpg", lambda jpeg: jpeg[:-200]),
    "empty file": _broken("1 ä.png", lambda _: b""),
    "HTML": _broken("1 ä.png", lambda _: HTML),
    "broken second page": _broken("1 ä.png", _a_second_page_without_a_width),
    "empty class": _empty_class,
    "a class of train alone": _moved("test/猫", "猫"),
    "a class of test alone": _moved("train/猫", "猫"),
    "one class": _one_class,
    "no split": _moved("test", "val"),
    "no folder": _no_folder,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_folder_that_does_not_fit_is_named(folder, spoil):
    load_data(str(folder))  # sound before
    named = spoil(folder)
    with pytest.raises(ValueError) as caught:
        load_data(str(folder))
    assert all(str(part) in str(caught.value) for part in named)


# --- a copy in the right size --------------------------------------------------------------------


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
    prepare.main()


def test_a_copy_has_the_right_size_and_the_source_stays(folder, tmp_path, monkeypatch, capsys):
    cat, target = folder / "train" / "猫", tmp_path / "new" / "copy"
    turned = Image.Exif()
    turned[0x0112] = 6
    two_halves = Image.new("RGB", (300, 200), "white")
    two_halves.paste("black", (0, 0, 150, 200))  # on the left; turned upright, at the top
    two_halves.save(cat / "9.jpg", exif=turned, quality=100)
    noise((40, 90)).convert("L").save(cat / "9.png")  # differs from 9.jpg in its ending alone
    (cat / ".DS_Store").write_bytes(b"\0")
    before = contents(folder)
    command(monkeypatch, folder, target)
    assert contents(folder) == before
    said = capsys.readouterr().out
    assert "1 hidden" in said and "12 images" in said and str(target) in said
    data = load_data(str(target))
    assert data.train_labels.bincount().tolist() == [3, 5]
    upright = data.train_images[6].float()
    assert upright[:, :14].max() < 10 and upright[:, 18:].min() > 245


def test_a_copy_of_images_of_the_right_size_is_the_same_data(folder, tmp_path):
    prepare.prepare(folder, tmp_path / "copy")
    assert load_data(str(tmp_path / "copy")).digest == load_data(str(folder)).digest


def test_images_that_can_not_be_kept_are_all_named_and_nothing_is_left(
    folder, tmp_path, monkeypatch
):
    bad = [folder / "train" / "猫" / "clear.png", folder / "test" / "猫" / "page.jpg"]
    _one_clear_pixel().save(bad[0])
    bad[1].write_bytes(HTML)
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, folder, tmp_path / "copy")
    assert all(str(file) in str(caught.value) for file in bad)
    assert "2 of 12 images" in str(caught.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_that_fills_up_leaves_no_half_copy(folder, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def fill_up(image, path, *args, **options):
        saved.append(path)
        if len(saved) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(image, path, *args, **options)

    monkeypatch.setattr(Image.Image, "save", fill_up)
    with pytest.raises(SystemExit, match="No space left"):
        command(monkeypatch, folder, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("where", ["copy", "images/copy", "images"])
def test_a_copy_is_never_made_over_something_or_into_the_source(
    folder, tmp_path, monkeypatch, where
):
    source = folder.rename(tmp_path / "images")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine.txt").write_text("kept")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, source, tmp_path / where)
    assert str(tmp_path / where) in str(caught.value)
    assert contents(tmp_path) == before


# --- CIFAR-10 ------------------------------------------------------------------------------------


def stand_in() -> tuple[bytes, dict[str, str], np.ndarray]:
    """An archive with the layout of CIFAR-10, six images large, and md5 and pixels of its files."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)
    contents = {
        name: {"data": noise[k : k + 1], "labels": [k]}
        for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
    }
    contents["batches.meta"] = {"label_names": [f"class {k}" for k in range(10)]}
    packed, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in contents.items():
            raw = pickle.dumps(content)
            sums[name] = hashlib.md5(raw).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return packed.getvalue(), sums, noise.reshape(6, 3, 32, 32)


ARCHIVE, SUMS, PIXELS = stand_in()


class Server(BaseHTTPRequestHandler):
    """Each folder of this server fails in its own way; /good/ does not."""

    asked: list[str]
    over: threading.Event

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        how = self.path.split("/")[1]
        if body:
            self.asked.append(how)
        if how == "missing":
            self.send_error(404)
            return
        if how == "garbage":
            self.wfile.write(b"!?\x00 this is not HTTP\r\n\r\n")
            self.close_connection = True
            return
        content = {"wrong": ARCHIVE[:-9] + b"123456789", "page": HTML}.get(how, ARCHIVE)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        if how in ("truncated", "stalled"):
            content = content[: len(content) // 2]
        for piece in range(0, len(content), 1000):
            self.wfile.write(content[piece : piece + 1000])
            if how == "slow":
                self.over.wait(0.05)
        if how == "stalled":
            self.wfile.flush()
            self.over.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def places(monkeypatch):
    """places("missing", "good"): CIFAR-10 comes from these folders of a server on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(ARCHIVE).hexdigest())
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [[n, SUMS[n]] for n, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": SUMS["batches.meta"]})
    timeout = sources._timeout
    monkeypatch.setattr(sources, "_timeout", lambda seconds: timeout(seconds / 100))
    monkeypatch.setattr(Server, "asked", [], raising=False)
    monkeypatch.setattr(Server, "over", threading.Event(), raising=False)

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def serve(*folders):
            base = f"http://127.0.0.1:{server.server_port}"
            urls = tuple(f"{base}/{f}/cifar-10-python.tar.gz" for f in folders)
            monkeypatch.setattr(sources, "CIFAR10_PLACES", urls)
            return urls

        yield serve
        Server.over.set()
        server.shutdown()


def assert_is_the_stand_in(data: ImageData) -> None:
    assert data.name == "CIFAR-10" and len(data.classes) == 10
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4] and data.test_labels.tolist() == [5]
    assert np.array_equal(torch.cat([data.train_images, data.test_images]).numpy(), PIXELS)


BROKEN = ["missing", "truncated", "wrong", "page", "stalled", "garbage"]


@pytest.mark.parametrize("broken", BROKEN)
def test_when_one_place_fails_the_next_is_asked(places, tmp_path, broken):
    places(broken, "good", "missing")
    begun = time.monotonic()
    assert_is_the_stand_in(load_data("cifar10", tmp_path))
    assert Server.asked[-1] == "good" and set(Server.asked) <= {broken, "good"}
    assert time.monotonic() - begun < 10  # a place that falls silent is given up


def test_a_place_that_is_slow_but_steady_is_waited_for(places, tmp_path):
    places("slow", "missing")  # longer than the time limit in all, never for one piece
    begun = time.monotonic()
    assert_is_the_stand_in(load_data("cifar10", tmp_path))
    assert set(Server.asked) == {"slow"} and time.monotonic() - begun > 0.5


def test_data_fetched_once_need_no_network(places, tmp_path):
    places("good")
    load_data("cifar10", tmp_path)
    places("missing")
    assert_is_the_stand_in(load_data("cifar10", tmp_path))
    assert set(Server.asked) == {"good"}


def test_when_every_place_fails_each_is_named_and_the_way_out(places, tmp_path):
    urls = (*places(*BROKEN), "http://127.0.0.1:1/cifar-10-python.tar.gz")
    sources.CIFAR10_PLACES = urls  # the last: nobody listens; places() restores the list
    with pytest.raises(ConnectionError) as caught:
        load_data("cifar10", tmp_path)
    said = str(caught.value)
    assert all(url in said for url in urls)
    assert all(word in said for word in (str(tmp_path), "LAB_DATA", "LAB_PROFILE=quick", "by hand"))


def test_a_machine_without_a_network_is_told_at_once(places, tmp_path, monkeypatch):
    def nobody(*_, **__):
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", nobody)
    places("good")
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="name resolution"):
        load_data("cifar10", tmp_path)
    assert time.monotonic() - start < 1


def test_an_archive_put_there_by_hand_is_used(places, tmp_path):
    places("missing")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    assert_is_the_stand_in(load_data("cifar10", tmp_path))
    assert Server.asked == []


@pytest.mark.parametrize("left", [ARCHIVE[:500], b"", HTML, ARCHIVE[::-1]])
def test_a_damaged_archive_left_behind_is_not_used(places, tmp_path, left):
    places("good")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(left)
    assert_is_the_stand_in(load_data("cifar10", tmp_path))
    assert set(Server.asked) == {"good"}


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_file_damaged_after_unpacking_is_unpacked_again(places, tmp_path, file):
    places("good")
    load_data("cifar10", tmp_path)
    unpacked = tmp_path / "cifar-10-batches-py" / file
    whole = unpacked.read_bytes()
    unpacked.write_bytes(whole[:-1] + b"\0")
    assert_is_the_stand_in(load_data("cifar10", tmp_path))
    assert unpacked.read_bytes() == whole


def test_the_time_limit_is_for_the_download_alone():
    before = socket.getdefaulttimeout()
    with pytest.raises(OSError, match="x"), sources._timeout(3):
        assert socket.getdefaulttimeout() == 3
        raise OSError("x")
    assert socket.getdefaulttimeout() == before


def test_who_waits_for_the_download_of_another_is_told(places, tmp_path, monkeypatch):
    places("good")
    held, said = file_lock(tmp_path / "cifar-10"), []

    def say(text, **_):
        said.append(text)
        held.release()  # the other one is done

    monkeypatch.setattr(files, "print", say, raising=False)
    with held:
        assert_is_the_stand_in(load_data("cifar10", tmp_path))
    (line,) = said
    assert str(tmp_path) in line and "waiting" in line
