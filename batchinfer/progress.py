"""How a run's progress is drawn: a live bar on a terminal, a line now and then everywhere else."""

import logging
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from batchinfer.telemetry import RunProgress, duration, engine_use, progress_line

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 10.0


class ProgressView(Protocol):
    """What the driver shows its progress to, about once a second."""

    def show(self, progress: RunProgress) -> None:
        """Draw the newest numbers."""

    def close(self) -> None:
        """Leave the terminal as it was; called exactly once, after the last ``show``."""


class SilentProgress:
    """For library use and ``--json``."""

    def show(self, progress: RunProgress) -> None:
        pass

    def close(self) -> None:
        pass


class LineProgress:
    """A log line every :data:`LINE_INTERVAL_S` seconds: for files, pipes and schedulers."""

    def __init__(self) -> None:
        self._last_line_s = 0.0

    def show(self, progress: RunProgress) -> None:
        if progress.elapsed_s - self._last_line_s >= LINE_INTERVAL_S:
            self._last_line_s = progress.elapsed_s
            logger.info("%s", progress_line(progress))

    def close(self) -> None:
        pass


class LiveProgress:
    """A bar that stays at the bottom of the terminal while log lines scroll above it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("rows"),
            TextColumn("{task.fields[tokens]}"),
            TextColumn("{task.fields[replicas]}"),
            TextColumn("{task.fields[engines]}", style="dim"),
            TextColumn("{task.fields[dead_letters]}", style="yellow"),
            TextColumn("{task.fields[eta]}", style="cyan"),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task(
            "", total=None, tokens="", replicas="starting", engines="", dead_letters="", eta=""
        )
        self._live = Live(self._progress, console=console, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, progress: RunProgress) -> None:
        starting = f"+{progress.num_replicas_starting} starting" if progress.num_replicas_starting else ""
        self._progress.update(
            self._task,
            total=progress.num_rows,
            completed=progress.num_rows_committed + progress.num_rows_finished,
            tokens=f"{progress.prompt_tokens_per_s:,.0f} in {progress.completion_tokens_per_s:,.0f} out tok/s",
            replicas=f"{progress.num_replicas_ready}{starting} replicas",
            engines=engine_use(progress.engines).removeprefix(", "),
            dead_letters=f"{progress.num_dead_letters} dead letters" if progress.num_dead_letters else "",
            eta="" if progress.eta_s is None else f"ETA {duration(progress.eta_s)}",
        )
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()
