"""How fast the lab trains, against the plain loop that the original lab uses.

    make benchmark                                     # a few minutes on two cores
    .venv/bin/python -m benchmarks.train_speed --help

Both train the same network on the same images and take turns, so that a busy moment hits both; a
ratio is the median over the rounds. The absolute times hold for one machine only.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from models.vgg import VGG
from utils.cost import macs
from utils.engine import Engine, choose_engine, make_step, pick_device
from utils.images.data import ImageData
from utils.profile import Profile, get_profile
from utils.pruning import plan_pruning, slim
from utils.run.machine import describe_machine
from utils.sparsity import bn_layers
from utils.store.files import write_json
from utils.training import fit

L1_LAMBDA = 1e-4
SETTLE = 0.3
"""Seconds before each turn: the reference's worker fills its queue, then no longer disturbs."""


def random_data(count: int, tests: int = 100) -> ImageData:
    """Noise of CIFAR-10's format: speed does not depend on what is in the pictures."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(count) % 10
    classes = tuple("0123456789")
    return ImageData("noise", classes, images, labels, images[:tests], labels[:tests])


class OneByOne(Dataset):
    """The images as torchvision's data sets give them: one PIL image at a time, then transforms."""

    def __init__(self, data: ImageData) -> None:
        self.pixels = data.train_images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.train_labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.Pad(4),
                transforms.RandomCrop(32),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[k])), self.labels[k]


def forever(batches: Callable[[], Iterator]) -> Iterator:
    while True:
        yield from batches()


def reference_batches(data: ImageData, profile: Profile, device: torch.device) -> Iterator:
    loader = DataLoader(
        OneByOne(data),
        batch_size=profile.batch_size,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    return forever(lambda: iter(loader))


def our_batches(data: ImageData, profile: Profile) -> Iterator:
    return forever(
        lambda: data.train_batches(
            profile.batch_size, seed=1, epoch=0, crop_padding=profile.crop_padding, flip=True
        )
    )


def reference_step(
    model: VGG, optimizer: torch.optim.SGD, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, int]:
    """A step as the original lab does it, waiting for the loss and the number of correct ones."""
    optimizer.zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    for bn in bn_layers(model):
        bn.weight.grad.add_(L1_LAMBDA * torch.sign(bn.weight.detach()))
    optimizer.step()
    return loss.item(), (logits.argmax(1) == labels).sum().item()


def reference_optimizer(model: VGG, profile: Profile) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(), profile.lr, profile.momentum, weight_decay=profile.weight_decay
    )


def reference_steps(
    model: VGG, data: ImageData, profile: Profile, device: torch.device
) -> Iterator[None]:
    """The plain loop: float32, channels first, one worker, `.item()` at every batch."""
    optimizer = reference_optimizer(model, profile)
    for images, labels in reference_batches(data, profile, device):
        reference_step(model, optimizer, images.to(device), labels.to(device))
        yield


def our_steps(model: VGG, data: ImageData, profile: Profile, engine: Engine) -> Iterator[None]:
    step = make_step(model, profile, engine, l1_lambda=L1_LAMBDA)
    for images, labels in our_batches(data, profile):
        step(images, labels)
        yield


def seconds_a_step(
    contestants: dict[str, Iterator], steps: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a step for each contestant and round."""

    def turn(contestant: Iterator) -> float:
        time.sleep(SETTLE)
        start = time.perf_counter()
        for _ in range(steps):
            next(contestant)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    seconds = {name: [] for name in contestants}
    with tqdm(total=(rounds + 1) * len(contestants), leave=False) as bar:
        for this_round in range(rounds + 1):
            for name, contestant in contestants.items():
                bar.set_description(name)
                taken = turn(contestant)
                if this_round > 0:  # the first warms up
                    seconds[name].append(taken)
                bar.update()
    return seconds


def compare(name: str, ours: list[float], reference: list[float]) -> dict[str, object]:
    ratios = [r / o for r, o in zip(reference, ours, strict=True)]
    return {
        "what": name,
        "reference (ms)": round(1e3 * statistics.median(reference), 2),
        "ours (ms)": round(1e3 * statistics.median(ours), 2),
        "times faster": round(statistics.median(ratios), 2),
        "least": round(min(ratios), 2),
        "most": round(max(ratios), 2),
    }


def slim_rows(seconds: dict[str, list[float]], work: dict[str, int]) -> list[dict[str, object]]:
    """What each network's step takes, and how that goes with its MACs (`work`)."""
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    return [
        {
            "network": name,
            "MACs (M)": round(work[name] / 1e6, 1),
            "step (ms)": round(1e3 * median[name], 2),
            "fewer MACs": round(work["dense"] / work[name], 1),
            "times faster": round(median["dense"] / median[name], 1),
        }
        for name in seconds
    ]


def random_networks(profile: Profile, device: torch.device) -> dict[str, VGG]:
    """The dense network and two that a global threshold on random γ leaves."""
    torch.manual_seed(1)
    dense = VGG(profile.cfg)
    for bn in bn_layers(dense):
        # Later, wider layers lose more, as in a trained network.
        bn.weight.data = torch.rand_like(bn.weight) * (64 * profile.width / len(bn.weight))
    plans = {f"{r:.0%} pruned": plan_pruning(dense, r, min_channels=2) for r in (0.5, 0.9)}
    return {"dense": dense.to(device)} | {
        name: slim(dense, plan).to(device) for name, plan in plans.items()
    }


def whole_lab(profile: Profile, data: ImageData) -> float:
    """Seconds for every training of the lab, tests after each epoch included: λ's, fine-tunings."""
    device = data.train_images.device
    _, *slims = random_networks(profile, device).values()
    begun = time.perf_counter()
    for l1_lambda in profile.l1_lambdas:
        fit(VGG(profile.cfg).to(device), data, profile, l1_lambda=l1_lambda)
    for network in slims:
        fit(network, data, profile.for_finetuning())
    return time.perf_counter() - begun


def count_syncs(step: Iterator[None], steps: int = 20) -> float:
    """Host synchronisations a step, as CUDA's own debug mode sees them."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(steps):
                next(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen) / steps


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """The FLOP/s that this machine reaches in a large matrix product."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def main() -> None:
    sys.stdout.reconfigure(encoding="utf-8")  # →, on Windows too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="cifar10", help="whose network and batch size")
    parser.add_argument("--steps", type=int, default=6, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()

    device, profile = pick_device(), get_profile(options.profile)
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which the plain loop leaves on
    figures = {}
    if device.type == "cuda":  # first, so that it is cold
        seconds = whole_lab(profile, random_data(50_000, tests=10_000).to(device))
        figures["seconds for the whole lab, cold"] = seconds
    data = random_data(100 * profile.batch_size)  # one epoch outlasts all steps timed
    on_device = data.to(device)
    torch.manual_seed(1)
    model = VGG(profile.cfg).to(device)
    engine = choose_engine(model, on_device, profile)
    machine = describe_machine(device)
    print(f"{profile.name}: VGG-{profile.depth}, width {profile.width}, batch {profile.batch_size}")
    print(f"{engine}; {machine}")

    def turns(contestants: dict[str, Iterator], steps: int) -> dict[str, list[float]]:
        return seconds_a_step(contestants, steps, options.rounds, device)

    ours = our_steps(model, on_device, profile, engine)
    training = turns(
        {"reference": reference_steps(VGG(profile.cfg).to(device), data, profile, device),
         "ours": ours},
        options.steps,
    )  # fmt: skip
    pipeline = turns(
        {"reference": reference_batches(data, profile, device),
         "ours": our_batches(on_device, profile)},
        4 * options.steps,
    )  # fmt: skip
    rows = [
        compare("training step", training["ours"], training["reference"]),
        compare("data pipeline alone, a batch", pipeline["ours"], pipeline["reference"]),
    ]
    print(pd.DataFrame(rows).set_index("what").to_string())

    networks = random_networks(profile, device)
    work = {name: macs(network) for name, network in networks.items()}
    contestants = {
        name: our_steps(net, on_device, profile, choose_engine(net, on_device, profile))
        for name, net in networks.items()
    }
    slims = slim_rows(turns(contestants, options.steps), work)
    print(pd.DataFrame(slims).set_index("network").to_string())

    dtype = getattr(torch, engine.precision)
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
    step = statistics.median(training["ours"])
    achieved = 3 * 2 * work["dense"] * profile.batch_size / step  # forward, and twice it backward
    figures |= {
        "seconds per epoch of 50,000": step * 50_000 / profile.batch_size,
        f"share of the {engine.precision} matrix-product rate": achieved / rate,
    }
    if device.type == "cuda":
        figures["host synchronisations a step"] = count_syncs(ours)
    for name, value in figures.items():
        print(f"{name}: {value:.3g}")
    report = {
        "machine": machine, "engine": str(engine), "profile": profile.name, "training": rows,
        "slim": slims, **figures,
    }  # fmt: skip
    if options.out:
        write_json(options.out, report)


if __name__ == "__main__":
    main()
