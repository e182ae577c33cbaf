"""How long a run may go on: a deadline, and GPU hours for all runs of an output together. Pure.

GPU hours are what replicas hold: the GPUs of each (a replica without one counts as one with one) times the time from
the moment its model began to load to its end. Replicas that never became ready are not counted, since Ray does not
tell how long they waited for a device. A run that crashed is counted up to its last event.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from batchinfer.storage.events import Event
from batchinfer.telemetry import duration

Spent = Literal["deadline", "gpu_hours"]

#: A drain and what follows it take no longer; the promise to whoever sends a signal is the same.
LEAVE_S = 10.0


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a run may use; None = as much as it takes."""

    ends_at: datetime | None = None
    max_gpu_s: float | None = None

    def spent(self, now: datetime, gpu_s: float, num_gpus: float) -> Spent | None:
        """What will be used up by the time a drain that begins now is over, with ``num_gpus`` held until then."""
        if self.ends_at is not None and now + timedelta(seconds=LEAVE_S) >= self.ends_at:
            return "deadline"
        if self.max_gpu_s is not None and gpu_s + num_gpus * LEAVE_S >= self.max_gpu_s:
            return "gpu_hours"
        return None


class GpuMeter:
    """GPU seconds held by replicas; times are seconds of one clock, whichever."""

    def __init__(self) -> None:
        self._num_gpus_of: dict[int, float] = {}
        self._held: dict[int, tuple[float, float]] = {}
        self._gone_gpu_s = 0.0

    @property
    def num_gpus(self) -> float:
        """GPUs held now."""
        return sum(num_gpus for _, num_gpus in self._held.values())

    def starting(self, replica_id: int, num_gpus: float) -> None:
        """A replica was asked for; it may have to wait for its GPUs."""
        self._num_gpus_of[replica_id] = num_gpus

    def ready(self, replica_id: int, at_s: float, start_s: float) -> None:
        """A replica became ready, having loaded for ``start_s`` seconds."""
        self._held[replica_id] = (at_s - start_s, self._num_gpus_of.get(replica_id) or 1.0)

    def gone(self, replica_id: int, at_s: float) -> None:
        """A replica has ended; one that never became ready was never counted."""
        self._num_gpus_of.pop(replica_id, None)
        if replica_id in self._held:
            since_s, num_gpus = self._held.pop(replica_id)
            self._gone_gpu_s += max(0.0, at_s - since_s) * num_gpus

    def gpu_s(self, at_s: float) -> float:
        """GPU seconds until now."""
        return self._gone_gpu_s + sum(max(0.0, at_s - since_s) * num_gpus for since_s, num_gpus in self._held.values())


@dataclass(frozen=True, slots=True)
class Use:
    """What runs have used, and what they got for it."""

    gpu_s: float = 0.0
    num_rows: int = 0

    def gpu_hours_for(self, num_rows: int) -> float | None:
        """GPU hours that so many rows would take at this rate; None while nothing is known of it."""
        return self.gpu_s / self.num_rows * num_rows / 3600 if self.num_rows and self.gpu_s else None


def use_of_earlier_runs(events: Iterable[Event]) -> Use:
    """GPU seconds and committed rows of all runs, from their events in the order they were written."""
    meter, gpu_s, num_rows, at_s = GpuMeter(), 0.0, 0, 0.0
    for event in events:
        kind, replica = event["event"], event.get("replica")
        if kind == "run_started":
            gpu_s += meter.gpu_s(at_s)
            meter = GpuMeter()
        try:
            at_s = datetime.fromisoformat(str(event.get("at"))).timestamp()
        except ValueError:
            continue
        if kind == "unit_committed":
            num_rows += int(_number(event.get("num_rows")))
        elif not isinstance(replica, int):
            continue
        elif kind == "replica_starting":
            meter.starting(replica, _number(event.get("num_gpus")))
        elif kind == "replica_ready":
            meter.ready(replica, at_s, _number(event.get("start_s")))
        elif kind in ("replica_died", "replica_stopped", "replica_drained"):
            meter.gone(replica, at_s)
    return Use(gpu_s + meter.gpu_s(at_s), num_rows)


def spent_text(allowance: Allowance, spent: Spent, gpu_s: float) -> str:
    """What is used up, in the job file's words; ``gpu_s`` GPU seconds so far."""
    if spent == "gpu_hours" and allowance.max_gpu_s is not None:
        return (
            f"execution.max_gpu_hours {allowance.max_gpu_s / 3600:g} leave no more: the runs of this output have used "
            f"{gpu_s / 3600:.3g} GPU hours"
        )
    assert allowance.ends_at is not None
    return f"execution.deadline is here: the run has to be over by {allowance.ends_at.isoformat(' ', 'seconds')}"


def left_text(num_rows: int, eta_s: float | None, gpu_hours: float | None) -> str:
    """What is left, and how long it would take."""
    times = []
    if eta_s is not None:
        times.append(f"about {duration(eta_s)} at the last rate")
    if gpu_hours is not None:
        times.append(f"about {gpu_hours:.2g} GPU hours at the rate of all runs so far")
    return f"{num_rows:,} rows are left" + (f", {' and '.join(times)}" if times else "")


def ways_on(spent: Spent) -> str:
    """What lets the next run go on."""
    if spent == "gpu_hours":
        return "raise execution.max_gpu_hours and run the same command again to continue"
    return "run the same command again with a later execution.deadline to continue"


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
