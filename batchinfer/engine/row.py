"""One sequence in an engine: what it was asked for, how far it has come, when it ends."""

from dataclasses import dataclass, field

from batchinfer.engine.engine import Generation, Sequence
from batchinfer.engine.sampler import SamplerRow
from batchinfer.engine.stopping import StopMatcher
from batchinfer.records import FinishReason, RowError, TokenLogprobs


@dataclass(slots=True, eq=False)
class Row:
    """A sequence and how far it has come; lives from submit to its end, through any preemption."""

    sequence: Sequence
    arrival: int
    key: int
    stop_ids: frozenset[int]
    max_new_tokens: int
    matcher: StopMatcher | None
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    admission: int = -1
    has_ended: bool = False
    has_failed_alone: bool = False

    @property
    def length(self) -> int:
        """Prompt and generated tokens."""
        return len(self.sequence.prompt.token_ids) + len(self.generated)

    @property
    def max_remaining(self) -> int:
        return self.max_new_tokens - len(self.generated)

    def sampler_row(self) -> SamplerRow:
        """The row as the sampler takes it, at its present position."""
        prompt = self.sequence.prompt
        return SamplerRow(prompt.sampling, self.key, tuple(self.stop_ids), prompt.token_ids, tuple(self.generated))

    def finish_reason(self) -> FinishReason | None:
        """Why the row ends with the token it has just taken, if it does. To be asked once per token."""
        token_id = self.generated[-1]
        stopped = token_id in self.stop_ids
        if self.matcher is not None and self.matcher.feed(token_id):
            stopped = True
        if stopped and len(self.generated) > self.sequence.prompt.sampling.min_new_tokens:
            return "stop"
        return "length" if len(self.generated) >= self.max_new_tokens else None

    def generation(self, reason: FinishReason) -> Generation:
        """The row's end."""
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        return Generation(self.sequence, tuple(self.generated), reason, logprobs)


def failure(sequence: Sequence, error_type: str, error: str) -> Generation:
    """The end of a sequence that cannot be generated."""
    return Generation(sequence, (), "length", error=RowError(sequence.prompt.row_id, error_type, error))
