"""The nouns that all rooms share: frozen facts, standard library only.

The words: a *shard* is one input file; a *work unit* is a row range of one shard, the unit of retry and
commit; a *prompt* is one row ready for the engine; a *sequence* (``engine.engine``) is one sample of a
prompt; a *completion* is what a sequence became; a *dead letter* is a row that could not be generated.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Final, Literal

FinishReason = Literal["stop", "length"]
LineCompression = Literal["gzip", "zstd"]

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
CHOICES = "choices"
ANSWERS = "answers"

#: Columns that jobs add to the input's columns; an input column of the same name is a spec error. ``CHOICES`` and
#: ``ANSWERS`` are not among them: data sets of questions often have such columns, which are in the way only where a job
#: scores choices or answers turns.
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
class LineBlocks:
    """Where the rows of a JSON Lines shard lie: block ``k``, some whole lines, is item ``k`` of each array.

    The first three have one item more: where the last block ends. Bytes are counted behind decompression.
    """

    first_rows: "array[int]"
    #: Counted from 1, blank lines too.
    first_lines: "array[int]"
    first_bytes: "array[int]"
    #: CRC-32 of each block, by which a reader knows that it has what was planned.
    checksums: "array[int]"
    #: 1 where every row of the block is a JSON object.
    are_sound: bytes
    compression: LineCompression | None = None

    def __len__(self) -> int:
        return len(self.checksums)

    def holding(self, first_row: int, num_rows: int) -> "LineBlocks":
        """The blocks that hold these rows."""
        first = bisect_right(self.first_rows, first_row, hi=len(self)) - 1
        end = bisect_left(self.first_rows, first_row + num_rows)
        return LineBlocks(
            first_rows=self.first_rows[first : end + 1],
            first_lines=self.first_lines[first : end + 1],
            first_bytes=self.first_bytes[first : end + 1],
            checksums=self.checksums[first:end],
            are_sound=self.are_sound[first:end],
            compression=self.compression,
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file.

    ``shard_id`` is 16 hex digits over (``path``, size, footer bytes; for JSON Lines the content): it moves with the
    data set, not with its root. ``path`` is relative to the input root, ``uri`` is where the file is opened.
    ``rows_per_unit`` is how an output first cut the shard; later runs of that output keep it.
    """

    shard_id: str
    path: str
    uri: str
    num_rows: int
    size_bytes: int
    rows_per_unit: int = 1024
    #: Of a JSON Lines shard as the planner found it; None for Parquet, and for a shard read back from an output.
    lines: LineBlocks | None = field(default=None, compare=False, repr=False)

    @property
    def units(self) -> "tuple[WorkUnit, ...]":
        """The shard cut into units in row order: each row in exactly one, the last one may be shorter."""
        step = self.rows_per_unit
        return tuple(
            WorkUnit(self.shard_id, first_row, min(step, self.num_rows - first_row))
            for first_row in range(0, self.num_rows, step)
        )

    def for_unit(self, unit: "WorkUnit") -> "Shard":
        """The shard as a reader of this unit alone needs it: the small part of ``lines`` that travels with it."""
        return self if self.lines is None else replace(self, lines=self.lines.holding(unit.first_row, unit.num_rows))


@dataclass(frozen=True, slots=True)
class UnreadableShard:
    """An input file whose footer or lines cannot be read: its rows cannot be counted, only named."""

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
    (not asked), 0 (the chosen token's) or k (the k best beside it). With ``choices`` nothing is generated: each of them
    is scored as the prompt's continuation.
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
    choices: tuple[str, ...] = ()
    #: What a completion is made to be: JSON of a schema (JSON text, its members in the order they are written in), or
    #: a match of a pattern from its first character to its last. At most one of them.
    json_schema: str | None = None
    regex: str | None = None

    @property
    def has_grammar(self) -> bool:
        """Whether a schema or a pattern says what a completion is."""
        return self.json_schema is not None or self.regex is not None

    @property
    def decisive(self) -> "SamplingParams":
        """What a row's tokens follow from: of greedy sampling, all but what chance alone would ask for."""
        return self if self.temperature > 0.0 else replace(self, seed=0, n=1, top_p=1.0, top_k=0, min_p=0.0)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row whose user turns are answered one after the other, and the answers so far; the next prompt is its."""

    turns: tuple[str, ...]
    #: As the row asks for it; a prompt's own has a lower ``max_new_tokens`` where the model's limit leaves less.
    sampling: SamplingParams
    #: The model's answers to the first turns, as texts.
    answers: tuple[str, ...] = ()

    @property
    def turn(self) -> int:
        """The turn that is answered next, counted from 0."""
        return len(self.answers)

    @property
    def is_last_turn(self) -> bool:
        return self.turn + 1 == len(self.turns)

    def named(self, error: str) -> str:
        """The error, saying in which turn it is where there are several."""
        return error if len(self.turns) == 1 else f"turn {self.turn + 1} of {len(self.turns)}: {error}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, rendered and tokenised; ``token_ids`` is what the model reads, nothing is added to it."""

    row_id: str
    token_ids: SequenceOf[int]
    sampling: SamplingParams
    #: Of each of ``sampling.choices``, tokenised by itself.
    choice_token_ids: tuple[tuple[int, ...], ...] = ()
    #: Where the prompt is one turn of a row with several.
    conversation: Conversation | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the model's own distribution before any sampling cut) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """One of a row's choices: the sum of its ``num_tokens`` tokens' log-probabilities (natural) behind the prompt, and
    its share of the likelihood of all the row's choices."""

    choice: str
    logprob: float
    probability: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's words to one turn of a conversation."""

    completion: str
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated sample of one row. ``token_ids`` includes the stop token that ended it, ``text`` does not.

    Of a conversation ``text``, ``finish_reason`` and ``num_prompt_tokens`` are the last turn's; ``token_ids`` and
    ``logprobs`` are those of all turns, one behind the other.
    """

    row_id: str
    sample: int
    text: str
    token_ids: SequenceOf[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    #: In the job's order, where the row was a choice among texts; ``text`` is the likeliest then.
    choices: tuple[ChoiceScore, ...] | None = None
    #: One for each turn, where the row was a conversation.
    answers: tuple[Answer, ...] | None = None


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
    #: Completions by what is amiss with them (``quality.QUALITY_KINDS``); kinds that do not occur are left out.
    quality: dict[str, int] = field(default_factory=dict)
    #: Sequences that were not generated, because an identical one was.
    num_shared_sequences: int = 0
