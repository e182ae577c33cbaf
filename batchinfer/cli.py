"""The commands: parse arguments, call the library, print, end with the documented exit code.

0 every row committed · 1 finished, dead letters remain · 2 the job is wrong, a retry cannot help · 3 run it again.
Nothing heavy is imported until a command needs it.
"""

import contextlib
import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import click

from batchinfer import __version__
from batchinfer.errors import EXIT_RUN_AGAIN, BatchinferError, SpecError

if TYPE_CHECKING:
    from batchinfer.spec import JobSpec

logger = logging.getLogger(__name__)
Arguments = ParamSpec("Arguments")

JOB = click.argument("job", type=click.Path(path_type=Path))
OUTPUT = click.argument("output")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the job file, e.g. --set sampling.temperature=0.7. May be repeated.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
STORAGE_OPTIONS = click.option(
    "--storage-options",
    default="{}",
    metavar="JSON",
    help="Options for the output's file system, as in the job file's output.storage_options.",
)


def ending_with_exit_codes(command: Callable[Arguments, int]) -> Callable[Arguments, None]:
    """Run a command, print an error of ours as one message, and exit with the code the README promises.

    A mistake of ours ends with 3, like an interruption: Python's own 1 would say "finished, dead letters remain".
    """

    @functools.wraps(command)
    def run_and_exit(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            exit_code = command(*args, **kwargs)
        except BatchinferError as error:
            exit_code = error.exit_code
            _print_error(error, exit_code, as_json)
        except BrokenPipeError:
            # The reader of our output (head, less) has seen enough; the command itself did nothing wrong.
            sys.stderr.close()
            exit_code = 0
        except KeyboardInterrupt as error:
            # Before or after the run's own handling of signals, while Ray is imported, say.
            exit_code = EXIT_RUN_AGAIN
            _print_error(error, exit_code, as_json)
        except Exception as error:  # noqa: BLE001 - the last place before Python's own exit code; the traceback is kept
            exit_code = EXIT_RUN_AGAIN
            traceback.print_exc()
            _print_error(error, exit_code, as_json)
        sys.exit(exit_code)

    return run_and_exit


def _print_error(error: BaseException, exit_code: int, as_json: bool) -> None:
    kind, text = type(error).__name__, str(error)
    if as_json:
        click.echo(json.dumps({"outcome": "error", "exit_code": exit_code, "error_type": kind, "error": text}))
    click.secho(f"Error: {text or kind}", fg="red", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchinfer")
def main() -> None:
    """Large offline generation jobs with EXAONE and other causal LMs.

    Prompts come from Parquet shards, completions go back to Parquet, every row exactly once, whatever dies on
    the way: after any crash, `run` again continues where the last one stood.
    """


@main.command()
@JOB
@SET
@JSON
@ending_with_exit_codes
def run(job: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Generate every row of JOB that is not committed yet.

    \b
    batchinfer run jobs/exaone3-chat.yaml --set input.path=prompts/ --set output.path=answers/

    Exits with 0 when every row is committed, 1 when dead letters remain, 2 when the job itself is wrong, and 3
    when it was interrupted: run the same command again.
    """
    spec = _load(job, overrides)
    from rich.console import Console

    from batchinfer.cli_text import print_result
    from batchinfer.cluster.driver import run as run_job
    from batchinfer.progress import LineProgress, LiveProgress, ProgressView
    from batchinfer.telemetry import LogStream

    console = Console(stderr=True)
    view: ProgressView = LiveProgress(console) if console.is_terminal else LineProgress()
    # Ray prints the deaths of its workers on stdout, past every setting; what they mean is in our own log lines.
    with contextlib.redirect_stdout(LogStream(logging.getLogger("ray"))):
        result = run_job(spec, view)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        print_result(result)
    return result.exit_code


@main.command()
@JOB
@SET
@JSON
@ending_with_exit_codes
def plan(job: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Show what `run` would do with JOB: shards, units, what is committed. Reads footers only, writes nothing."""
    spec = _load(job, overrides)
    from batchinfer.cli_text import plan_json, print_plan
    from batchinfer.cluster.prepare import prepare

    preparation = prepare(spec)
    if as_json:
        click.echo(json.dumps(plan_json(preparation)))
    else:
        print_plan(preparation)
    return 0


@main.command()
@OUTPUT
@STORAGE_OPTIONS
@JSON
@ending_with_exit_codes
def status(output: str, storage_options: str, as_json: bool) -> int:
    """Show how far OUTPUT is and who works on it, from its files alone. Always exits with 0 if it can read them."""
    from batchinfer.cli_text import print_status
    from batchinfer.report import read_status

    found = read_status(output, _options(storage_options))
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        print_status(found)
    return 0


@main.command()
@OUTPUT
@STORAGE_OPTIONS
@JSON
@ending_with_exit_codes
def verify(output: str, storage_options: str, as_json: bool) -> int:
    """Prove that every planned row is in OUTPUT exactly once, from its files alone.

    Exits with 0 when it is, 1 when the rest are dead letters, 2 when the output is damaged, and 3 when units are
    not committed yet.
    """
    from batchinfer.audit import verify as verify_output
    from batchinfer.cli_text import print_verification

    report = verify_output(output, _options(storage_options))
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        print_verification(report)
    return report.exit_code


@main.command()
@OUTPUT
@STORAGE_OPTIONS
@click.option("-n", "--rows", "num_rows", default=3, show_default=True, help="Rows to print.")
@JSON
@ending_with_exit_codes
def show(output: str, storage_options: str, num_rows: int, as_json: bool) -> int:
    """Print the first rows of OUTPUT: prompt and completion."""
    from batchinfer.cli_text import print_rows
    from batchinfer.report import read_rows

    rows = read_rows(output, _options(storage_options), num_rows)
    if as_json:
        click.echo(json.dumps({"rows": rows}, ensure_ascii=False, default=str))
    else:
        print_rows(rows)
    return 0


def _load(job: Path, overrides: tuple[str, ...]) -> "JobSpec":
    from batchinfer.job_file import load_job
    from batchinfer.telemetry import configure_logging

    configure_logging()
    return load_job(job, overrides)


def _options(text: str) -> dict[str, object]:
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
