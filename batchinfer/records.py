"""The nouns that all rooms share: frozen facts, standard library only.

The words: a *shard* is one input file; a *work unit* is a row range of one shard, the unit of retry and
commit; a *prompt* is one row ready for the engine; a *sequence* (``engine.engine``) is one sample of a
prompt; a *completion* is what a sequence became; a *dead letter* is a row that could not be generated.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Final, Literal

FinishReason = Literal["stop", "length"]

#: Version of the on-disk layout and of the meaning of its rows; an output of another version is another job's.
FORMAT_VERSION: Final = 1

ROW_ID = "row_id"
SAMPLE = "sample"
COMPLETION = "completion"
FINISH_REASON = "finish_reason"
NUM_PROMPT_TOKENS = "num_prompt_tokens"
NUM_COMPLETION_TOKENS = "num_completion_tokens"
TOKEN_IDS = "token_ids"
LOGPROBS = "logprobs"

#: Columns the job adds to the input's columns; an input column of the same name is a spec error.
GENERATED_COLUMNS = (
    ROW_ID,
    SAMPLE,
    COMPLETION,
    FINISH_REASON,
    NUM_PROMPT_TOKENS,
    NUM_COMPLETION_TOKENS,
    TOKEN_IDS,
    LOGPROBS,
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    ``shard_id`` is 16 hex digits over (``path``, size, footer bytes): it moves with the data set, not
    with its root. ``path`` is relative to the input root, ``uri`` is where the file is opened.
    ``rows_per_unit`` is how an output first cut the shard; later runs of that output keep it.
    """

    shard_id: str
    path: str
    uri: str
    num_rows: int
    size_bytes: int
    rows_per_unit: int = 1024

    @property
    def units(self) -> "tuple[WorkUnit, ...]":
        """The shard cut into units in row order: each row in exactly one, the last one may be shorter."""
        step = self.rows_per_unit
        return tuple(
            WorkUnit(self.shard_id, first_row, min(step, self.num_rows - first_row))
            for first_row in range(0, self.num_rows, step)
        )


@dataclass(frozen=True, slots=True)
class UnreadableShard:
    """An input file whose footer cannot be read: its rows cannot be counted, only named."""

    path: str
    uri: str
    size_bytes: int
    error: str


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Rows ``first_row .. first_row + num_rows - 1`` of one shard: the unit of retry and commit."""

    shard_id: str
    first_row: int
    num_rows: int

    @property
    def unit_id(self) -> str:
        """Stable name: the same input gives the same ids wherever its root moves to."""
        return f"{self.shard_id}-{self.first_row:09d}-{self.num_rows}"

    def row_id(self, offset: int) -> str:
        """Id of the unit's ``offset``-th row."""
        return f"{self.shard_id}:{self.first_row + offset}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one output is to hold: shards in input order, and the units they are cut into.

    ``retired`` are shards of an earlier run of the same output that are no longer in the input; their
    committed units stay part of the product. Units are ordered by shard, then by row.
    """

    shards: tuple[Shard, ...]
    units: tuple[WorkUnit, ...]
    unreadable: tuple[UnreadableShard, ...] = ()
    retired: tuple[Shard, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one prompt is continued; the engine's view of the job file's ``sampling`` block.

    ``stop_token_ids`` comes in addition to the model's own end-of-sequence ids. ``logprobs`` is None
    (not asked), 0 (the chosen token's) or k (the k best beside it).
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, rendered and tokenised; ``token_ids`` is what the model reads, nothing is added to it."""

    row_id: str
    token_ids: SequenceOf[int]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the model's own distribution before any sampling cut) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated sample of one row. ``token_ids`` includes the stop token that ended it, ``text`` does not."""

    row_id: str
    sample: int
    text: str
    token_ids: SequenceOf[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class RowError:
    """A dead letter: why one row has no completion. ``attempts`` counts tries of its generation."""

    row_id: str
    error_type: str
    error: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class UnitResult:
    """Counts of one committed unit: all that travels back through Ray."""

    unit_id: str
    num_rows: int
    num_completions: int
    num_dead_letters: int
    num_prompt_tokens: int
    num_completion_tokens: int
    elapsed_s: float
    already_committed: bool = False
    #: Of the completion tokens, those that were in the unit's journal and did not have to be generated again.
    num_resumed_tokens: int = 0
    dead_letters_by_type: dict[str, int] = field(default_factory=dict)
