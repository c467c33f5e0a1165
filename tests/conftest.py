"""What the tests share: tiny runs, processes to kill, damage to do, and the long run (--soak)."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tqdm import tqdm

from models.vgg import VGG
from utils import checkpoint, training
from utils.checkpoint import Checkpoint
from utils.config import PROFILES, Profile
from utils.data import ImageData

torch.set_num_threads(1)  # networks this small only wait for a second thread

# --- options -------------------------------------------------------------------------------------

hypothesis.settings.register_profile("default", max_examples=100, deadline=None)
hypothesis.settings.register_profile("soak", max_examples=17_000, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="long runs, for hours (reliability.md)")
    parser.addoption("--seed", type=int, help="of the random moments and damage; --soak draws one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reliability: a row of the table; its docstring says what")
    soak = config.getoption("--soak")
    hypothesis.settings.load_profile("soak" if soak else "default")
    if config.option.seed is None:  # two long runs are not to try the same
        config.option.seed = random.SystemRandom().randrange(2**31) if soak else 0


def pytest_report_header(config: pytest.Config) -> str:
    return f"random moments and damage: --seed {config.option.seed}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


# --- the table: property | runs | failures seen --------------------------------------------------


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak")


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """The random moments and damage of a test."""
    return random.Random(request.config.option.seed)


class Counted:
    """A property's rounds: counted, and with --soak shown as a bar with the time left."""

    def __init__(self, item: pytest.Item, total: int):
        self.runs, self.item, self.total, self.bar = 0, item, total, None

    def one_more(self) -> None:
        self.runs += 1
        if self.item.config.getoption("--soak"):
            capture = self.item.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():
                self.bar = self.bar or tqdm(
                    total=self.total, desc=self.item.name, file=sys.stderr, mininterval=1
                )
                self.bar.update()
                if self.runs == self.total:
                    self.bar.close()


@pytest.fixture
def times(request: pytest.FixtureRequest, soak: bool) -> Callable[[int, int], Iterator[int]]:
    """`for k in times(short, long)`: that many rounds, the long count with --soak."""

    def rounds(short: int, long: int) -> Iterator[int]:
        counted = Counted(request.node, long if soak else short)
        request.node.user_properties.append(("counted", counted))
        for k in range(counted.total):
            yield k
            counted.one_more()

    return rounds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("reliability"):
            item.user_properties.append(("property", item.obj.__doc__.splitlines()[0]))
            if getattr(item.obj, "is_hypothesis_test", False):
                count_examples(item)


def count_examples(item: pytest.Item) -> None:
    """Each example that hypothesis tries is a round."""
    counted = Counted(item, hypothesis.settings().max_examples)
    item.user_properties.append(("counted", counted))
    inner = item.obj.hypothesis.inner_test

    @functools.wraps(inner)
    def one_example(*args, **options):
        inner(*args, **options)
        counted.one_more()

    item.obj.hypothesis.inner_test = one_example


def pytest_terminal_summary(terminalreporter) -> None:
    table: dict[str, list[int]] = {}
    for outcome in ("passed", "failed", "xfailed"):
        for report in terminalreporter.getreports(outcome):
            found = dict(report.user_properties)
            if "property" in found and report.when == "call":
                row = table.setdefault(found["property"], [0, 0])
                row[0] += found["counted"].runs if "counted" in found else 1
                row[1] += outcome != "passed"
    if table:
        width = max(map(len, table))
        terminalreporter.section("reliability")
        terminalreporter.line(f"{'property':{width}} |   runs | failures seen")
        for name, (runs, failures) in sorted(table.items()):
            terminalreporter.line(f"{name:{width}} | {runs:6d} | {failures}")


# --- random networks: hypothesis strategies ------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
layers = st.tuples(st.integers(1, 6), st.booleans())  # channels, followed by a max-pool?
cfgs = st.lists(layers, min_size=1, max_size=4).map(
    lambda pairs: [v for width, pooled in pairs for v in ([width, "M"] if pooled else [width])]
)

# --- tiny runs -----------------------------------------------------------------------------------

TINY_CFG = [3, 4, "M", 5]
TINY_LAMBDA = 1e-3


def tiny_data(seed: int = 0, count: int = 25) -> ImageData:
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


def tiny_model(seed: int = 0, num_classes: int = 3) -> VGG:
    torch.manual_seed(seed)
    return VGG(TINY_CFG, num_classes=num_classes)


def tiny_checkpoint(seed: int = 0, kind: str = "trained") -> Checkpoint:
    """A finished run with momentum, history and settings, without the time to train it."""
    model = tiny_model(seed)
    return Checkpoint(
        kind=kind,
        cfg=model.cfg,
        state_dict=model.state_dict(),
        settings={"lr": 0.1, "seed": seed},
        history={"lr": [0.1, 0.01], "train_loss": [1.5, 0.25 + seed]},
        optimizer={"momentum": [torch.randn_like(p) for p in model.parameters()]},
        results={"accuracy": 93.5},
        made_on={"threads": 2},
    )


def train(path: Path, *, epochs: int = 3, l1_lambda: float = TINY_LAMBDA, seed: int = 1, **options):
    """A whole tiny run with a checkpoint at `path`; called again, it goes on."""
    profile = tiny_profile(epochs=epochs, seed=seed)
    return training.fit(
        tiny_model(), tiny_data(), profile, l1_lambda=l1_lambda, checkpoint=path, **options
    )


@contextlib.contextmanager
def every_save_kept() -> Iterator[list[bytes]]:
    """The file as it was after each epoch of the runs inside."""
    kept: list[bytes] = []

    def save(path: Path, content: Checkpoint) -> None:
        checkpoint.save(path, content)
        kept.append(Path(path).read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save", save)
        yield kept


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


# --- processes to kill ---------------------------------------------------------------------------

# One server imports torch once; its children are forked, so a process to kill costs milliseconds.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch._dynamo", "conftest"])


def start(function: Callable, *args: object) -> multiprocessing.Process:
    """`function(*args)` in a process of its own, with one thread and without output."""
    child = CHILDREN.Process(target=_quietly, args=(function, *args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server finds conftest
        child.start()
    return child


def run(function: Callable, *args: object) -> int:
    """The exit code of `function(*args)` in a process of its own: −9 is SIGKILL."""
    child = start(function, *args)
    child.join(60)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def _quietly(function: Callable, *args: object) -> None:
    torch.set_num_threads(1)
    # A shell lets what it starts in the background ignore this signal; a notebook does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    function(*args)


def interrupt_save(path: Path, content: Checkpoint, line: int, action: Callable) -> bool:
    """Call `action` before the `line`-th line that checkpoint.save() runs; False if it has fewer.

    A write is two halves here, with a line between them that the disk sees.
    """
    lines = 0

    def step(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in (checkpoint.__file__, __file__):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                action()
        return step

    def open_in_halves(*args, **options):
        file = open(*args, **options)  # noqa: SIM115
        whole_write = file.raw.write

        class Halves:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, content):
                middle = len(content) // 2
                whole_write(content[:middle])
                return whole_write(content[middle:])

        return Halves()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "open", open_in_halves, raising=False)
        sys.settrace(step)
        try:
            checkpoint.save(path, content)
        finally:
            sys.settrace(None)
    return lines >= line


# --- damage --------------------------------------------------------------------------------------

HTML = b"<!DOCTYPE html><html><body>Sign in to continue</body></html>\n" * 40


class Trap:
    """Code that unpickling would run."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def damage(whole: bytes, other: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A file as disks, networks and people break it, and what was done; never `whole` itself."""
    at = draw.randrange(len(whole))
    broken = bytearray(whole)
    match draw.choice(["cut", "flip", "flip", "burst", "splice", "insert", "html", "empty"]):
        case "cut":
            return f"cut at {at}", whole[:at]
        case "flip":
            bit = draw.randrange(8)
            broken[at] ^= 1 << bit
            return f"bit {bit} of byte {at} flipped", bytes(broken)
        case "burst":
            length = draw.randrange(1, 600)
            broken[at : at + length] = draw.randbytes(len(broken[at : at + length]))
            what = f"noise of {length} bytes at {at}"
        case "splice":
            broken = whole[:at] + other[draw.choice([at, draw.randrange(len(other))]) :]
            what = f"another checkpoint from {at} on"
        case "insert":
            broken[at:at] = draw.randbytes(draw.randrange(1, 100))
            what = f"bytes inserted at {at}"
        case "html":
            broken = HTML[: 1 + at % len(HTML)]
            what = "a web page"
        case "empty":
            broken = bytes(at % 3)
            what = "empty or zeros"
    if bytes(broken) in (whole, other):
        return damage(whole, other, draw)
    return what, bytes(broken)
