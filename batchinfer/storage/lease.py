"""Which run holds an output: one file with a heartbeat.

The lease saves work and confusion; it is not what keeps rows single. Commits are exclusive by themselves, so a
run that was paused for an hour and still believes in its lease can waste GPU time, not damage the output.

A run that was told to takes over a live lease in the same way; the run it takes it from sees that at its next beat.

Taking over a stale lease needs an arbiter, for storage has no compare-and-swap that all backends share. A
candidate creates ``lease-claim-<epoch>.json`` exclusively, looks again that the lease is still the stale one it
judged, writes the lease under the new epoch and removes the claims up to it. A crash between claim and lease
leaves the claim; it goes stale like a lease, and the next candidate claims the epoch after it.
"""

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchinfer.errors import LeaseHeld, LeaseLost, OutputError, PartExists
from batchinfer.storage.layout import JOB, lease_file, staging
from batchinfer.storage.location import Location

Clock = Callable[[], datetime]

_CLAIM = re.compile(r"lease-claim-(\d+)\.json")
#: Rounds of acquire before it settles for "held": each lost round means that another run moved.
_MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from a later one with the same number. Empty strings: this system does not say."""

    host: str
    pid: int
    #: Clock ticks since boot at which it started.
    start_time: str
    boot_id: str
    #: Containers on one machine share its boot id, and sometimes its host name, but not their process numbers.
    pid_namespace: str

    @classmethod
    def current(cls) -> "Process":
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_time(pid) or "", _boot_id(), _pid_namespace())

    def is_gone(self, observer: "Process") -> bool:
        """Whether ``observer`` can tell for certain that this process has ended; False when it cannot tell."""
        mine = (observer.host, observer.boot_id, observer.pid_namespace)
        if not observer.boot_id or mine != (self.host, self.boot_id, self.pid_namespace):
            return False
        return _start_time(self.pid) != self.start_time


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What lease.json says; times are ISO 8601 in UTC. ``epoch`` grows by one with every takeover."""

    run_id: str
    epoch: int
    started_at: str
    heartbeat_at: str
    timeout_s: float
    process: Process

    def is_live(self, now: datetime, observer: Process) -> bool:
        """Whether the holder must be believed alive: its process is not known to be gone, its beat is recent."""
        if self.process.is_gone(observer):
            return False
        silence = now - datetime.fromisoformat(self.heartbeat_at)
        return silence.total_seconds() <= self.timeout_s


#: Whether a holder is to be believed alive, at a time, by an observer.
_IsLive = Callable[[LeaseRecord, datetime, Process], bool]


@dataclass(slots=True)
class Lease:
    """A lease this run has acquired. Beat it from one thread, several times per ``timeout_s``."""

    output: Location
    record: LeaseRecord
    _clock: Clock

    def heartbeat(self) -> None:
        """Say that the run is alive. LeaseLost when another run holds the output now; publish nothing after that."""
        self._check_held()
        self.record = replace(self.record, heartbeat_at=self._clock().isoformat())
        # Paused between the look and this line, we overwrite a run that took over; its next beat notices and
        # stops, and one run remains.
        _write(lease_file(self.output), self.record, self.output)

    def release(self) -> None:
        """Give the output free; nothing happens when another run holds it already. A crash before it leaves a
        lease that goes stale."""
        with suppress(LeaseLost):
            self._check_held()
            lease_file(self.output).remove()

    def _check_held(self) -> None:
        current = _read(lease_file(self.output))
        if current is None:
            raise LeaseLost(f"{self.output}: the lease of run {self.record.run_id} was removed; run again to continue")
        if (current.run_id, current.epoch) != (self.record.run_id, self.record.epoch):
            raise LeaseLost(f"{self.output}: taken over by {_holder(current)}; this run ({self.record.run_id}) stops")


def acquire(output: Location, run_id: str, timeout_s: float, clock: Clock = lambda: datetime.now(UTC)) -> Lease:
    """Hold ``output`` for ``run_id``, or raise LeaseHeld naming who does.

    A lease is taken over when its process is known to be gone (same machine), or when it has not beaten for the
    timeout it was acquired with; clocks of different machines may differ by less than that.
    """
    return _acquire(output, run_id, timeout_s, clock, LeaseRecord.is_live)


def take_over(output: Location, run_id: str, timeout_s: float, clock: Clock = lambda: datetime.now(UTC)) -> Lease:
    """Hold ``output`` for ``run_id`` whoever holds it now, live or not; that run stops at its next beat.

    Until then its replicas may commit units, which is what any replica of this job may do.

    Raises:
        LeaseHeld: others took it over as often as this run did; one of them has it.
    """
    return _acquire(output, run_id, timeout_s, clock, lambda record, now, observer: False)


def _acquire(output: Location, run_id: str, timeout_s: float, clock: Clock, is_live: _IsLive) -> Lease:
    observer = Process.current()
    for _ in range(_MAX_ROUNDS):
        now = clock()
        fresh = LeaseRecord(run_id, 1, now.isoformat(), now.isoformat(), timeout_s, observer)
        current = _read(lease_file(output))
        if current is None:
            try:
                lease_file(output).create_exclusive(_encoded(fresh), staging(output))
            except PartExists:
                # Another run, or our own put whose answer was lost; the next round reads which.
                continue
            return Lease(output, fresh, clock)
        if current.run_id == run_id and current.process == observer:
            return Lease(output, current, clock)
        if is_live(current, now, observer):
            raise LeaseHeld(_held(output, current))
        taken = _take_over(output, current, fresh, now, is_live)
        if taken is not None:
            return Lease(output, taken, clock)
    raise LeaseHeld(f"{output}: several runs are trying to start on it; wait until one has it")


def read_lease(output: Location) -> LeaseRecord | None:
    """What lease.json says now, or None when nobody holds the output; whether to believe it is ``is_live``'s answer."""
    return _read(lease_file(output))


def _take_over(
    output: Location, stale: LeaseRecord, fresh: LeaseRecord, now: datetime, is_live: _IsLive
) -> LeaseRecord | None:
    """The new lease, or None when somebody moved meanwhile and the situation must be looked at anew."""
    epoch = stale.epoch + 1
    for claimed_epoch in _claimed_epochs(output):
        claim = _read(_claim(output, claimed_epoch))
        if claim is None:
            continue
        if claim.epoch > stale.epoch and is_live(claim, now, fresh.process):
            raise LeaseHeld(_held(output, claim))
        epoch = max(epoch, claim.epoch + 1)
    fresh = replace(fresh, epoch=epoch)
    try:
        _claim(output, epoch).create_exclusive(_encoded(fresh), staging(output))
    except PartExists:
        winner = _read(_claim(output, epoch))
        if winner is None or winner.run_id != fresh.run_id:
            return None
    if _read(lease_file(output)) != stale:
        # Another candidate finished its takeover between our first look and our claim.
        _claim(output, epoch).remove()
        return None
    # A crash here leaves our claim; it goes stale after timeout_s, or at once for an observer on this machine.
    _write(lease_file(output), fresh, output)
    for claimed_epoch in _claimed_epochs(output):
        if claimed_epoch <= epoch:
            _claim(output, claimed_epoch).remove()
    return fresh


def _claimed_epochs(output: Location) -> list[int]:
    matches = (_CLAIM.fullmatch(name) for name in output.child(JOB).names())
    return sorted(int(match[1]) for match in matches if match)


def _claim(output: Location, epoch: int) -> Location:
    return output.child(f"{JOB}/lease-claim-{epoch}.json")


def _held(output: Location, record: LeaseRecord) -> str:
    return (
        f"{output}: held by {_holder(record)}; stop that run, wait for it, try again {record.timeout_s:g} s after its "
        "last heartbeat (if it is dead), or run with --takeover, which makes it stop"
    )


def _holder(record: LeaseRecord) -> str:
    return (
        f"run {record.run_id} (host {record.process.host}, process {record.process.pid}, started {record.started_at}, "
        f"last heartbeat {record.heartbeat_at})"
    )


def _encoded(record: LeaseRecord) -> bytes:
    return json.dumps(asdict(record), indent=2).encode() + b"\n"


def _write(place: Location, record: LeaseRecord, output: Location) -> None:
    place.write_replace(_encoded(record), staging(output))


def _read(place: Location) -> LeaseRecord | None:
    content = place.read_if_present()
    if content is None:
        return None
    try:
        written: dict[str, Any] = json.loads(content)
        process = Process(**written.pop("process"))
        record = LeaseRecord(**written, process=process)
        if datetime.fromisoformat(record.heartbeat_at).tzinfo is None:
            raise ValueError("heartbeat_at without a time zone")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        named = ", ".join(field.name for field in fields(LeaseRecord))
        raise OutputError(
            f"{place}: no lease ({error}; expected {named}); remove the file if no run is using the output"
        ) from error
    return record


def _start_time(pid: int) -> str | None:
    """Field 22 of /proc/<pid>/stat, None when there is no such process. Zombies have ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command name before it is in parentheses and may hold anything.
    after_name = stat.rpartition(")")[2].split()
    return None if after_name[0] in {"Z", "X"} else after_name[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
