"""The command that hands a job to a Ray cluster."""

import json
import sys
from pathlib import Path

import click

from batchinfer.cli.exit_codes import ending_with_exit_codes
from batchinfer.cli.options import JOB, JSON, SET
from batchinfer.errors import EXIT_COMPLETE, RunInterrupted


@click.command()
@JOB
@click.option("--address", required=True, metavar="URL", help="The cluster's dashboard, e.g. http://head:8265.")
@SET
@click.option("--wait", is_flag=True, help="Show the job's log until it ends, then exit with its exit code.")
@JSON
@ending_with_exit_codes
def submit(job: Path, address: str, overrides: tuple[str, ...], wait: bool, as_json: bool) -> int:
    """Have a Ray cluster run JOB by itself: `batchinfer run` on its head, with cluster.address=auto.

    \b
    batchinfer submit job.yaml --address http://head:8265 --wait --set output.path=s3://bucket/answers

    Only the job file is uploaded: input, model and output are opened by the cluster, and ${VAR} is read there. A
    cluster that asks for a token takes it from RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token. Exits with 0 once the cluster
    has taken the job; with --wait, with what `batchinfer run` exits with.
    """
    from batchinfer.cluster.submit import follow
    from batchinfer.cluster.submit import submit as submit_job

    submission = submit_job(job, overrides, address)
    for warning in submission.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(f"submitted as {submission.submission_id}; to follow it, to look at it, to have it drained:", err=True)
    for command in submission.ways_to_follow:
        click.echo(f"  {command}", err=True)
    exit_code = EXIT_COMPLETE
    if wait:
        log = sys.stderr if as_json else sys.stdout
        try:
            exit_code = follow(submission, lambda piece: click.echo(piece, nl=False, file=log))
        except KeyboardInterrupt:
            raise RunInterrupted(
                f"not waited for any longer: {submission.submission_id} goes on in the cluster; "
                f"`{submission.ways_to_follow[0]}` shows it, `{submission.ways_to_follow[2]}` has it drained"
            ) from None
    if as_json:
        answer = {"submission_id": submission.submission_id, "address": address, "exit_code": exit_code}
        click.echo(json.dumps({**answer, "warnings": list(submission.warnings)}))
    elif not wait:
        click.echo(submission.submission_id)
    return exit_code
