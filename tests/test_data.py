"""A data set as tensors: its identity, its batches, crop and flip."""

import dataclasses
import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_data
from torchvision.transforms import Compose, Normalize, ToTensor

from utils.images.data import ImageData, augment, normalize

PLAIN = {"seed": 1, "epoch": 0, "crop_padding": 0, "flip": False}


def numbered(count: int, height: int = 4, width: int = 6) -> ImageData:
    """Image k has label k, so a batch tells which images it holds; the test image is another."""
    images = torch.randint(0, 256, (count + 1, 3, height, width), dtype=torch.uint8)
    labels = torch.arange(count + 1)
    classes = tuple(map(str, range(count + 1)))
    return ImageData("numbered", classes, images[:-1], labels[:-1], images[-1:], labels[-1:])


def epoch_of(data: ImageData, batch_size: int = 10, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*data.train_batches(batch_size, **PLAIN | changes), strict=True)
    return torch.cat(images), torch.cat(labels)


# --- augmentation --------------------------------------------------------------------------------


@given(
    padding=st.integers(0, 16),
    places=st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=8
    ),
)
def test_augment_is_pad_crop_and_hflip_image_by_image(padding, places):
    images = torch.randint(0, 256, (len(places), 3, 9, 14), dtype=torch.uint8)
    shifts = [(round(y * 2 * padding), round(x * 2 * padding)) for y, x, _ in places]
    flips = [flip for *_, flip in places]
    found = augment(images, torch.tensor(shifts), torch.tensor(flips), padding)
    for image, (top, left), flip, result in zip(images, shifts, flips, found, strict=True):
        expected = tv.crop(tv.pad(image, [padding]), top, left, 9, 14)
        assert torch.equal(result, tv.hflip(expected) if flip else expected)


def test_normalize_is_totensor_and_normalize_for_every_value():
    pixels = np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3)
    expected = Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])(Image.fromarray(pixels))
    found = normalize(torch.tensor(pixels).permute(2, 0, 1))
    assert torch.equal(found, expected)
    assert found.min() == -1 and found.max() == 1


def test_every_shift_and_both_directions_occur():
    # A ramp in both directions tells from any four corners where a crop was taken.
    ramp = (torch.arange(8)[:, None] * 16 + torch.arange(8) * 12 + 10).to(torch.uint8)
    images = ramp.expand(2000, 3, 8, 8)
    data = dataclasses.replace(
        numbered(1, 8, 8), train_images=images, train_labels=torch.zeros(2000, dtype=torch.int64)
    )
    padded = tv.pad(ramp[None].expand(3, 8, 8), [2])
    crops = {}
    for y in range(5):
        for x in range(5):
            crop = tv.crop(padded, y, x, 8, 8)
            crops[normalize(crop).numpy().tobytes()] = (y, x, False)
            crops[normalize(tv.hflip(crop)).numpy().tobytes()] = (y, x, True)
    batches = data.train_batches(500, seed=1, epoch=0, crop_padding=2, flip=True)
    seen = Counter(crops[i.numpy().tobytes()] for images, _ in batches for i in images)
    assert len(seen) == 50
    assert min(seen.values()) > 2000 / 50 / 3  # none rare: three times below the mean is 4 sigma
    assert 900 < sum(n for (*_, flip), n in seen.items() if flip) < 1100


# --- batches -------------------------------------------------------------------------------------


@given(count=st.integers(1, 30), batch_size=st.integers(2, 13))
def test_an_epoch_holds_each_image_once_and_no_tiny_batch(count, batch_size):
    data = numbered(count)
    batches = list(data.train_batches(batch_size, **PLAIN))
    sizes = [len(labels) for _, labels in batches]
    assert sizes == data.train_batch_sizes(batch_size)
    assert min(sizes) > batch_size / 2 or sizes == [count]
    assert set(sizes[:-1]) <= {batch_size} and max(sizes) <= 1.5 * batch_size
    for images, labels in batches:
        assert torch.equal(images, normalize(data.train_images[labels]))
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(count))


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(20, [10, 10]), (21, [10, 11]), (25, [10, 15]), (26, [10, 10, 6]), (4, [4])],
)
def test_a_remainder_of_up_to_half_a_batch_joins_the_last_one(count, sizes):
    assert numbered(count).train_batch_sizes(10) == sizes


def test_an_epoch_of_whole_batches_is_bit_for_bit_what_it_always_was():
    images = (torch.arange(40 * 3 * 32 * 32) % 251).to(torch.uint8).view(40, 3, 32, 32)
    data = dataclasses.replace(numbered(40, 32, 32), train_images=images)
    batches = data.train_batches(10, seed=1, epoch=3, crop_padding=4, flip=True)
    raw = b"".join(t.numpy().tobytes() for batch in batches for t in batch)
    assert hashlib.sha256(raw).hexdigest().startswith("9063f623bd3e125d")


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
    mirrored = (flipped != normalize(data.train_images[labels])).flatten(1).any(1)
    assert 3 < mirrored.sum() < 27


def test_plain_batches_are_the_images_in_order():
    data = tiny_data(count=25)
    for split, count in (("train", 25), ("test", 10)):
        batches = list(data.plain_batches(split, 8))
        expected = getattr(data, f"{split}_images")
        assert torch.equal(torch.cat([x for x, _ in batches]), normalize(expected))
        assert sum(len(y) for _, y in batches) == count


# --- the set as a whole --------------------------------------------------------------------------


def test_hold_out_splits_the_training_images_and_leaves_the_test_images_out():
    data = numbered(50)
    held = data.hold_out(20, seed=3)
    train, test = held.train_labels.tolist(), held.test_labels.tolist()
    assert len(test) == 20 and sorted(train + test) == list(range(50))  # the test image is 50
    assert torch.equal(held.train_images, data.train_images[held.train_labels])
    assert torch.equal(held.test_images, data.train_images[held.test_labels])
    assert data.hold_out(20, seed=3).digest == held.digest
    assert data.hold_out(20, seed=4).digest != held.digest
    assert data.hold_out(20).digest == data.hold_out(20, seed=0).digest


def test_no_epoch_begins_with_the_images_held_out():
    """BN is measured on the first images of an epoch, and judged on those held out."""
    data = numbered(400, 1, 1)
    orders = [epoch_of(data, 400, seed=s, epoch=e)[1][:40] for s in range(6) for e in range(6)]
    for seed in range(6):
        held = data.hold_out(40, seed).test_labels
        assert all(torch.isin(held, order).sum() < 16 for order in orders)  # by chance 4 of 40


@pytest.mark.parametrize("count", [0, -1, 50, 51])
def test_hold_out_of_none_or_all_is_refused(count):
    with pytest.raises(ValueError, match=f"count = {count}"):
        numbered(50).hold_out(count)


@pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
def test_the_digest_sees_one_pixel_and_one_label(part):
    data = tiny_data()
    changed = getattr(data, part).clone()
    changed.view(-1)[7] = (changed.view(-1)[7] + 1) % 3
    assert dataclasses.replace(data, **{part: changed}).digest != data.digest


def test_the_digest_is_of_the_content_not_of_the_name_of_the_folder():
    data = tiny_data()
    assert dataclasses.replace(data, name="elsewhere").digest == data.digest == tiny_data().digest
    for classes in (("a", "b", "dog"), ("b", "a", "c"), ("a", "b, c", "")):
        assert dataclasses.replace(data, classes=classes).digest != data.digest


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("train_images", torch.zeros(25, 3, 4, 6), "train_images.*float32"),
        ("test_images", torch.zeros(1, 3, 6, 4, dtype=torch.uint8), r"test_images.*\(1, 3, 6, 4\)"),
        ("train_images", torch.zeros(24, 3, 4, 6, dtype=torch.uint8), "train_images.*24"),
        ("train_images", torch.zeros(25, 1, 4, 6, dtype=torch.uint8), "train_images.*25, 1, 4, 6"),
        ("train_images", torch.zeros(25, 3, 24, dtype=torch.uint8), "train_images.*25, 3, 24"),
        ("train_labels", torch.full((25,), 26), "train_labels.*0 to 25.*26"),
        ("test_labels", torch.full((1,), -1), "test_labels.*-1"),
    ],
)
def test_tensors_that_do_not_fit_are_named(part, value, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(numbered(25), **{part: value})


def test_the_size_of_the_images_is_that_of_the_set():
    data = numbered(25, height=7, width=5)
    assert data.input_shape == (3, 7, 5) == data.hold_out(5).input_shape
    assert data.to("cpu") is data
    assert next(data.plain_batches("test", 10))[0].shape == (1, 3, 7, 5)


def test_no_image_at_all_is_refused():
    none = {"test_images": torch.empty(0, 3, 4, 6, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="test_labels: must be one or more"):
        dataclasses.replace(numbered(2), **none, test_labels=torch.empty(0, dtype=torch.int64))
