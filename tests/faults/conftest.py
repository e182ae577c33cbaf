"""What every fault test needs: nothing it started outlives it."""

from collections.abc import Iterator

import pytest

from tests.faults.runs import CommandRun


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    for run in CommandRun.of_test:
        run.end()
    CommandRun.of_test.clear()
