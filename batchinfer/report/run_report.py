"""All that a report is made of, read from an output's files alone: events, parts, plan and job."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import OutputError
from batchinfer.report.output_survey import OutputSurvey, survey
from batchinfer.report.run_history import RunHistory, fold
from batchinfer.report.status import Status, status_of
from batchinfer.storage.events import read_events
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.layout import ERRORS, committed_units, part_names, read_job, unit_id_of

__all__ = ["RunReport", "read_report"]


@dataclass(frozen=True, slots=True)
class RunReport:
    """All that a report is made of."""

    status: Status
    #: job.json.
    job: Mapping[str, Any]
    history: RunHistory
    survey: OutputSurvey
    #: Money per GPU (or replica) and hour, as the user gave it.
    price_per_gpu_hour: float | None = None

    @property
    def num_completion_tokens(self) -> int:
        return sum(run.num_completion_tokens for run in self.history.runs)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(run.num_prompt_tokens for run in self.history.runs)

    @property
    def elapsed_s(self) -> float:
        return self.history.end_s

    @property
    def completion_tokens_per_s(self) -> float:
        return self.num_completion_tokens / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def cost(self) -> float | None:
        """What the devices cost, from each replica's start to its end; None without a price."""
        return None if self.price_per_gpu_hour is None else self.history.device_s / 3600 * self.price_per_gpu_hour

    @property
    def cost_per_million_tokens(self) -> float | None:
        """Of generated tokens."""
        if self.cost is None or not self.num_completion_tokens:
            return None
        return self.cost / self.num_completion_tokens * 1e6


def read_report(
    output_path: str, storage_options: StorageOptions | None = None, price_per_gpu_hour: float | None = None
) -> RunReport:
    """Read an output for its report, also while a run goes on; neither input nor cluster is needed.

    Raises OutputError when there is no job, StorageUnavailable when the storage does not answer.
    """
    output = locate(output_path, storage_options)
    history = fold(read_events(output))
    status = status_of(output, history)
    job = read_job(output)
    if job is None:
        raise OutputError(f"{output}: no batchinfer job there; check the path")
    committed = committed_units(output)
    failed = {unit_id_of(name) for name in part_names(output, ERRORS)} & committed
    return RunReport(
        status=status,
        job=job,
        history=history,
        survey=survey(output, sorted(committed), sorted(unit_id for unit_id in failed if unit_id is not None)),
        price_per_gpu_hour=price_per_gpu_hour,
    )
