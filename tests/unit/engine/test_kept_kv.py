"""KV kept between the turns of a conversation: it saves reading, and takes nothing from anybody."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.engine.extents import Extents
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.step_plan import Extent, PrefillChunk, StepPlan
from tests.unit.engine.arena_model import ArenaModel, Job, NextTurn, random_jobs

#: Room for everything, nothing shared.
ROOMY = Limits(
    num_places=4096, max_rows=64, max_step_tokens=4096, granule=4, growth_tokens=8, min_prefix_tokens=10**6, reserve=0.0
)
SHARING = replace(ROOMY, min_prefix_tokens=8, prefix_block=4, min_prefix_rows=3)
NEVER = NextTurn(delay=10**9)


def prompt_of(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    dice = Random(f"{num_tokens} {seed}")
    return tuple(dice.randrange(1000) for _ in range(num_tokens))


def chunks_of(model: ArenaModel, sequence: int) -> list[PrefillChunk]:
    return [chunk for plan in model.plans for chunk in plan.prefill if chunk.holder == sequence]


def run_until_finished(model: ArenaModel, *sequences: int) -> None:
    while any(sequence in model.live for sequence in sequences):
        model.step()
        model.scheduler.check()


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("stop_after", [5, 8], ids=["by itself", "by its length"])
def test_the_next_turn_reads_only_what_is_new(lag: int, stop_after: int) -> None:
    model = ArenaModel(ROOMY, lag)
    model.submit([Job(prompt_of(30), stop_after=stop_after, turns=(NextTurn(num_new=6), NextTurn(num_new=4)))])
    model.run()
    length = 30 + stop_after
    # A turn's last token has KV only where the row ran ahead of its stop.
    for sequence, num_new in ((1, 6), (2, 4)):
        (chunk,) = chunks_of(model, sequence)
        assert chunk.start in (length - 1, length)
        assert (chunk.stop, chunk.samples) == (length + num_new, True)
        length += num_new + stop_after
    counters = model.scheduler.counters
    assert (counters.num_kept_hits, counters.num_kept_evicted) == (2, 0)
    assert counters.num_kept_tokens == chunks_of(model, 1)[0].start + chunks_of(model, 2)[0].start


def test_a_prompt_that_leaves_the_earlier_turn_is_read_from_there_and_needs_no_more_places_than_it_has() -> None:
    """As with a template that drops an answer's thoughts: 30 of 230 tokens stay."""
    model = ArenaModel(ROOMY, lag=0)
    thoughts = Job(prompt_of(30), 200, 200, turns=(NextTurn(share=30 / 230, num_new=10),))
    model.submit([replace(thoughts, max_new_tokens=8, stop_after=8, turns=()), thoughts])
    while 2 not in model.tracks:
        model.step()
    model.step()
    (chunk,) = chunks_of(model, 2)
    assert (chunk.start, chunk.stop) == (30, 40)
    assert model.scheduler.counters.num_places_used <= 40 + ROOMY.growth_tokens + ROOMY.granule
    model.run()


def test_nothing_in_common_is_nothing_kept() -> None:
    model = ArenaModel(ROOMY)
    model.submit([Job(prompt_of(30), turns=(NextTurn(share=0.0, num_new=9),))])
    model.run()
    assert [(chunk.start, chunk.stop) for chunk in chunks_of(model, 1)] == [(0, 9)]
    assert model.scheduler.counters.num_kept_hits == 0


def test_a_repeated_prompt_still_reads_its_last_token() -> None:
    model = ArenaModel(ROOMY)
    model.submit([Job(prompt_of(30), turns=(NextTurn(share=20 / 38, num_new=0),))])
    model.run()
    assert [(chunk.start, chunk.stop) for chunk in chunks_of(model, 1)] == [(19, 20)]


def test_the_next_turn_waits_where_its_conversation_waited() -> None:
    """One row at a time, many waiting: the second turn comes before all that arrived after the first one."""
    model = ArenaModel(replace(ROOMY, max_rows=1, max_waiting_scan=1), lag=0)
    model.submit([Job(prompt_of(30), turns=(NextTurn(delay=0),))])
    later = model.submit([Job(prompt_of(6, seed), max_new_tokens=3) for seed in range(20)])
    model.run()
    (second_turn,) = set(model.tracks) - {0, *later}
    starts = [chunk.holder for plan in model.plans for chunk in plan.prefill]
    assert starts.index(second_turn) < 3


def test_samples_keep_what_they_share_and_go_on_apart() -> None:
    model = ArenaModel(SHARING)
    jobs = [
        Job(prompt_of(30), max_new_tokens=4, stop_after=4, family="row", turns=(NextTurn(delay=2),)) for _ in range(3)
    ]
    sequences = model.submit(jobs)
    run_until_finished(model, *sequences)
    assert model.scheduler.counters.num_places_used > 0
    model.run()
    second = [sequence for sequence in model.tracks if sequence not in sequences]
    assert len(second) == 3
    for sequence in second:
        (chunk,) = chunks_of(model, sequence)
        assert chunk.start >= 33
        assert chunk.prefix_length == 29
    assert model.scheduler.counters.num_kept_hits == 3


class TestPressure:
    def test_what_was_kept_longest_without_being_asked_for_goes_first(self) -> None:
        model = ArenaModel(ROOMY, lag=0)
        for seed in range(3):
            run_until_finished(model, *model.submit([Job(prompt_of(27, seed), 2, 1, turns=(NEVER,))]))
        kept = model.scheduler._room.kept
        # The next turn behind the oldest waits for its KV, but has no claim on it.
        model.scheduler.add(50, (*prompt_of(27, 0), 1, 2), 4, "asks", continues=0)
        remaining = []
        while kept.evict():
            model.scheduler.check()
            remaining.append(sorted(kept._kept))
        assert remaining == [[0, 2], [0], []]

    def test_a_row_that_must_grow_takes_kept_places_before_it_preempts(self) -> None:
        model = ArenaModel(replace(ROOMY, num_places=100, growth_tokens=4, prior_output_tokens=1), lag=0)
        run_until_finished(model, *model.submit([Job(prompt_of(40), 1, 1, turns=(NEVER,))]))
        rows = model.submit([Job(prompt_of(8, seed), 40, 40) for seed in range(2)])
        run_until_finished(model, *rows)
        counters = model.scheduler.counters
        assert (counters.num_preemptions, counters.num_kept_evicted) == (0, 1)

    def test_a_turn_whose_kv_is_gone_reads_its_whole_prompt(self) -> None:
        model = ArenaModel(replace(ROOMY, num_places=100), lag=0)
        run_until_finished(model, *model.submit([Job(prompt_of(40), 1, 1, turns=(NextTurn(num_new=5, delay=20),))]))
        run_until_finished(model, *model.submit([Job(prompt_of(80), 4, 4)]))
        model.run()
        second = max(model.tracks)
        assert [(chunk.start, chunk.stop) for chunk in chunks_of(model, second)] == [(0, 46)]
        assert model.scheduler.counters.num_kept_hits == 0

    def test_a_prefix_that_only_kept_kv_stands_on_makes_room_too(self) -> None:
        model = ArenaModel(replace(SHARING, num_places=100), lag=0)
        samples = [Job(prompt_of(50), 2, 2, family="row", turns=(NEVER,)) for _ in range(3)]
        run_until_finished(model, *model.submit(samples))
        used = model.scheduler.counters.num_places_used
        assert used >= 49
        run_until_finished(model, *model.submit([Job(prompt_of(30, 1), 2, 2), Job(prompt_of(30, 2), 2, 2)]))
        decoding = [len(plan.prefill) for plan in model.plans[-3:]]
        assert 2 in decoding, "both at once, as without anything kept"

    def test_a_turn_too_long_beside_its_prefix_starts_over_without_it(self) -> None:
        """The prefix' rounding is what the longest row has no places for."""
        limits = replace(SHARING, num_places=62, granule=4, prefix_block=3)
        model = ArenaModel(limits, lag=0)
        model.submit([Job(prompt_of(30), 8, 8, family="row", turns=(NextTurn(num_new=14),)) for _ in range(2)])
        model.run()
        assert all(track.num_sampled == 8 for track in model.tracks.values())
        assert model.scheduler.counters.num_kept_hits == 0

    def test_abort_and_drop_give_everything_back(self) -> None:
        model = ArenaModel(ROOMY, lag=1)
        sequences = model.submit([Job(prompt_of(20, seed), 6, 6, turns=(NEVER,)) for seed in range(3)])
        run_until_finished(model, *sequences[1:])
        model.scheduler.add(50, prompt_of(20, 1), 4, "asks", continues=sequences[1])
        model.scheduler.abort(50)
        model.scheduler.drop_kept(sequences[0])
        model.scheduler.drop_kept(sequences[0])
        model.scheduler.check()
        model.scheduler.drop_kept(sequences[2])
        model.pending.clear()
        model.run()

    def test_an_aborted_row_keeps_nothing_however_far_it_was(self) -> None:
        """It has all its tokens, and its last one is in flight still."""
        model = ArenaModel(ROOMY, lag=3)
        (sequence,) = model.submit([Job(prompt_of(20), 3, 3, turns=(NEVER,))])
        for _ in range(4):
            model.scheduler.plan()
        assert model.scheduler.counters.num_places_used > 0
        model.abort(sequence)
        model.scheduler.check()
        assert model.scheduler.counters.num_places_used == 0


def decisions(plans: list[StepPlan]) -> list[tuple[object, ...]]:
    """Who does what in each step, wherever it lies."""
    return [
        (
            [(row.sequence, row.position) for row in plan.decode],
            [(chunk.holder, chunk.start, chunk.stop, chunk.samples) for chunk in plan.prefill],
            plan.preempted,
        )
        for plan in plans
    ]


@given(st.integers(0, 2**32))
def test_kept_kv_that_nobody_asks_for_changes_no_decision(seed: int) -> None:
    """The same jobs with and without turns that never come, in an arena that is too small for them."""
    dice = Random(seed)
    limits = replace(
        ROOMY,
        num_places=dice.randint(60, 200),
        max_rows=dice.randint(1, 8),
        granule=dice.choice((1, 4, 8)),
        growth_tokens=dice.choice((1, 8)),
        prior_output_tokens=dice.choice((1, 30)),
        reserve=dice.choice((0.0, 0.2)),
    )
    jobs = random_jobs(dice, 20, max_prompt=20, max_new=dice.choice((3, 20, 40)))
    plans = []
    for turns in ((), (NEVER,)):
        model = ArenaModel(limits, lag=seed % 3)
        for start in range(0, len(jobs), 5):
            model.submit(replace(job, turns=turns) for job in jobs[start : start + 5])
            for _ in range(6):
                model.step()
                model.scheduler.check()
        run_until_finished(model, *model.tracks)
        plans.append(decisions(model.plans))
    assert plans[0] == plans[1]


def test_an_extent_shrinks_and_what_follows_it_is_free() -> None:
    extents = Extents(100, granule=10)
    first, second = extents.allocate(40), extents.allocate(20)
    assert first is not None
    assert second is not None
    assert extents.shrink(first, 11) == Extent(0, 20)
    extents.check()
    extents.free(second)
    assert extents.largest_free == 80
    extents.check()
