"""The commands: parse arguments, call the library, print, end with the documented exit code.

0 every row committed · 1 finished, dead letters remain · 2 the job is wrong, a retry cannot help · 3 run it again.
Nothing heavy is imported until a command needs it.
"""

import contextlib
import functools
import json
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, cast

import click

from batchinfer import __version__
from batchinfer.errors import EXIT_RUN_AGAIN, BatchinferError, RunInterrupted, SpecError

if TYPE_CHECKING:
    from batchinfer.progress import ProgressView
    from batchinfer.spec import JobSpec
    from batchinfer.storage.faults import FaultPlan

logger = logging.getLogger(__name__)
Arguments = ParamSpec("Arguments")
SignalHandler = Callable[[int, FrameType | None], object] | int | signal.Handlers

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
CHAOS = click.option(
    "--chaos",
    metavar="SPEC",
    help="Break the job on purpose, run it again until it ends, verify. SPEC: kill-replica=P, kill-driver=P, tear=P, "
    "fail=P, delay=P:SECONDS, expire-lease=P (probabilities per storage call) and runs=N, e.g. "
    "kill-replica=0.02,kill-driver=0.01,fail=0.05.",
)
SEED = click.option("--seed", default=0, show_default=True, help="Of --chaos: the same seed, the same faults.")
CHAOS_RUN = click.option("--chaos-run", type=click.IntRange(min=0), hidden=True, help="Set by --chaos for its runs.")
TAKEOVER = click.option(
    "--takeover",
    is_flag=True,
    help="Take the output from a run that holds it: that run stops at its next beat, with 3.",
)
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
        on_sigterm = _sigterm_like_sigint()
        try:
            exit_code = command(*args, **kwargs)
        except BatchinferError as error:
            exit_code = error.exit_code
            _print_error(error, exit_code, as_json)
        except BrokenPipeError:
            # The reader of our output (head, less) has seen enough; the command itself did nothing wrong.
            sys.stderr.close()
            exit_code = 0
        except KeyboardInterrupt:
            # Before or after the run's own handling of signals, while Ray is imported, say.
            exit_code = EXIT_RUN_AGAIN
            _print_error(RunInterrupted("stopped by a signal; run the same command again"), exit_code, as_json)
        except Exception as error:  # noqa: BLE001 - the last place before Python's own exit code; the traceback is kept
            exit_code = EXIT_RUN_AGAIN
            traceback.print_exc()
            _print_error(error, exit_code, as_json)
        finally:
            if on_sigterm is not None:
                signal.signal(signal.SIGTERM, on_sigterm)
        sys.exit(exit_code)

    return run_and_exit


def _sigterm_like_sigint() -> SignalHandler | None:
    """Have SIGTERM raise KeyboardInterrupt, as SIGINT does; returns what it did before, None where it cannot be set."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


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
@CHAOS
@SEED
@CHAOS_RUN
@TAKEOVER
@ending_with_exit_codes
def run(
    job: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    chaos: str | None,
    seed: int,
    chaos_run: int | None,
    takeover: bool,
) -> int:
    """Generate every row of JOB that is not committed yet.

    \b
    batchinfer run jobs/exaone3-chat.yaml --set input.path=prompts/ --set output.path=answers/

    Exits with 0 when every row is committed, 1 when dead letters remain, 2 when the job itself is wrong, and 3
    when it was interrupted: run the same command again.
    """
    spec = _load(job, overrides)
    faults: FaultPlan | None = None
    if chaos is not None:
        from batchinfer.chaos import parse_chaos
        from batchinfer.chaos_run import chaos_plan, child_command, run_under_chaos

        chaos_spec = parse_chaos(chaos)
        if chaos_run is None:
            survived = run_under_chaos(spec, child_command(job, overrides, chaos, seed), chaos_spec, seed)
            click.echo(json.dumps(survived.as_json()) if as_json else "\n".join(survived.lines()))
            return survived.exit_code
        faults = chaos_plan(spec, chaos_spec, seed, chaos_run)
    from batchinfer.cli_text import print_result
    from batchinfer.cluster.driver import run as run_job

    with _progress_view() as view:
        result = run_job(spec, view, takeover=takeover, chaos=faults)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        print_result(result)
    return result.exit_code


@main.command("retry-failed")
@JOB
@SET
@click.option(
    "--error-type",
    "error_types",
    multiple=True,
    metavar="TYPE",
    help="Try only dead letters of this error_type, e.g. too_long. May be repeated.",
)
@JSON
@TAKEOVER
@ending_with_exit_codes
def retry_failed(
    job: Path, overrides: tuple[str, ...], error_types: tuple[str, ...], as_json: bool, takeover: bool
) -> int:
    """Generate the dead letters of JOB's output once more, and nothing else.

    \b
    batchinfer retry-failed job.yaml --set model.max_model_len=8192 --error-type too_long

    Limits may differ from the run's: sampling.max_new_tokens, model.max_model_len, engine, cluster and execution.
    Exits with 0 when no dead letter is left, 1 when some are, 2 when the job is wrong or another one, and 3 when it
    was interrupted (try again) or units are missing (`batchinfer run` generates those).
    """
    spec = _load(job, overrides)
    from batchinfer.cli_text import print_retry
    from batchinfer.cluster.retry import retry_failed as retry

    with _progress_view() as view:
        result = retry(spec, view, error_types=error_types, takeover=takeover)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        print_retry(result)
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
@click.option("--deep", is_flag=True, help="Read every byte: checksums, values, journals, and the input's footers.")
@click.option(
    "--input-storage-options",
    default="{}",
    metavar="JSON",
    help="With --deep: options for the input's file system, as in the job file's input.storage_options.",
)
@JSON
@ending_with_exit_codes
def verify(output: str, storage_options: str, deep: bool, input_storage_options: str, as_json: bool) -> int:
    """Prove that every planned row is in OUTPUT exactly once, from its files alone.

    Exits with 0 when it is, 1 when the rest are dead letters, 2 when the output is damaged, and 3 when units are
    not committed yet, or a run has to mend what a crash left.
    """
    from batchinfer import audit
    from batchinfer.cli_text import print_verification

    options, input_options = _options(storage_options), _options(input_storage_options)
    report = audit.verify_deep(output, options, input_options) if deep else audit.verify(output, options)
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


@main.command()
@OUTPUT
@click.argument("other", required=False)
@STORAGE_OPTIONS
@click.option(
    "-o", "--page", type=click.Path(path_type=Path), default="report.html", show_default=True, help="File to write."
)
@click.option(
    "--price-per-gpu-hour", type=click.FloatRange(min=0), help="What a replica's device costs an hour, in any currency."
)
@JSON
@ending_with_exit_codes
def report(
    output: str, other: str | None, storage_options: str, page: Path, price_per_gpu_hour: float | None, as_json: bool
) -> int:
    """Write a report of OUTPUT as one HTML page that needs no network; with OTHER, a page that compares both.

    \b
    batchinfer report answers/ --price-per-gpu-hour 2.5
    batchinfer report answers/monday answers/tuesday -o compared.html
    """
    from batchinfer.report.comparison import comparison_page
    from batchinfer.report.page import report_page
    from batchinfer.report.run_report import read_report

    options = _options(storage_options)
    first = read_report(output, options, price_per_gpu_hour)
    if other is None:
        html = report_page(first)
    else:
        html = comparison_page(first, read_report(other, options, price_per_gpu_hour))
    try:
        page.write_text(html, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--page {page}: cannot be written ({error.strerror}); choose another file") from error
    click.echo(json.dumps({"exit_code": 0, "page": str(page)}) if as_json else f"wrote {page}")
    return 0


@main.command()
@OUTPUT
@click.argument("target")
@click.option("--format", "format_", type=click.Choice(["parquet", "jsonl"]), default="parquet", show_default=True)
@click.option("--ordered", is_flag=True, help="Rows in the input's order; else part by part.")
@STORAGE_OPTIONS
@click.option(
    "--target-storage-options",
    default="{}",
    metavar="JSON",
    help="Options for the target's file system, if it has any.",
)
@JSON
@ending_with_exit_codes
def export(
    output: str,
    target: str,
    format_: str,
    ordered: bool,
    storage_options: str,
    target_storage_options: str,
    as_json: bool,
) -> int:
    """Copy OUTPUT's completions to numbered files in the directory TARGET.

    Exits with 0 when every row is there, 1 when dead letters are missing, 3 when units are not committed yet.
    """
    from batchinfer.export import Format
    from batchinfer.export import export as export_output

    result = export_output(
        output,
        target,
        cast("Format", format_),
        ordered=ordered,
        storage_options=_options(storage_options),
        target_options=_options(target_storage_options),
    )
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        missing = f"; {result.num_units_missing:,} units are not committed yet" if result.num_units_missing else ""
        click.echo(f"{result.num_completions:,} completions in {result.num_files:,} files in {result.target}{missing}")
    return result.exit_code


@contextlib.contextmanager
def _progress_view() -> Iterator["ProgressView"]:
    """A live view on a terminal, log lines elsewhere; stdout is kept for results meanwhile."""
    from rich.console import Console

    from batchinfer.progress import LineProgress, LiveProgress
    from batchinfer.telemetry import LogStream

    console = Console(stderr=True)
    # Ray prints the deaths of its workers on stdout, past every setting; what they mean is in our own log lines.
    with contextlib.redirect_stdout(LogStream(logging.getLogger("ray"))):
        yield LiveProgress(console) if console.is_terminal else LineProgress()


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
