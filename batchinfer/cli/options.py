"""Arguments and options that commands share, and what is made of them."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchinfer.cli.completion import complete_key
from batchinfer.errors import SpecError

if TYPE_CHECKING:
    from batchinfer.progress import ProgressView
    from batchinfer.spec import JobSpec

JOB = click.argument("job", type=click.Path(path_type=Path))
OUTPUT = click.argument("output")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=complete_key,
    help="Override a key of the job file, e.g. --set sampling.temperature=0.7. May be repeated.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
STORAGE_OPTIONS = click.option(
    "--storage-options",
    default="{}",
    metavar="JSON",
    help="Options for the output's file system, as in the job file's output.storage_options.",
)


@contextlib.contextmanager
def progress_view() -> Iterator["ProgressView"]:
    """A live view on a terminal, log lines elsewhere; stdout is kept for results meanwhile."""
    from rich.console import Console

    from batchinfer.progress import LineProgress, LiveProgress
    from batchinfer.telemetry import LogStream

    console = Console(stderr=True)
    # Ray prints the deaths of its workers on stdout, past every setting; what they mean is in our own log lines.
    with contextlib.redirect_stdout(LogStream(logging.getLogger("ray"))):
        yield LiveProgress(console) if console.is_terminal else LineProgress()


def load_with(job: Path, overrides: tuple[str, ...]) -> "JobSpec":
    """The job file with its ``--set``; also where log lines begin to be written. Raises SpecError."""
    from batchinfer.job_file import load_job
    from batchinfer.telemetry import configure_logging

    configure_logging()
    return load_job(job, overrides)


def storage_options_of(text: str) -> dict[str, object]:
    """Of ``--storage-options``. Raises SpecError, without the text: it may hold credentials."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
        raise SpecError(
            f"--storage-options: not valid JSON ({reason}); give an object, such as '{{\"anon\": true}}'"
        ) from None
    if not isinstance(options, dict):
        raise SpecError("--storage-options: expected a JSON object, such as '{\"anon\": true}'")
    return options
