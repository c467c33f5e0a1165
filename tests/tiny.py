"""Tiny networks, images and runs, and equality to the last bit."""

import dataclasses
from pathlib import Path

import torch
from hypothesis import strategies as st

from models.vgg import VGG
from utils.images.data import ImageData
from utils.profile import PROFILES, Profile
from utils.sparsity import bn_layers
from utils.store.checkpoint import COLUMNS, Checkpoint
from utils.training import fit

TINY_CFG = [3, 4, "M", 5]
TINY_LAMBDA = 1e-3


def tiny_data(seed: int = 0, count: int = 26) -> ImageData:
    """Noise in three classes: `count` training images, 10 test images."""
    draw = torch.Generator().manual_seed(seed)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=draw)
        return images, torch.randint(0, 3, (n,), generator=draw)

    return ImageData("noise", ("a", "b", "c"), *split(count), *split(10))


def tiny_profile(**changes) -> Profile:
    """Two full batches and a smaller one an epoch, with crop and flip, in exact float32."""
    fields = {"epochs": 3, "batch_size": 10, "flip": True, "distillation": 0.5}
    fields["precision"] = "float32"
    return dataclasses.replace(PROFILES["smoke"], **(fields | changes))


def tiny_model(seed: int = 0, num_classes: int = 3, cfg: list = TINY_CFG) -> VGG:
    torch.manual_seed(seed)
    return VGG(cfg, num_classes=num_classes)


def network(*gammas: list[float]) -> VGG:
    """A network with one layer per list of γ."""
    model = VGG([len(g) for g in gammas])
    for bn, gamma in zip(bn_layers(model), gammas, strict=True):
        bn.weight.data = torch.tensor(gamma)
    return model


def tiny_checkpoint(seed: int = 0) -> Checkpoint:
    """A run of which two of three epochs are done, without the time to train it; no two of its
    numbers are alike."""
    model = tiny_model(seed)
    for k, value in enumerate(model.state_dict().values()):
        value.copy_(value + k) if value.dim() == 0 else value.copy_(torch.rand_like(value) + k)
    momentum = [torch.randn_like(p) for p in model.parameters()]
    return Checkpoint(
        kind="trained",
        cfg=model.cfg,
        state_dict=model.state_dict(),
        settings={"lr": 0.1, "seed": seed, "epochs": 3, "data": ["a", ["b", None, True]]},
        history={name: [k + 1.5, k + 0.25 + seed] for k, name in enumerate(COLUMNS)},
        optimizer={"momentum": momentum, "scaler": {}},
        results={"accuracy": 93.5},
    )


def train(path: Path, *, epochs: int = 3, l1_lambda: float = TINY_LAMBDA, **options):
    """A whole tiny run, saved at `path` after each epoch; called again, it goes on."""
    options = {"model": tiny_model(), "profile": tiny_profile(epochs=epochs)} | options
    how = {"save_every": 0, "l1_lambda": l1_lambda, "checkpoint": path}
    return fit(data=tiny_data(), **how | options)


def file_after_each_epoch(path: Path, **options) -> list[bytes]:
    """The file of a whole tiny run as it was after each of its epochs."""
    kept: list[bytes] = []
    train(path, on_epoch=lambda _: kept.append(path.read_bytes()), **options)
    return kept


def same(a: object, b: object) -> bool:
    """Equal to the last bit, type by type, all the way down."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [t.detach().cpu().contiguous().numpy().tobytes() for t in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bits[0] == bits[1]
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return same(vars(a), vars(b))
    return a == b


# --- random networks: hypothesis strategies ------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
_layers = st.tuples(st.integers(1, 6), st.booleans())  # channels, followed by a max-pool?
cfgs = st.lists(_layers, min_size=1, max_size=4).map(
    lambda pairs: [v for width, pooled in pairs for v in ([width, "M"] if pooled else [width])]
)
