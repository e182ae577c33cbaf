"""A job handed to a Ray cluster through Ray's job API: the cluster runs ``batchinfer run`` itself, near its GPUs.

Only the job file travels. What it names (input, model, output) is opened on the cluster's machines, and so are the
variables ``${VAR}`` of its values: credentials stay where the cluster has them.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from batchinfer.errors import EXIT_COMPLETE, EXIT_RUN_AGAIN, ClusterLost, SpecError
from batchinfer.job_file import load_job
from batchinfer.redact import redact
from batchinfer.spec import JobSpec

#: The job file's name in the directory that the cluster unpacks.
_JOB_FILE = "job.yaml"
#: How long Ray waits between the signal of `ray job stop` and the kill; a drain takes up to ten seconds.
_STOP_WAIT_S = 15
#: The log's end may arrive before the job's exit code does.
_EXIT_CODE_WAIT_S = 10.0

#: They tell of every upload and every end of a log, each with a level of its own.
_CHATTY_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")

_VARIABLE = re.compile(r"(?<!\$)\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that a cluster has taken."""

    submission_id: str
    address: str
    #: What somebody should know before it runs.
    warnings: tuple[str, ...]

    @property
    def ways_to_follow(self) -> tuple[str, ...]:
        """Commands that show and end it."""
        at = f"--address {self.address}"
        return (
            f"ray job logs {at} --follow {self.submission_id}",
            f"ray job status {at} {self.submission_id}",
            f"ray job stop {at} {self.submission_id}",
        )


def submit(job_file: Path, overrides: Sequence[str], address: str) -> Submission:
    """Have the cluster whose dashboard is at ``address`` (http://host:8265) run a job; returns once it is taken.

    Raises:
        SpecError: the job file is wrong, or names relative paths, which mean nothing on the cluster; or ``address`` is
            no URL.
        ClusterLost: no cluster answers there, or it refuses the token (``RAY_AUTH_TOKEN``).
    """
    spec = _checked(job_file, overrides)
    warnings = check_paths(spec) if spec is not None else ("variables of the job file are not set here; not checked",)
    with _answering(address), tempfile.TemporaryDirectory(prefix="batchinfer-") as directory:
        shutil.copyfile(job_file, Path(directory) / _JOB_FILE)
        client = JobSubmissionClient(address)
        submission_id = client.submit_job(
            entrypoint=entrypoint(overrides),
            runtime_env={
                "working_dir": directory,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
            },
            metadata={"batchinfer": spec.name if spec is not None else job_file.stem},
        )
    return Submission(submission_id, address, warnings)


def follow(submission: Submission, write: Callable[[str], None]) -> int:
    """Hand the job's log to ``write`` piece by piece as it comes; returns the job's own exit code.

    Breaking it off leaves the job running. A connection that is lost meanwhile is taken up again.

    Raises ClusterLost: the cluster does not answer any more.
    """
    with _answering(submission.address):
        client = JobSubmissionClient(submission.address)
        asyncio.run(_follow_log(client, submission.submission_id, write))
        return exit_code(asyncio.run(_ended(client, submission.submission_id)))


def entrypoint(overrides: Sequence[str]) -> str:
    """The shell command that the cluster runs, in the directory with the job file.

    ``exec``: no shell of Ray's stands between the signal of `ray job stop` and the run, which drains.
    """
    given = [part for override in overrides for part in ("--set", override)]
    command = ["python", "-m", "batchinfer", "run", _JOB_FILE, *given, "--set", "cluster.address=auto"]
    return f"exec {shlex.join(command)}"


def exit_code(details: JobDetails) -> int:
    """The exit code of ``batchinfer run``, from what Ray knows of the job.

    Ray calls a job failed whose code is not 0, also code 1 (dead letters remain), but keeps the code. Without one the
    job was stopped, or its driver or the cluster died: run it again.
    """
    if details.driver_exit_code is not None:
        code: int = details.driver_exit_code
        # Killed by a signal, 137 for one, or -9: what is committed stays.
        return code if 0 <= code <= EXIT_RUN_AGAIN else EXIT_RUN_AGAIN
    return EXIT_COMPLETE if details.status == JobStatus.SUCCEEDED else EXIT_RUN_AGAIN


def check_paths(spec: JobSpec) -> tuple[str, ...]:
    """One warning for each path that must lie on a file system the cluster's machines share.

    Raises SpecError for relative input and output paths: the cluster would look for them in the directory of the
    submission, and an output there is deleted with it.
    """
    warnings = []
    for key, path in [*(("input.path", path) for path in spec.input.paths), ("output.path", spec.output.path)]:
        if "://" in path:
            continue
        if not os.path.isabs(path):
            raise SpecError(
                f"{key} {path}: a relative path means nothing on the cluster; give a URI (s3://...) or an absolute "
                "path that all its machines share"
            )
        warnings.append(f"{key} {path} is opened on the cluster's machines, not here; all of them must share it")
    model = spec.model.path
    if "://" not in model and (os.path.isabs(model) or Path(model).is_dir()):
        warnings.append(f"model.path {model} is opened on the cluster's machines, not here; each of them must have it")
    return tuple(warnings)


def _checked(job_file: Path, overrides: Sequence[str]) -> JobSpec | None:
    """The job as it would be read here; None where it takes variables that only the cluster has."""
    try:
        text = job_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        text = ""
    names = _VARIABLE.findall(" ".join([text, *overrides]))
    return None if any(name not in os.environ for name in names) else load_job(job_file, overrides)


async def _follow_log(client: JobSubmissionClient, submission_id: str, write: Callable[[str], None]) -> None:
    num_written = 0
    while True:
        num_seen = 0
        with contextlib.suppress(RuntimeError):
            # The log starts over with every connection.
            async for piece in client.tail_job_logs(submission_id):
                new = piece[max(0, num_written - num_seen) :]
                num_seen += len(piece)
                if new:
                    write(new)
                    num_written = num_seen
        if client.get_job_status(submission_id).is_terminal():
            return
        await asyncio.sleep(1.0)


async def _ended(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    until_s = asyncio.get_running_loop().time() + _EXIT_CODE_WAIT_S
    while True:
        details = client.get_job_info(submission_id)
        if details.status.is_terminal() or asyncio.get_running_loop().time() > until_s:
            return details
        await asyncio.sleep(0.2)


@contextlib.contextmanager
def _answering(address: str) -> Iterator[None]:
    """What Ray and its HTTP client raise, as an error of ours."""
    if not address.startswith(("http://", "https://")):
        # Ray would take it for the address of the cluster's own port, and try for a minute.
        raise SpecError(f"--address {redact(address)}: give the dashboard's URL, for example http://head:8265")
    for name in _CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    except AuthenticationError as error:
        raise ClusterLost(
            f"--address {redact(address)}: the cluster asks for a token and refuses this one; set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN to the cluster's"
        ) from error
    except (RuntimeError, OSError, ValueError, RayError) as error:
        raise ClusterLost(
            f"--address {redact(address)}: no Ray job server answers there ({redact(str(error))}); give the address of "
            "the cluster's dashboard, for example http://head:8265"
        ) from error
