"""The table of reliability, printed at the end: property | runs | failures seen."""

import functools
import sys
from collections.abc import Callable, Iterator

import hypothesis
import pytest
from tqdm import tqdm


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


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    """Of a count only the number goes to the process that prints the table."""
    report = (yield).get_result()
    report.user_properties = [
        (name, value.runs if isinstance(value, Counted) else value)
        for name, value in report.user_properties
    ]


def pytest_terminal_summary(terminalreporter) -> None:
    table: dict[str, list[int]] = {}
    for outcome in ("passed", "failed", "xfailed"):
        for report in terminalreporter.getreports(outcome):
            found = dict(report.user_properties)
            if "property" in found and report.when == "call":
                row = table.setdefault(found["property"], [0, 0])
                row[0] += found.get("counted", 1)
                row[1] += outcome != "passed"
    if table:
        width = max(map(len, table))
        terminalreporter.section("reliability")
        terminalreporter.line(f"{'property':{width}} |   runs | failures seen")
        for name, (runs, failures) in sorted(table.items()):
            terminalreporter.line(f"{name:{width}} | {runs:6d} | {failures}")
