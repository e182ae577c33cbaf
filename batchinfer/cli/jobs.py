"""Commands that take a job file: run, retry-failed, plan."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchinfer.cli.exit_codes import ending_with_exit_codes
from batchinfer.cli.options import JOB, JSON, SET, load_with, progress_view

if TYPE_CHECKING:
    from batchinfer.storage.faults import FaultPlan

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


@click.command()
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

    Exits with 0 when every row is committed, 1 when dead letters remain, 2 when the job itself is wrong or its
    completions pass a quality limit, and 3 when it was interrupted or its deadline came: run the same command again.
    """
    spec = load_with(job, overrides)
    faults: FaultPlan | None = None
    if chaos is not None:
        from batchinfer.chaos import parse_chaos
        from batchinfer.chaos_run import chaos_plan, child_commands, run_under_chaos

        chaos_spec = parse_chaos(chaos)
        if chaos_run is None:
            survived = run_under_chaos(spec, child_commands(job, overrides, chaos, seed), chaos_spec, seed)
            click.echo(json.dumps(survived.as_json()) if as_json else "\n".join(survived.lines()))
            return survived.exit_code
        faults = chaos_plan(spec, chaos_spec, seed, chaos_run)
    from batchinfer.cli_text import print_result
    from batchinfer.cluster.driver import run as run_job

    with progress_view() as view:
        result = run_job(spec, view, takeover=takeover, chaos=faults)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        print_result(result)
    return result.exit_code


@click.command("retry-failed")
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
    spec = load_with(job, overrides)
    from batchinfer.cli_text import print_retry
    from batchinfer.cluster.retry import retry_failed as retry

    with progress_view() as view:
        result = retry(spec, view, error_types=error_types, takeover=takeover)
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        print_retry(result)
    return result.exit_code


@click.command()
@JOB
@SET
@click.option(
    "--sample",
    "num_rows",
    type=click.IntRange(min=0),
    default=2048,
    show_default=True,
    help="Rows to tokenise, spread over the input; 0 = none.",
)
@click.option("--full", is_flag=True, help="Tokenise every row that is left; duplicates are counted, not sampled.")
@click.option("--probe", is_flag=True, help="Load the model here and measure its speed on some of the rows.")
@click.option(
    "--device-memory-gib",
    type=click.FloatRange(min=0, min_open=True),
    help="Whether the model fits a GPU of this size, in place of this machine's.",
)
@click.option(
    "--price-per-gpu-hour", type=click.FloatRange(min=0), help="What a replica's device costs an hour, in any currency."
)
@JSON
@ending_with_exit_codes
def plan(
    job: Path,
    overrides: tuple[str, ...],
    num_rows: int,
    full: bool,
    probe: bool,
    device_memory_gib: float | None,
    price_per_gpu_hour: float | None,
    as_json: bool,
) -> int:
    """Show what `run` would do with JOB, and what it would take: prompts, memory, time. Writes nothing to the output.

    \b
    batchinfer plan job.yaml --full
    batchinfer plan job.yaml --probe --price-per-gpu-hour 2.5
    """
    spec = load_with(job, overrides)
    from batchinfer.cli.plan_text import print_estimate, print_found, survey_progress
    from batchinfer.cli_text import plan_json, print_plan
    from batchinfer.cluster.prepare import prepare
    from batchinfer.survey.plan_survey import SurveyOptions, survey_plan

    preparation = prepare(spec)
    wanted = SurveyOptions(None if full else num_rows, probe, device_memory_gib, price_per_gpu_hour)
    if as_json:
        with survey_progress() as on_progress:
            survey = survey_plan(preparation, wanted, on_progress)
        click.echo(json.dumps({**plan_json(preparation), **survey.as_json()}))
        return 0
    print_plan(preparation)
    with survey_progress() as on_progress:
        survey = survey_plan(preparation, wanted, on_progress, print_found)
    print_estimate(survey, spec.execution)
    return 0
