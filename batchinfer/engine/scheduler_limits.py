"""What the scheduler is allowed, and what it counts."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device can hold, and how the scheduler uses it. Raises ValueError for limits that nothing can run in."""

    num_places: int
    """Token places of the KV arena."""
    max_rows: int
    """Sequences in prefill or decode at once: rows of logits."""
    max_step_tokens: int
    """Tokens through the model in one step; not below ``max_rows``, or decode would leave no room for prefill."""
    granule: int = 16
    """Capacities of extents are multiples of it."""
    growth_tokens: int = 128
    """Places an extent is given beyond what it needs now."""
    min_prefix_tokens: int = 64
    min_prefix_rows: int = 4
    """Prefixes are shared from so many tokens and waiting rows on (n samples of one prompt: from two rows)."""
    prefix_block: int = 32
    """Shared prefixes end at multiples of it (n samples of one prompt: before the prompt's last token)."""
    max_waiting_scan: int = 128
    """Arrivals among which long prompts go first; waiting rows that one plan passes over at most."""
    prior_output_tokens: int = 256
    """The mean output expected before any was seen."""
    reserve: float = 0.05
    """Share of the places that admission leaves free, so that running rows can grow."""

    def __post_init__(self) -> None:
        positive = (self.max_rows, self.granule, self.growth_tokens, self.prefix_block, self.max_waiting_scan)
        if min(positive) < 1 or not 0 <= self.reserve < 1:
            raise ValueError(f"limits must be positive and the reserve a share below 1: {self}")
        if self.max_step_tokens < self.max_rows:
            raise ValueError(
                f"max_step_tokens {self.max_step_tokens} is below max_rows {self.max_rows}: decode alone fills a "
                "step; raise the first or lower the second"
            )


@dataclass(frozen=True, slots=True)
class Counters:
    """What is in hand now, and running totals since the scheduler was made."""

    num_waiting: int
    num_running: int
    num_places_used: int
    num_preemptions: int
    num_prefixes: int
    num_prefix_hits: int
    num_growths: int
    num_copied_places: int
    num_chunked_prefills: int
    #: Turns that went on behind kept KV, their tokens that have it, and kept KV that had to make room.
    num_kept_hits: int = 0
    num_kept_tokens: int = 0
    num_kept_evicted: int = 0

    def after(self, earlier: "Counters") -> "Counters":
        """The running totals with those of an earlier scheduler, whose sequences this one took over."""
        return replace(
            self,
            num_preemptions=self.num_preemptions + earlier.num_preemptions,
            num_prefixes=self.num_prefixes + earlier.num_prefixes,
            num_prefix_hits=self.num_prefix_hits + earlier.num_prefix_hits,
            num_growths=self.num_growths + earlier.num_growths,
            num_copied_places=self.num_copied_places + earlier.num_copied_places,
            num_chunked_prefills=self.num_chunked_prefills + earlier.num_chunked_prefills,
            num_kept_hits=self.num_kept_hits + earlier.num_kept_hits,
            num_kept_tokens=self.num_kept_tokens + earlier.num_kept_tokens,
            num_kept_evicted=self.num_kept_evicted + earlier.num_kept_evicted,
        )
