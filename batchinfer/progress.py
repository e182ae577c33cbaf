"""How a run's progress is shown: a live view on a terminal, a line now and then everywhere else."""

import logging
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from batchinfer.live_table import live_table
from batchinfer.telemetry import RunProgress, progress_line

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


class SeveralViews:
    """Shows everything to each of them, in order."""

    def __init__(self, *views: ProgressView) -> None:
        self._views = views

    def show(self, progress: RunProgress) -> None:
        for view in self._views:
            view.show(progress)

    def close(self) -> None:
        for view in self._views:
            view.close()


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
    """A bar and a line for each replica that stay at the bottom of the terminal while log lines scroll above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(Text("starting"), console=console, auto_refresh=False, transient=True)
        self._live.start(refresh=True)

    def show(self, progress: RunProgress) -> None:
        self._live.update(live_table(progress, self._console.width), refresh=True)

    def close(self) -> None:
        self._live.stop()
