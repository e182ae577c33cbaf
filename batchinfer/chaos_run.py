"""``run --chaos``: the driver as a child process, started again after each of its deaths until it ends, then the audit.

The faults themselves strike inside driver and replicas (``storage/chaos_faults``); here is only who starts the next
run, and what it all came to. Nothing outside the job's output is touched.
"""

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchinfer.audit import VerifyReport, verify_deep
from batchinfer.chaos import Chaos, ChaosSpec
from batchinfer.errors import (
    EXIT_COMPLETE,
    EXIT_DEAD_LETTERS,
    EXIT_JOB_ERROR,
    EXIT_RUN_AGAIN,
    LeaseHeld,
    RunInterrupted,
    SpecError,
)
from batchinfer.records import NUM_COMPLETION_TOKENS
from batchinfer.spec import JobSpec
from batchinfer.storage.chaos_faults import ChaosPlan, ProcessNote, read_notes, remove_notes
from batchinfer.storage.filesystem import locate
from batchinfer.storage.layout import COMPLETIONS
from batchinfer.storage.lease import Process, read_lease
from batchinfer.storage.location import Location

logger = logging.getLogger(__name__)

#: Runs without deaths after the last one with some: storage may still fail.
NUM_QUIET_RUNS = 5
_STDERR = 2
_FINISHED = (EXIT_COMPLETE, EXIT_DEAD_LETTERS)
_DOCUMENTED = (*_FINISHED, EXIT_JOB_ERROR, EXIT_RUN_AGAIN, -signal.SIGKILL)
_DOUBLED = ("duplicated_row", "row_in_both")
#: Of a row that was alone with its replica at two deaths: its own doing, or that of chaos.
_CONVICTED = "killed_replica"


@dataclass(frozen=True, slots=True)
class Commands:
    """Command lines of the children: the run with a number, and the retry at the end."""

    run: Callable[[int], Sequence[str]]
    retry: Sequence[str]


@dataclass(frozen=True, slots=True)
class ChaosReport:
    """What the job survived, and what its output came to."""

    seed: int
    num_driver_kills: int
    num_replica_kills: int
    #: How each run ended; -9 = killed.
    exit_codes: tuple[int, ...]
    num_tokens_generated: int
    num_tokens_in_output: int
    #: Rows that chaos made look like poison, and that `retry-failed` has generated since.
    num_rows_acquitted: int
    verification: VerifyReport

    @property
    def exit_code(self) -> int:
        """That of ``verify``; 3 when a run ended in a way that no documented exit code tells of."""
        return EXIT_RUN_AGAIN if self.undocumented else self.verification.exit_code

    @property
    def undocumented(self) -> tuple[int, ...]:
        return tuple(code for code in self.exit_codes if code not in _DOCUMENTED)

    @property
    def num_rows_lost(self) -> int:
        found = self.verification
        return found.num_rows - found.num_rows_completed - found.num_dead_letters

    @property
    def num_rows_doubled(self) -> int:
        return sum(finding.kind in _DOUBLED for finding in self.verification.findings)

    @property
    def redone_percent(self) -> float:
        """Tokens generated again, of those in the output; what a replica generated between its last write and its
        driver's death is not seen."""
        redone = max(0, self.num_tokens_generated - self.num_tokens_in_output)
        return 100.0 * redone / self.num_tokens_in_output if self.num_tokens_in_output else 0.0

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return {
            **asdict(self),
            "num_runs": len(self.exit_codes),
            "num_rows_lost": self.num_rows_lost,
            "num_rows_doubled": self.num_rows_doubled,
            "redone_percent": round(self.redone_percent, 2),
            "exit_code": self.exit_code,
        }

    def lines(self) -> list[str]:
        """The report for people."""
        found = self.verification
        lines = [
            f"chaos with seed {self.seed}: {len(self.exit_codes)} runs, exit codes "
            f"{' '.join(str(code) for code in self.exit_codes)}",
            f"  kills          {self.num_driver_kills + self.num_replica_kills} "
            f"({self.num_driver_kills} of the driver, {self.num_replica_kills} of replicas)",
            f"  rows           {found.num_rows:,} ({found.num_rows_completed:,} completed, {found.num_dead_letters:,} "
            "dead letters)",
            f"  rows lost      {self.num_rows_lost:,}",
            f"  rows doubled   {self.num_rows_doubled:,}",
            f"  work redone    {self.redone_percent:.1f} % of {self.num_tokens_in_output:,} tokens",
            f"  verify --deep  {found.verdict}",
        ]
        lines += [f"    {finding.kind} {finding.where}: {finding.detail}" for finding in found.findings[:20]]
        if self.num_rows_acquitted:
            lines.append(
                f"  {self.num_rows_acquitted} rows were alone with their replica when chaos killed it twice, and so "
                "became dead letters; `batchinfer retry-failed` has generated them since"
            )
        if self.undocumented:
            lines.append(f"  undocumented exit codes: {' '.join(map(str, self.undocumented))}")
        return lines


def child_commands(job: Path, overrides: Sequence[str], chaos: str, seed: int) -> Commands:
    """``batchinfer run`` in a process of its own, told which run under chaos it is; the retry is without chaos."""
    program = [sys.executable, "-m", "batchinfer"]
    given = [str(job), *(argument for override in overrides for argument in ("--set", override))]
    run = [*program, "run", *given, "--chaos", chaos, "--seed", str(seed)]
    return Commands(
        run=lambda number: [*run, "--chaos-run", str(number)],
        retry=[*program, "retry-failed", *given, "--error-type", _CONVICTED],
    )


def chaos_plan(spec: JobSpec, chaos: ChaosSpec, seed: int, run_number: int) -> ChaosPlan:
    """The faults of one run of a job."""
    return ChaosPlan(Chaos(chaos, seed, run_number), spec.output.path, spec.output.storage_options)


def run_under_chaos(spec: JobSpec, commands: Commands, chaos: ChaosSpec, seed: int) -> ChaosReport:
    """Run a job again and again until it ends by itself, then audit its output.

    At most ``chaos.runs`` runs with deaths and a few without. Rows that chaos made look like poison are then retried
    without it; a row that is poison stays a dead letter. In the main thread SIGINT and SIGTERM are passed on to
    the run under way.

    Raises:
        LeaseHeld: another run holds the output.
        SpecError: the job is wrong, as the first run has said.
        RunInterrupted: stopped by a signal.
    """
    output = locate(spec.output.path, spec.output.storage_options)
    _refuse_held(output)
    remove_notes(output)
    exit_codes: list[int] = []
    verification: VerifyReport | None = None
    for number in range(chaos.runs + NUM_QUIET_RUNS):
        exit_codes.append(_run_child(commands.run(number)))
        logger.info("chaos: run %d ended with %d", number, exit_codes[-1])
        if exit_codes[-1] == EXIT_JOB_ERROR:
            raise SpecError("the job itself is wrong, as its run has said; chaos ends here")
        if exit_codes[-1] in _FINISHED:
            verification = _verify(spec)
            # What a replica has written behind its dead driver's successor, another run mends.
            if verification.exit_code != EXIT_RUN_AGAIN:
                break
    notes, num_tokens = read_notes(output), _num_tokens(output)
    before = verification or _verify(spec)
    after = _retried(spec, commands.retry, exit_codes) if _CONVICTED in before.dead_letters_by_type else before
    num_tokens_at_end = _num_tokens(output)
    return ChaosReport(
        seed=seed,
        num_driver_kills=sum(code == -signal.SIGKILL for code in exit_codes),
        num_replica_kills=sum(_is_replica_kill(note) for note in notes),
        exit_codes=tuple(exit_codes),
        # The retry, without chaos, takes no notes.
        num_tokens_generated=sum(note.num_tokens for note in notes) + num_tokens_at_end - num_tokens,
        num_tokens_in_output=num_tokens_at_end,
        num_rows_acquitted=_num_convicted(before) - _num_convicted(after),
        verification=after,
    )


def _retried(spec: JobSpec, command: Sequence[str], exit_codes: list[int]) -> VerifyReport:
    exit_codes.append(_run_child(command))
    logger.info("chaos: the retry of rows that killed their replica ended with %d", exit_codes[-1])
    return _verify(spec)


def _num_convicted(report: VerifyReport) -> int:
    return report.dead_letters_by_type.get(_CONVICTED, 0)


def _refuse_held(output: Location) -> None:
    lease = read_lease(output)
    if lease is not None and lease.is_live(datetime.now(UTC), Process.current()):
        raise LeaseHeld(f"{output}: held by run {lease.run_id} on {lease.process.host}; chaos would strike it, too")


def _run_child(command: Sequence[str]) -> int:
    with _passing_on_signals() as (stopped, told):
        # A session of its own: the terminal's Ctrl-C comes through us, once.
        child = subprocess.Popen(command, stdout=_STDERR, start_new_session=True)
        told.append(child)
        if stopped.is_set():
            child.send_signal(signal.SIGTERM)
        exit_code = child.wait()
    if stopped.is_set():
        raise RunInterrupted("stopped by a signal; the output is as a run leaves it, run again to continue")
    return exit_code


@contextmanager
def _passing_on_signals() -> "Iterator[tuple[threading.Event, list[subprocess.Popen[bytes]]]]":
    """The event tells that a signal came; the children in the list get SIGTERM for it."""
    stopped = threading.Event()
    children: list[subprocess.Popen[bytes]] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped, children
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        stopped.set()
        for child in children:
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped, children
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _verify(spec: JobSpec) -> VerifyReport:
    return verify_deep(spec.output.path, spec.output.storage_options, spec.input.storage_options)


def _is_replica_kill(note: ProcessNote) -> bool:
    return bool(note.death) and not note.of_driver


def _num_tokens(output: Location) -> int:
    """Completion tokens in the output, part by part."""
    num_tokens = 0
    for file in output.child(COMPLETIONS).files():
        with output.child(COMPLETIONS).child(file.name).open_random() as part:
            column = pq.read_table(part, columns=[NUM_COMPLETION_TOKENS]).column(0)
            num_tokens += pc.sum(column).as_py() or 0
    return num_tokens
