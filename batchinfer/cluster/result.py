"""What a run came to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from batchinfer.cluster.prepare import Preparation
from batchinfer.cluster.tally import Tally
from batchinfer.errors import EXIT_COMPLETE, EXIT_DEAD_LETTERS, EXIT_RUN_AGAIN

Outcome = Literal["complete", "dead_letters", "unfinished"]


@dataclass(frozen=True, slots=True)
class GivenUpUnit:
    """A unit left uncommitted after its last attempt of this run; the next run tries it afresh."""

    unit_id: str
    shard: str
    num_attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class JobResult:
    """Counts of one run. Row, unit and dead-letter counts cover the whole output, tokens and times this run alone."""

    run_id: str
    output: str
    fingerprint: str
    num_rows: int
    num_rows_committed: int
    num_rows_committed_before: int
    num_units: int
    num_units_committed: int
    num_dead_letters: int
    num_completions: int
    num_prompt_tokens: int
    num_completion_tokens: int
    #: From the call to its end; ``generation_s`` leaves out planning and loading the first replica.
    elapsed_s: float
    generation_s: float
    num_replicas_died: int = 0
    #: Of the completion tokens, those that were found in journals.
    num_resumed_tokens: int = 0
    #: Sequences that got the completion of an identical one instead of being generated.
    num_shared_sequences: int = 0
    #: Of this run's commits.
    dead_letters_by_type: dict[str, int] = field(default_factory=dict)
    #: This run's completions by what is amiss with them (empty, truncated, repeating, wrong_script).
    quality: dict[str, int] = field(default_factory=dict)
    given_up: tuple[GivenUpUnit, ...] = ()
    #: Input files whose rows cannot even be counted.
    unreadable_shards: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """``complete``: every row has its completions. ``dead_letters``: every other row has."""
        if self.num_units_committed < self.num_units:
            return "unfinished"
        return "dead_letters" if self.num_dead_letters or self.unreadable_shards else "complete"

    @property
    def exit_code(self) -> int:
        """0 complete, 1 dead letters remain, 3 units remain: run again."""
        return {"complete": EXIT_COMPLETE, "dead_letters": EXIT_DEAD_LETTERS, "unfinished": EXIT_RUN_AGAIN}[
            self.outcome
        ]

    def as_json(self) -> dict[str, object]:
        """For ``--json``: plain values only."""
        return {"outcome": self.outcome, "exit_code": self.exit_code, **asdict(self)}


def job_result(
    preparation: Preparation,
    tally: Tally,
    *,
    elapsed_s: float,
    run_id: str = "",
    generation_s: float = 0.0,
    given_up: Sequence[GivenUpUnit] = (),
) -> JobResult:
    """What a run came to, from what it found and what it counted; no ``run_id`` when nothing had to be run."""
    return JobResult(
        run_id=run_id,
        output=str(preparation.output),
        fingerprint=preparation.fingerprint.digest,
        num_rows=tally.num_rows,
        num_rows_committed=tally.num_rows_before + tally.num_rows_committed,
        num_rows_committed_before=tally.num_rows_before,
        num_units=tally.num_units,
        num_units_committed=tally.num_units_before + tally.num_units_committed,
        num_dead_letters=tally.num_dead_letters_before + tally.num_dead_letters,
        num_completions=tally.num_completions,
        num_prompt_tokens=tally.num_prompt_tokens,
        num_completion_tokens=tally.num_completion_tokens,
        elapsed_s=elapsed_s,
        generation_s=generation_s,
        num_replicas_died=tally.num_replicas_died,
        num_resumed_tokens=tally.num_resumed_tokens,
        num_shared_sequences=tally.num_shared_sequences,
        dead_letters_by_type=dict(tally.dead_letters_by_type),
        quality=dict(tally.quality),
        given_up=tuple(given_up),
        unreadable_shards=tuple(shard.path for shard in preparation.plan.unreadable),
    )
