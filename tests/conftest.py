"""Options and fixtures of all tests. Helpers by subject: tiny, processes, faults, table."""

import random

import hypothesis
import pytest
import torch

pytest_plugins = ["table"]
torch.set_num_threads(1)  # networks this small only wait for a second thread
hypothesis.settings.register_profile("default", max_examples=100, deadline=None)
hypothesis.settings.register_profile("soak", max_examples=17_000, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="long runs, for hours (tests/README.md)")
    parser.addoption("--seed", type=int, help="of the random moments and damage; --soak draws one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "reliability: a row of the table; its docstring says what")
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, and is skipped without one")
    soak = config.getoption("--soak")
    hypothesis.settings.load_profile("soak" if soak else "default")
    if config.option.seed is None:  # two long runs are not to try the same
        config.option.seed = random.SystemRandom().randrange(2**31) if soak else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest one first, so that no worker is left with it at the end.
    items.sort(key=lambda item: item.path.stem != "test_notebooks")


def pytest_report_header(config: pytest.Config) -> str:
    return f"random moments and damage: --seed {config.option.seed}"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Every test starts from the same random state and environment, whatever ran before it, and
    computes on the CPU, in processes that it starts, too, unless it is marked `cuda`."""
    if request.node.get_closest_marker("cuda"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.manual_seed(0)
    for name in ("PROFILE", "DATA", "EPOCHS", "RUN", "CWD", "LAST_RUN", "DEVICE"):
        monkeypatch.setenv(f"LAB_{name}", "")  # what the test itself leaves there goes again
        monkeypatch.delenv(f"LAB_{name}")


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--soak")


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> random.Random:
    """The random moments and damage of a test."""
    return random.Random(request.config.option.seed)
