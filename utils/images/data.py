"""A data set as tensors on the device; batches with crop and flip."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.store.files import digest

IMAGE_SIZE = 32


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
        """The same data on `device`: 180 MB for CIFAR-10. Itself, if it is there already."""
        train_images = self.train_images.to(device)
        if train_images is self.train_images:
            return self
        return replace(
            self,
            train_images=train_images,
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
    def digest(self) -> str:
        """The identity of the data: images, labels and the names of the classes, as 16 hex digits.

        Not `name`: the same images in another folder are the same data.
        """
        classes = torch.tensor(list(repr(self.classes).encode()), dtype=torch.uint8)
        tensors = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return digest((*tensors, classes))

    def train_batch_sizes(self, batch_size: int) -> list[int]:
        """How many images each batch of an epoch holds: more than half of `batch_size`.

        A remainder of up to half a batch joins the last one: BN has no use for the statistics of a
        few images. Only a set that is smaller itself makes a smaller batch.
        """
        full, rest = divmod(len(self.train_labels), batch_size)
        sizes = [batch_size] * full
        if full and 2 * rest <= batch_size:
            sizes[-1] += rest
            return sizes
        return [*sizes, rest]

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, crop_padding: int, flip: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images once, shuffled, cropped and flipped: a function of (seed, epoch).

        Yields float32 images (b, 3, 32, 32) and labels (b,), b as `train_batch_sizes` says.
        """
        generator = _generator(seed, epoch)
        n = len(self.train_labels)
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
        """The images of `split` ("train" or "test") in order, not augmented: float32
        (b, 3, 32, 32) from −1 to 1, and labels (b,)."""
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
