"""An Airflow DAG (Airflow 3) that runs one batchinfer job every night and ends before the morning.

Put it into the DAGs folder. ``batchinfer`` may live in an environment of its own, and should: the two share no Python
code, only a command and its exit codes. From the worker's environment come BATCHINFER (the command) and BATCHINFER_JOB
(the job file), beside whatever the job file names as ``${VAR}``.

What the exit codes become:

* 0, every row is committed: success.
* 1, finished, dead letters remain: success with a warning; the return value (XCom) says 1.
* 2, the job itself is wrong, or its completions pass a quality limit: failed at once, as a retry cannot help.
* 3, interrupted, storage away, the deadline has come: tried again; the next try goes on where this one stood. After
  the deadline the tries that are left start nothing and fail within seconds.

The schedule may overlap with what a person runs by hand: the output's lease lets one in, the other ends with 3.
"""

import os
import subprocess
from datetime import datetime, timedelta, timezone

from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import AirflowFailException

COMMAND = os.environ.get("BATCHINFER", "batchinfer")
JOB = os.environ.get("BATCHINFER_JOB", "/etc/batchinfer/nightly.yaml")

#: A try may not go on for longer after the DAG run's own start, however often it is tried again.
WINDOW = timedelta(hours=8)
#: A run that is told to stop journals what it has in flight and is gone within ten seconds.
DRAIN_S = 15

EXIT_DEAD_LETTERS, EXIT_JOB_ERROR = 1, 2


class BatchinferOperator(BaseOperator):
    """``batchinfer run JOB``, its log in the task's log, its exit codes as Airflow's outcomes."""

    template_fields = ("job", "overrides")

    def __init__(self, *, job, overrides=(), **kwargs):
        """``overrides``: ``key=value`` texts for ``--set``; templated, as ``job`` is."""
        super().__init__(**kwargs)
        self.job = job
        self.overrides = list(overrides)
        self._process = None

    def execute(self, context):
        """Run it to its end; returns its exit code, 0 or 1."""
        # Of the DAG run, not of the try: a try after the deadline must not get another window.
        deadline = context["dag_run"].start_date + WINDOW
        settings = [*self.overrides, f"execution.deadline={deadline.isoformat(timespec='seconds')}"]
        command = [COMMAND, "run", self.job]
        for setting in settings:
            command += ["--set", setting]
        self.log.info("%s", " ".join(command))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            self._process = process
            for line in process.stdout:
                self.log.info("%s", line.rstrip())
        code = process.returncode
        if code == EXIT_JOB_ERROR:
            raise AirflowFailException("batchinfer ended with 2: the job itself is wrong; its last lines say how")
        if code not in (0, EXIT_DEAD_LETTERS):
            raise RuntimeError(f"batchinfer ended with {code}: interrupted; the next try continues")
        if code == EXIT_DEAD_LETTERS:
            self.log.warning("dead letters remain: see errors/ in the output, or run batchinfer retry-failed")
        return code

    def on_kill(self):
        """Somebody marked the task failed, or the worker is going: have the run drain before it is killed."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(DRAIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()


with DAG(
    dag_id="batchinfer_nightly",
    schedule="0 22 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),  # noqa: UP017 - Airflow runs on Python 3.10 too
    # A night that was missed is made up for by the next one, which takes every shard that is new.
    catchup=False,
    max_active_runs=1,
    tags=["batchinfer"],
):
    BatchinferOperator(
        task_id="run",
        job=JOB,
        # For example one output per day: overrides=["output.path=s3://bucket/answers/{{ ds }}"].
        retries=6,
        retry_delay=timedelta(minutes=5),
    )
