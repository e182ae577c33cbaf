"""How progress is drawn: a bar on a terminal, a line every ten seconds elsewhere, nothing in a library."""

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from batchinfer.progress import LineProgress, LiveProgress, ProgressView, SilentProgress
from batchinfer.telemetry import EngineUse, RunProgress


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


def test_the_bar_shows_rows_rates_replicas_dead_letters_and_the_time_left() -> None:
    console = terminal()
    view = LiveProgress(console)
    view.show(
        look(
            5.0,
            50,
            prompt_tokens_per_s=1234.0,
            completion_tokens_per_s=567.0,
            num_replicas_ready=3,
            num_replicas_starting=1,
            num_dead_letters=4,
            eta_s=75.0,
            engines=EngineUse(48, 64, kv_use=0.63, idle_share=0.02),
        )
    )
    view.close()
    shown = written(console)
    assert "250/1000" in shown
    pieces = ("1,234 in 567 out tok/s", "3+1 starting replicas", "batch 75%, KV 63%, idle 2%", "4 dead letters")
    for piece in (*pieces, "ETA 1m15s"):
        assert piece in shown


def test_the_bar_leaves_out_what_there_is_not() -> None:
    console = terminal()
    view = LiveProgress(console)
    view.show(look(5.0, num_replicas_ready=1))
    view.close()
    shown = written(console)
    assert "1 replicas" in shown
    assert "dead letters" not in shown
    assert "ETA" not in shown


def test_closing_the_bar_gives_the_cursor_back() -> None:
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
