"""Every error batchinfer raises, what may be retried, and the exit code it ends a command with.

::

    BatchinferError
    ├── JobError                exit 2: a retry cannot help, somebody has to change something
    │   ├── SpecError             the job file, a --set or an environment variable
    │   ├── InputError            input shards or columns
    │   ├── ModelError            config, weights, tokenizer, chat template, device too small
    │   ├── OutputError           the output path cannot hold this job
    │   ├── FingerprintMismatch   the output belongs to a job that would generate something else
    │   └── PoorQuality           more completions are amiss than the job's quality limits allow
    ├── RunInterrupted          exit 3: run the same command again and it continues
    │   ├── LeaseHeld             another live run holds the output
    │   ├── LeaseLost             another run took the output over
    │   ├── ClusterLost           Ray, or every replica, went away
    │   ├── AllowanceSpent        the job's deadline or its GPU hours are used up
    │   ├── StorageUnavailable    reads or writes kept failing after their retries
    │   └── UnitsGivenUp          some work units failed on every attempt; the others are committed
    ├── PartExists              the unit is committed already; the losing writer drops its copy
    ├── ShardCorrupt            rows of a shard cannot be decoded; they become dead letters
    └── RowRejected             one row cannot be generated; it becomes a dead letter

Every class keeps its message in ``args`` alone, so that each survives pickling between processes.
"""

__all__ = [
    "AllowanceSpent",
    "BatchinferError",
    "ClusterLost",
    "FingerprintMismatch",
    "InputError",
    "JobError",
    "LeaseHeld",
    "LeaseLost",
    "ModelError",
    "OutputError",
    "PartExists",
    "PoorQuality",
    "RowRejected",
    "RunInterrupted",
    "ShardCorrupt",
    "SpecError",
    "StorageUnavailable",
    "UnitsGivenUp",
]

EXIT_COMPLETE = 0
EXIT_DEAD_LETTERS = 1
EXIT_JOB_ERROR = 2
EXIT_RUN_AGAIN = 3


class BatchinferError(Exception):
    """Root of the tree. ``exit_code`` is what a command ends with when the error reaches the top."""

    exit_code: int = EXIT_RUN_AGAIN


class JobError(BatchinferError):
    """Something about the job itself is wrong; running it again unchanged fails again."""

    exit_code = EXIT_JOB_ERROR


class SpecError(JobError):
    """The job file, a ``--set`` override or an environment variable is wrong; names the key."""


class InputError(JobError):
    """Input shards are missing, empty or lack what the job file names."""


class ModelError(JobError):
    """The model directory, its weights, tokenizer or template do not fit the job."""


class OutputError(JobError):
    """The output path cannot hold this job: inside the input, not writable, foreign files."""


class FingerprintMismatch(JobError):
    """The output was begun by a job that generates something else; carries the readable diff."""


class PoorQuality(JobError):
    """Too many completions are empty, truncated, repeating or in the wrong script; says which, and the ways on."""


class RunInterrupted(BatchinferError):
    """The run stopped before its end; everything committed stays, the next run continues."""

    exit_code = EXIT_RUN_AGAIN


class LeaseHeld(RunInterrupted):
    """Another run holds the output; says host, process, start and last heartbeat."""


class LeaseLost(RunInterrupted):
    """This run's lease was taken over; it must not publish anything more."""


class ClusterLost(RunInterrupted):
    """Ray or every replica went away and could not be replaced."""


class AllowanceSpent(RunInterrupted):
    """The job's deadline has come or its GPU hours are spent; says what is left and how long it would take."""


class StorageUnavailable(RunInterrupted):
    """Storage kept failing with transient errors after bounded retries."""


class UnitsGivenUp(RunInterrupted):
    """Work units failed on each of their attempts and stay uncommitted."""


class PartExists(BatchinferError):
    """The part was already there when this writer tried to create it."""


class ShardCorrupt(BatchinferError):
    """A shard's bytes cannot be decoded; ``str(error)`` names shard and cause."""


class RowRejected(BatchinferError):
    """One row cannot be generated. ``error_type`` is a short stable word for the dead letter."""

    def __init__(self, error_type: str, error: str) -> None:
        super().__init__(error_type, error)
        self.error_type = error_type
        self.error = error

    def __str__(self) -> str:
        return f"{self.error_type}: {self.error}"
