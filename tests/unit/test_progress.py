"""How progress is shown: a live view on a terminal, a line every ten seconds elsewhere, nothing in a library."""

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from batchinfer.progress import LineProgress, LiveProgress, ProgressView, SilentProgress
from batchinfer.telemetry import ReplicaLook, RunProgress


def look(elapsed_s: float, num_finished: int = 0, **values: Any) -> RunProgress:
    rows = {"num_rows": 1000, "num_rows_committed": 200, "num_rows_finished": num_finished}
    return RunProgress(elapsed_s=elapsed_s, **rows, **values)


def test_lines_come_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    view = LineProgress()
    with caplog.at_level(logging.INFO, "batchinfer.progress"):
        for second in range(35):
            view.show(look(float(second), second))
        view.close()
    assert [record.getMessage().partition(" of")[0] for record in caplog.records] == ["210", "220", "230"]


def test_a_late_look_does_not_make_up_for_missed_lines(caplog: pytest.LogCaptureFixture) -> None:
    view = LineProgress()
    with caplog.at_level(logging.INFO, "batchinfer.progress"):
        for elapsed_s in (45.0, 46.0, 54.9, 55.0):
            view.show(look(elapsed_s))
    assert len(caplog.records) == 2


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None, legacy_windows=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_live_view_draws_every_look() -> None:
    console = terminal()
    view = LiveProgress(console)
    view.show(look(5.0, 50, replicas=(ReplicaLook(3, "running", node="node-a"),)))
    view.show(look(6.0, 60, eta_s=75.0))
    view.close()
    shown = written(console)
    for piece in ("250 of 1,000 rows", "node-a", "260 of 1,000 rows", "ETA 1m15s"):
        assert piece in shown


def test_the_live_view_follows_the_terminals_width() -> None:
    console = terminal()
    view = LiveProgress(console)
    replicas = (ReplicaLook(3, "running", node="node-a"),)
    view.show(look(5.0, replicas=replicas))
    assert "node-a" in written(console)
    console.file = io.StringIO()
    console.width = 80
    view.show(look(6.0, replicas=replicas))
    assert "running" in written(console)
    assert "node-a" not in written(console)
    view.close()


def test_closing_the_view_gives_the_cursor_back() -> None:
    console = terminal()
    view = LiveProgress(console)
    view.show(look(1.0))
    view.close()
    shown = written(console)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
    assert shown.index("\x1b[?25l") < shown.index("\x1b[?25h")


def test_the_silent_view_prints_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    view: ProgressView = SilentProgress()
    with caplog.at_level(logging.DEBUG):
        view.show(look(100.0))
        view.close()
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []
