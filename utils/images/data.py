"""A data set as tensors on the device; batches with crop and flip."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.store.files import digest


@dataclass(frozen=True)
class ImageData:
    """Images of shape (n, 3, h, w) as uint8 and labels of shape (n,) as int64, train and test, with
    one h and w for all of them. Raises ValueError, naming the tensor, where one does not fit."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def __post_init__(self) -> None:
        *_, h, w = self.train_images.shape
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            n, last = len(labels), len(self.classes) - 1
            if (images.dtype, *images.shape) != (torch.uint8, n, 3, h, w):
                found = f"{images.dtype} of shape {tuple(images.shape)}"
                raise ValueError(f"{split}_images: must be uint8 of {(n, 3, h, w)}, got {found}")
            if n == 0 or labels.min() < 0 or labels.max() > last:
                found = labels.unique().tolist()
                raise ValueError(f"{split}_labels: must be one or more, 0 to {last}, got {found}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image: (3, h, w)."""
        return tuple(self.train_images.shape[1:])

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on `device`; itself, if it is there already."""
        if self.train_images.device == torch.device(device):
            return self
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def hold_out(self, count: int, seed: int = 0) -> "ImageData":
        """`count` training images, drawn by `seed`, in the place of the test images, for choices:
        what is chosen on the test images is no longer tested by them."""
        images, labels = self.train_images, self.train_labels
        if not 0 < count < len(labels):
            raise ValueError(f"count = {count!r}: must be 1 to {len(labels) - 1}")
        # Another algorithm than that of the epochs: no epoch of any seed begins with these images.
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
        held, rest = order.to(labels.device).tensor_split([count])
        name = f"{self.name}, {count:,} training images held out"
        return ImageData(name, self.classes, images[rest], labels[rest], images[held], labels[held])

    @cached_property
    def digest(self) -> str:
        """The identity of images, labels and the names of the classes, as 16 hex digits. Not of
        `name`: the same images in another folder are the same data."""
        classes = torch.tensor(list(repr(self.classes).encode()), dtype=torch.uint8)
        return digest([*(v for v in vars(self).values() if isinstance(v, Tensor)), classes])

    def train_batch_sizes(self, batch_size: int) -> list[int]:
        """How many images each batch of an epoch holds. A remainder of up to half a batch joins the
        last one: BN has no use for the statistics of a few images."""
        full, rest = divmod(len(self.train_labels), batch_size)
        if full and 2 * rest <= batch_size:
            return [batch_size] * (full - 1) + [batch_size + rest]
        return [batch_size] * full + [rest]

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, crop_padding: int, flip: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images once, shuffled, cropped and flipped: a function of (seed, epoch).

        Yields float32 images (b, 3, h, w) and labels (b,), b as `train_batch_sizes` says.
        """
        n, generator = len(self.train_labels), _generator(seed, epoch)
        order = torch.randperm(n, generator=generator)
        shifts = torch.randint(0, 2 * crop_padding + 1, (n, 2), generator=generator)
        flips = torch.rand(n, generator=generator) < (0.5 if flip else 0.0)
        # Drawn on the CPU, so the same on every device; sent over once an epoch.
        drawn = [t.to(self.train_images.device) for t in (order, shifts, flips)]
        sizes = self.train_batch_sizes(batch_size)
        for i, s, f in zip(*(t.split(sizes) for t in drawn), strict=True):
            images = self.train_images.index_select(0, i)  # on a CPU far faster than [i]
            yield normalize(augment(images, s, f, crop_padding)), self.train_labels[i]

    def plain_batches(self, split: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of `split` ("train" or "test") in order, from −1 to 1, with their labels."""
        images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield normalize(x), y


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
