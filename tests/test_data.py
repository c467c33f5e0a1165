"""Data sets, their batches, and what happens when files or networks fail."""

import dataclasses
import hashlib
import io
import pickle
import socket
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as tv
from conftest import HTML, tiny_data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import Compose, Normalize, ToTensor

from utils import data as lab
from utils.data import ImageData, augment, load_data, normalize

PLAIN = {"seed": 1, "epoch": 0, "crop_padding": 0, "flip": False}


def numbered(count: int) -> ImageData:
    """Image k has label k, so a batch tells which images it holds."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(count)
    classes = tuple(map(str, range(count)))
    return ImageData("numbered", classes, images, labels, images[:1], labels[:1])


def epoch_of(data: ImageData, batch_size: int = 10, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*data.train_batches(batch_size, **PLAIN | changes), strict=True)
    return torch.cat(images), torch.cat(labels)


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
    assert load_data("digits").fingerprint == digits.fingerprint


# --- augmentation --------------------------------------------------------------------------------


@given(
    padding=st.integers(0, 16),
    places=st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=8
    ),
)
def test_augment_is_pad_crop_and_hflip_image_by_image(padding, places):
    images = torch.randint(0, 256, (len(places), 3, 32, 32), dtype=torch.uint8)
    shifts = [(round(y * 2 * padding), round(x * 2 * padding)) for y, x, _ in places]
    flips = [flip for *_, flip in places]
    found = augment(images, torch.tensor(shifts), torch.tensor(flips), padding)
    for image, (top, left), flip, result in zip(images, shifts, flips, found, strict=True):
        expected = tv.crop(tv.pad(image, [padding]), top, left, 32, 32)
        assert torch.equal(result, tv.hflip(expected) if flip else expected)


def test_normalize_is_totensor_and_normalize_for_every_value():
    pixels = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)
    expected = Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])(Image.fromarray(pixels))
    found = normalize(torch.tensor(pixels).permute(2, 0, 1))
    assert torch.equal(found, expected)
    assert found.min() == -1 and found.max() == 1


def test_every_shift_and_both_directions_occur():
    # A ramp in both directions tells from any four corners where a crop was taken.
    ramp = (torch.arange(32)[:, None] * 4 + torch.arange(32) * 3 + 10).to(torch.uint8)
    images = ramp.expand(2000, 3, 32, 32)
    data = dataclasses.replace(
        numbered(1), train_images=images, train_labels=torch.zeros(2000, dtype=torch.int64)
    )
    padded = tv.pad(ramp[None].expand(3, 32, 32), [2])
    crops = {}
    for y in range(5):
        for x in range(5):
            crop = tv.crop(padded, y, x, 32, 32)
            crops[normalize(crop).numpy().tobytes()] = (y, x, False)
            crops[normalize(tv.hflip(crop)).numpy().tobytes()] = (y, x, True)
    batches = data.train_batches(500, seed=1, epoch=0, crop_padding=2, flip=True)
    seen = Counter(crops[i.numpy().tobytes()] for images, _ in batches for i in images)
    assert len(seen) == 50
    assert min(seen.values()) > 2000 / 50 / 3  # none rare: three times below the mean is 4 sigma
    assert 900 < sum(n for (*_, flip), n in seen.items() if flip) < 1100


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(23, [10, 10, 3]), (20, [10, 10]), (4, [4])])
def test_an_epoch_holds_each_image_once_and_keeps_the_last_smaller_batch(count, sizes):
    data = numbered(count)
    batches = list(data.train_batches(10, **PLAIN))
    assert [len(labels) for _, labels in batches] == sizes
    for images, labels in batches:
        assert torch.equal(images, normalize(data.train_images[labels]))
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(count))


def test_an_epoch_depends_on_seed_and_epoch_alone():
    data = numbered(40)

    def epoch(**changes):
        images, labels = epoch_of(data, crop_padding=4, flip=True, **changes)
        return labels.tolist(), images

    labels, images = epoch()
    torch.manual_seed(123)  # neither the global state nor an epoch before plays a part
    epoch(epoch=7)
    again, images_again = epoch()
    assert again == labels and torch.equal(images, images_again)
    orders = [epoch(epoch=e, seed=s)[0] for e in range(5) for s in range(5)]
    assert len({tuple(order) for order in orders}) == 25


def test_without_flip_and_crop_the_images_are_as_they_were():
    data = numbered(30)
    images, labels = epoch_of(data)
    assert torch.equal(images, normalize(data.train_images[labels]))
    flipped, labels = epoch_of(data, flip=True)
    assert not torch.equal(flipped, normalize(data.train_images[labels]))


def test_plain_batches_are_the_images_in_order():
    data = tiny_data()
    for split, count in (("train", 25), ("test", 10)):
        batches = list(data.plain_batches(split, 8))
        expected = getattr(data, f"{split}_images")
        assert torch.equal(torch.cat([x for x, _ in batches]), normalize(expected))
        assert sum(len(y) for _, y in batches) == count


# --- the set as a whole --------------------------------------------------------------------------


def test_hold_out_splits_the_training_images_and_leaves_the_test_images_out():
    data = numbered(50)
    held = data.hold_out(20, seed=3)
    train, test = set(held.train_labels.tolist()), set(held.test_labels.tolist())
    assert len(test) == 20 and not train & test and train | test == set(range(50))
    assert torch.equal(held.train_images, data.train_images[held.train_labels])
    assert torch.equal(held.test_images, data.train_images[held.test_labels])
    assert data.hold_out(20, seed=3).fingerprint == held.fingerprint
    assert data.hold_out(20, seed=4).fingerprint != held.fingerprint


@pytest.mark.parametrize("count", [0, -1, 50, 51])
def test_hold_out_of_none_or_all_is_refused(count):
    with pytest.raises(ValueError, match=f"count = {count}"):
        numbered(50).hold_out(count)


@pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
def test_the_fingerprint_sees_one_pixel_and_one_label(part):
    data = tiny_data()
    changed = getattr(data, part).clone()
    changed.view(-1)[7] = (changed.view(-1)[7] + 1) % 3
    assert dataclasses.replace(data, **{part: changed}).fingerprint != data.fingerprint
    assert dataclasses.replace(data, name="other").fingerprint != data.fingerprint
    assert tiny_data().fingerprint == data.fingerprint


@pytest.mark.parametrize(("count", "sizes"), [(2, [10, 10]), (9, [10, 10, 5])])
def test_calibration_batches_are_the_first_of_an_epoch_of_training(count, sizes):
    data, how = tiny_data(), {"seed": 1, "crop_padding": 2, "flip": True}
    found = data.calibration_batches(**how, count=count, batch_size=10)
    assert [len(labels) for _, labels in found] == sizes
    for (x, y), (images, labels) in zip(
        found, data.train_batches(10, epoch=0, **how), strict=False
    ):
        assert torch.equal(x, images) and torch.equal(y, labels)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("train_images", torch.zeros(25, 3, 32, 32), "train_images.*float32"),
        ("test_images", torch.zeros(10, 3, 28, 28, dtype=torch.uint8), r"test_images.*28"),
        ("train_images", torch.zeros(24, 3, 32, 32, dtype=torch.uint8), "train_images.*24"),
        ("train_labels", torch.full((25,), 3), "train_labels.*0 to 2.*3"),
        ("test_labels", torch.full((10,), -1), "test_labels.*-1"),
    ],
)
def test_tensors_that_do_not_fit_are_named(part, value, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(tiny_data(), **{part: value})


def test_no_image_at_all_is_refused():
    none = {"test_images": torch.empty(0, 3, 32, 32, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="test_labels: there is no image"):
        dataclasses.replace(tiny_data(), **none, test_labels=torch.empty(0, dtype=torch.int64))


# --- a folder of images --------------------------------------------------------------------------

COLOURS = {"猫": (250, 10, 20), "собака 2": (10, 240, 30)}


@pytest.fixture
def folder(tmp_path):
    """Two classes of one colour each, PNG and JPEG, with a path that few tools expect."""
    root = tmp_path / "my images – Ünïcode 写真"
    for split, count in (("train", 3), ("test", 2)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                suffix = "png" if k % 2 else "jpg"
                image = Image.new("RGB", (32, 32), colour)
                image.save(root / split / name / f"{k} ä.{suffix}", quality=95)
    return root


def test_a_folder_becomes_images_with_the_labels_of_their_folders(folder):
    data = load_data(str(folder))
    assert data.classes == tuple(sorted(COLOURS)) and data.name == folder.name
    assert (len(data.train_labels), len(data.test_labels)) == (6, 4)
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        colours = torch.tensor([COLOURS[data.classes[label]] for label in labels])
        assert_close(images.float().mean((2, 3)), colours.float(), atol=3, rtol=0)


def test_a_grey_image_gets_three_channels(folder):
    Image.new("L", (32, 32), 77).save(folder / "train" / "猫" / "a.png")
    assert load_data(str(folder)).train_images[-1].unique().tolist() == [77]


def _wrong_size(folder):
    file = folder / "test" / "猫" / "1 ä.png"
    Image.new("RGB", (31, 40)).save(file)
    return [file, "31×40"]


def _broken(content):
    def break_it(folder):
        file = folder / "train" / "猫" / "1 ä.png"
        file.write_bytes(content(file.read_bytes()))
        return [file]

    return break_it


def _cut_jpeg(folder):
    file = folder / "train" / "猫" / "0 ä.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    return [file]


def _empty_class(folder):
    for file in (folder / "train" / "猫").iterdir():
        file.unlink()
    return [folder, "猫"]


def _another_class(folder):
    (folder / "test" / "猫").rename(folder / "test" / "кот")
    return [folder, "кот"]


def _one_class(folder):
    for split in ("train", "test"):
        (folder / split / "猫").rename(folder.parent / split)
    return [folder]


def _no_class(folder):
    for name in COLOURS:
        (folder / "train" / name).rename(folder / name)
    return [folder]


def _no_split(folder):
    (folder / "test").rename(folder / "val")
    return [folder / "test"]


def _no_folder(folder):
    folder.rename(folder.parent / "elsewhere")
    return [folder]


SPOILS = {
    "wrong size": _wrong_size,
    "cut PNG": _broken(lambda png: png[: len(png) // 2]),
    "empty file": _broken(lambda _: b""),
    "HTML": _broken(lambda _: HTML),
    "cut JPEG": _cut_jpeg,
    "empty class": _empty_class,
    "classes differ": _another_class,
    "one class": _one_class,
    "no class": _no_class,
    "no split": _no_split,
    "no folder": _no_folder,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_folder_that_does_not_fit_is_named(folder, spoil):
    load_data(str(folder))  # sound before
    named = spoil(folder)
    with pytest.raises(ValueError) as caught:
        load_data(str(folder))
    assert all(str(part) in str(caught.value) for part in named)


def test_an_unknown_data_set_is_told_what_is_expected():
    with pytest.raises(ValueError, match=r"data = 'cifar100'.*train/<class>/"):
        load_data("cifar100")


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
    timeout = lab._timeout
    monkeypatch.setattr(lab, "_timeout", lambda seconds: timeout(seconds / 100))
    monkeypatch.setattr(Server, "asked", [], raising=False)
    monkeypatch.setattr(Server, "over", threading.Event(), raising=False)

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def serve(*folders):
            base = f"http://127.0.0.1:{server.server_port}"
            urls = tuple(f"{base}/{f}/cifar-10-python.tar.gz" for f in folders)
            monkeypatch.setattr(lab, "CIFAR10_PLACES", urls)
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
    lab.CIFAR10_PLACES = urls  # the last: nobody listens; places() restores the list
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
    with pytest.raises(OSError, match="x"), lab._timeout(3):
        assert socket.getdefaulttimeout() == 3
        raise OSError("x")
    assert socket.getdefaulttimeout() == before
