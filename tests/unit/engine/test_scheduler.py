from dataclasses import fields, replace
from itertools import count
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.scheduler_limits import Counters, Limits
from batchinfer.engine.step_plan import DecodeRow, PrefillChunk, StepPlan
from tests.unit.engine.arena_model import ArenaModel, Job, random_jobs

#: Room for everything, nothing shared; tests make short what they are about.
ROOMY = Limits(
    num_places=4096, max_rows=64, max_step_tokens=4096, granule=4, growth_tokens=8, min_prefix_tokens=10**6, reserve=0.0
)
SHARING = replace(ROOMY, min_prefix_tokens=8, prefix_block=4, min_prefix_rows=3)


def prompt_of(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    dice = Random(f"{num_tokens} {seed}")
    return tuple(dice.randrange(1000) for _ in range(num_tokens))


def planned(model: ArenaModel) -> StepPlan:
    plan = model.step()
    assert plan is not None
    model.scheduler.check()
    return plan


def holders(plan: StepPlan) -> list[int]:
    return [chunk.holder for chunk in plan.prefill]


class TestOneSequence:
    def test_is_prefilled_with_its_first_step_and_decoded_with_each_later_one(self) -> None:
        scheduler = Scheduler(ROOMY, count(1))
        assert scheduler.add(0, prompt_of(5), 3, "row") == 3
        assert scheduler.plan() == StepPlan((), (), (PrefillChunk(0, 0, 5, 0, samples=True),))
        assert scheduler.plan() == StepPlan((), (DecodeRow(0, 5, 0),), ())
        assert scheduler.plan() == StepPlan((), (DecodeRow(0, 6, 0),), ())
        assert scheduler.plan() is None, "it has its three tokens"
        assert scheduler.counters.num_running == 1
        scheduler.finish(0)
        assert scheduler.plan() is None
        assert scheduler.counters == Counters(0, 0, 0, 0, 0, 0, 0, 0, 0)

    def test_one_new_token_needs_its_prefill_only(self) -> None:
        model = ArenaModel(ROOMY)
        model.submit([Job(prompt_of(9), max_new_tokens=1)])
        model.run()
        assert [plan.num_tokens for plan in model.plans] == [9]

    def test_its_places_are_given_back_with_the_plan_after_its_last(self) -> None:
        scheduler = Scheduler(ROOMY, count(1))
        scheduler.add(0, prompt_of(5), 1, "row")
        scheduler.plan()
        assert scheduler.counters.num_places_used > 0
        scheduler.plan()
        assert scheduler.counters.num_places_used == 0
        scheduler.check()

    def test_that_could_never_fit_is_refused_with_the_numbers(self) -> None:
        scheduler = Scheduler(replace(ROOMY, num_places=103), count(1))
        with pytest.raises(ValueError, match=r"prompt of 100 tokens .* need 101 places, but the KV cache has 100"):
            scheduler.add(0, prompt_of(100), 1, "row")
        assert scheduler.add(0, prompt_of(99), 1, "row") == 1

    @pytest.mark.parametrize(("prompt", "max_new_tokens"), [((), 4), ((1, 2), 0)])
    def test_without_tokens_is_refused(self, prompt: tuple[int, ...], max_new_tokens: int) -> None:
        with pytest.raises(ValueError, match="sequence 7"):
            Scheduler(ROOMY, count(1)).add(7, prompt, max_new_tokens, "row")

    def test_with_tokens_of_an_earlier_try_is_read_with_them_and_given_the_missing_ones(self) -> None:
        scheduler = Scheduler(ROOMY, count(1))
        assert scheduler.add(0, prompt_of(5), 6, "row", num_generated=4) == 6
        assert scheduler.plan() == StepPlan((), (), (PrefillChunk(0, 0, 9, 0, samples=True),))
        assert scheduler.plan() == StepPlan((), (DecodeRow(0, 9, 0),), ())
        assert scheduler.plan() is None, "it has its six tokens"
        with pytest.raises(ValueError, match="sequence 1 has 6 tokens of the 6"):
            scheduler.add(1, prompt_of(5), 6, "row", num_generated=6)

    def test_is_added_once(self) -> None:
        scheduler = Scheduler(ROOMY, count(1))
        scheduler.add(0, prompt_of(3), 1, "row")
        with pytest.raises(ValueError, match="added already"):
            scheduler.add(0, prompt_of(3), 1, "row")

    def test_that_would_outgrow_the_arena_is_told_how_far_it_can_get(self) -> None:
        """40 places: KV for 10 prompt and 30 new tokens, and one more token that needs none."""
        model = ArenaModel(replace(ROOMY, num_places=40))
        (sequence,) = model.submit([Job(prompt_of(10), max_new_tokens=100, stop_after=100)])
        assert model.tracks[sequence].token_limit == 31
        model.run()
        assert model.tracks[sequence].num_sampled == 31


class TestSteps:
    def test_decode_rows_come_first_and_prefill_fills_the_rest(self) -> None:
        model = ArenaModel(replace(ROOMY, max_step_tokens=64, max_rows=64))
        model.submit([Job(prompt_of(10, seed)) for seed in range(6)])
        assert planned(model).num_tokens == 60
        model.submit([Job(prompt_of(100))])
        plan = planned(model)
        assert len(plan.decode) == 6
        assert [chunk.num_tokens for chunk in plan.prefill] == [58]

    def test_a_prompt_longer_than_a_step_is_read_in_chunks_beside_decode(self) -> None:
        model = ArenaModel(replace(ROOMY, max_step_tokens=16, max_rows=16))
        model.submit([Job(prompt_of(4), max_new_tokens=9, stop_after=9)])
        planned(model)
        (long,) = model.submit([Job(prompt_of(40))])
        plans = [planned(model) for _ in range(3)]
        assert [(chunk.start, chunk.stop, chunk.samples) for plan in plans for chunk in plan.prefill] == [
            (0, 15, False),
            (15, 30, False),
            (30, 40, True),
        ]
        assert all(len(plan.decode) == 1 for plan in plans)
        assert model.scheduler.counters.num_chunked_prefills == 1
        model.run()
        assert model.tracks[long].num_sampled == 8

    def test_no_more_rows_run_than_allowed(self) -> None:
        model = ArenaModel(replace(ROOMY, max_rows=3))
        model.submit([Job(prompt_of(5, seed)) for seed in range(9)])
        while model.live:
            model.step()
            assert model.scheduler.counters.num_running <= 3
        assert max(len(plan.decode) for plan in model.plans) == 3

    def test_steps_are_larger_from_the_moment_that_more_is_allowed(self) -> None:
        model = ArenaModel(replace(ROOMY, max_rows=8, max_step_tokens=100))
        model.scheduler.allow(2, 50)
        model.submit([Job(prompt_of(40, seed), max_new_tokens=9, stop_after=9) for seed in range(8)])
        assert [planned(model).num_tokens for _ in range(3)] == [50, 31, 2]
        model.scheduler.allow(8, 100)
        plan = planned(model)
        assert (len(plan.decode), plan.num_tokens) == (2, 100)
        model.run()
        assert max(len(plan.decode) for plan in model.plans) == 8

    def test_a_sequence_finished_or_aborted_anywhere_is_not_planned_again(self) -> None:
        model = ArenaModel(replace(ROOMY, max_rows=4, max_step_tokens=16))
        sequences = model.submit([Job(prompt_of(12 + seed, seed)) for seed in range(6)])
        planned(model)
        for sequence in (sequences[5], sequences[3], sequences[0]):
            model.abort(sequence)
            model.scheduler.check()
        model.run()
        assert model.scheduler.counters.num_running == 0

    def test_an_unknown_sequence_cannot_finish(self) -> None:
        scheduler = Scheduler(ROOMY, count(1))
        for call in (scheduler.finish, scheduler.abort, scheduler.holder_tokens):
            with pytest.raises(KeyError):
                call(3)


class TestPlaces:
    def test_an_extent_that_is_outgrown_moves_with_its_content(self) -> None:
        """The first row cannot be extended where it lies, the second begins behind it."""
        model = ArenaModel(ROOMY)
        model.submit([Job(prompt_of(9, seed), max_new_tokens=40, stop_after=40) for seed in range(2)])
        model.run()
        counters = model.scheduler.counters
        assert counters.num_growths >= 6
        assert 0 < counters.num_copied_places == sum(copy.num_tokens for plan in model.plans for copy in plan.copies)

    def test_an_extent_with_free_places_behind_it_grows_where_it_lies(self) -> None:
        model = ArenaModel(ROOMY)
        model.submit([Job(prompt_of(9), max_new_tokens=40, stop_after=40)])
        model.run()
        assert model.scheduler.counters.num_growths >= 3
        assert model.scheduler.counters.num_copied_places == 0

    def test_several_extents_grow_in_one_step(self) -> None:
        model = ArenaModel(ROOMY)
        model.submit([Job(prompt_of(8, seed), max_new_tokens=12, stop_after=12) for seed in range(5)])
        model.run()
        assert max(len(plan.copies) for plan in model.plans) >= 3

    def test_free_places_in_pieces_are_enough_as_the_others_slide_together(self) -> None:
        """1. Six rows fill 96 places. 2. Every other one is done. 3. The next prompt needs 48 of the 3 x 16 free."""
        model = ArenaModel(replace(ROOMY, num_places=96, growth_tokens=3, prior_output_tokens=1))
        sequences = model.submit([Job(prompt_of(13, seed), max_new_tokens=4, stop_after=4) for seed in range(6)])
        planned(model)
        for sequence in sequences[::2]:
            model.abort(sequence)
        (long,) = model.submit([Job(prompt_of(45), max_new_tokens=2, stop_after=2)])
        plan = planned(model)
        assert holders(plan) == [long]
        assert plan.copies
        assert not plan.preempted
        model.run()

    def test_when_places_run_out_the_newest_row_is_preempted_and_recomputed_later(self) -> None:
        model = ArenaModel(replace(ROOMY, num_places=64, growth_tokens=4, prior_output_tokens=1))
        sequences = model.submit([Job(prompt_of(12, seed), max_new_tokens=30, stop_after=30) for seed in range(3)])
        while not model.scheduler.counters.num_preemptions:
            planned(model)
        assert model.plans[-1].preempted == (sequences[2],)
        assert sequences[2] not in holders(model.plans[-1])
        (newer,) = model.submit([Job(prompt_of(14), max_new_tokens=2)])
        model.run()
        starts = [holder for plan in model.plans[1:] for holder in holders(plan)]
        assert starts.index(sequences[2]) < starts.index(newer), "it waits in front of those that never ran"
        refill = next(chunk for plan in model.plans[1:] for chunk in plan.prefill if chunk.holder == sequences[2])
        track = model.tracks[sequences[2]]
        assert refill.start == 0
        assert refill.stop == 12 + track.preempted_at[0], "prompt and generated tokens"
        assert all(model.tracks[sequence].num_sampled == 30 for sequence in sequences)

    def test_the_oldest_row_is_never_preempted(self) -> None:
        model = ArenaModel(replace(ROOMY, num_places=80, growth_tokens=1, granule=1, prior_output_tokens=1), lag=2)
        sequences = model.submit([Job(prompt_of(6, seed), max_new_tokens=60, stop_after=60) for seed in range(8)])
        model.run()
        assert model.scheduler.counters.num_preemptions > 0
        assert model.tracks[sequences[0]].preempted_at == []
        finished = [model.tracks[sequence].finished_at or 0 for sequence in sequences]
        assert finished == sorted(finished)


class TestAdmission:
    def test_long_prompts_go_first_among_the_rows_looked_at(self) -> None:
        model = ArenaModel(replace(ROOMY, max_waiting_scan=4, max_rows=1))
        lengths = [3, 9, 5, 7, 20, 30, 40, 10]
        model.submit([Job(prompt_of(length), max_new_tokens=1) for length in lengths])
        model.run()
        assert [plan.num_tokens for plan in model.plans] == [9, 7, 5, 3, 40, 30, 20, 10]

    @given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 6))
    def test_no_row_is_overtaken_by_more_than_its_window(self, seed: int, window: int, max_rows: int) -> None:
        dice = Random(seed)
        limits = replace(ROOMY, num_places=200, max_waiting_scan=window, max_rows=max_rows, prior_output_tokens=3)
        model = ArenaModel(limits)
        for _ in range(5):
            model.submit(random_jobs(dice, 8, max_prompt=40, max_new=20))
            for _ in range(dice.randint(0, 10)):
                model.step()
        model.run(check=False)
        starts = [(track.arrival, track.first_prefill or 0) for track in model.tracks.values()]
        for arrival, start in starts:
            overtakers = [other for other, other_start in starts if other > arrival and other_start < start]
            assert len(overtakers) < window

    def test_outputs_seen_decide_how_many_rows_fit_not_the_most_they_may_have(self) -> None:
        """400 places, up to 300 new tokens each: by their limits one row would fit, by what was seen twenty do."""
        model = ArenaModel(replace(ROOMY, num_places=400, prior_output_tokens=300))
        jobs = [Job(prompt_of(6, seed), max_new_tokens=300, stop_after=3) for seed in range(2000)]
        model.submit(jobs[:1000])
        early = max(len(planned(model).decode) for _ in range(6))
        while len(model.live) > 100:
            model.step()
        model.submit(jobs[1000:])
        late = max(len(planned(model).decode) for _ in range(20))
        assert early < 8
        assert late > 20
        assert model.scheduler.counters.num_preemptions == 0

    def test_rows_expected_to_become_long_wait_although_their_prompts_would_fit(self) -> None:
        model = ArenaModel(replace(ROOMY, num_places=400, prior_output_tokens=10**6))
        model.submit([Job(prompt_of(10, seed), max_new_tokens=90, stop_after=90) for seed in range(20)])
        model.run()
        assert max(len(plan.decode) for plan in model.plans) == 4
        assert model.scheduler.counters.num_preemptions == 0

    def test_a_reserve_is_left_for_running_rows_to_grow_into(self) -> None:
        model = ArenaModel(replace(ROOMY, num_places=400, prior_output_tokens=1, reserve=0.25))
        model.submit([Job(prompt_of(10, seed), max_new_tokens=90, stop_after=90) for seed in range(20)])
        planned(model)
        assert model.scheduler.counters.num_places_used <= 300

    def test_a_row_too_large_for_the_reserve_still_runs_alone(self) -> None:
        model = ArenaModel(replace(ROOMY, num_places=400, reserve=0.5))
        model.submit([Job(prompt_of(390), max_new_tokens=4, stop_after=4), Job(prompt_of(20))])
        model.run()
        assert model.tracks[0].num_sampled == 4


class TestSharedPrefixes:
    def template_jobs(self, num_jobs: int, **kwargs: int) -> list[Job]:
        return [Job((*prompt_of(21), 5000 + row, 6000 + row), **kwargs) for row in range(num_jobs)]

    def test_a_template_is_prefilled_once_as_its_own_holder(self) -> None:
        model = ArenaModel(SHARING)
        sequences = model.submit(self.template_jobs(10))
        first = planned(model)
        (chunk,) = first.prefill
        assert chunk == PrefillChunk(10, 0, 20, chunk.offset, samples=False)
        assert model.scheduler.holder_tokens(chunk.holder) == (sequences[0], 20)
        second = planned(model)
        assert [(chunk.start, chunk.stop) for chunk in second.prefill] == [(20, 23)] * 10
        assert {(chunk.prefix_offset, chunk.prefix_length) for chunk in second.prefill} == {(chunk.offset, 20)}
        third = planned(model)
        assert {(row.prefix_offset, row.prefix_length) for row in third.decode} == {(chunk.offset, 20)}
        model.run()
        assert model.scheduler.counters.num_prefixes == 1
        assert model.scheduler.counters.num_prefix_hits == 10

    def test_the_samples_of_one_prompt_are_one_prefill(self) -> None:
        model = ArenaModel(SHARING)
        model.submit([Job(prompt_of(30), family="row", max_new_tokens=4) for _ in range(5)])
        model.run()
        assert [chunk.num_tokens for plan in model.plans for chunk in plan.prefill] == [29, 1, 1, 1, 1, 1]

    @pytest.mark.parametrize(
        "limits",
        [
            replace(SHARING, min_prefix_rows=11),
            replace(SHARING, min_prefix_tokens=21),
            # Rounded up, prefix and full row need 24 + 8 places; either row alone fits.
            replace(SHARING, num_places=28, prefix_block=3),
        ],
        ids=["few rows", "few tokens", "no room"],
    )
    def test_a_prefix_that_is_not_worth_it_is_not_made(self, limits: Limits) -> None:
        model = ArenaModel(limits)
        model.submit(self.template_jobs(10, max_new_tokens=6, stop_after=3))
        model.run()
        assert model.scheduler.counters.num_prefixes == 0

    def test_rows_that_share_nothing_do_not_wait_for_a_prefix(self) -> None:
        model = ArenaModel(SHARING)
        model.submit([Job(prompt_of(40), max_new_tokens=2, stop_after=2), *self.template_jobs(4)])
        assert set(holders(planned(model))) == {0, 5}

    def test_a_long_prefix_is_read_in_chunks_while_others_run(self) -> None:
        model = ArenaModel(replace(SHARING, max_step_tokens=12, max_rows=12))
        model.submit(self.template_jobs(4))
        model.run()
        assert [chunk.stop for plan in model.plans for chunk in plan.prefill if chunk.holder == 4] == [12, 20]

    def test_samples_with_tokens_of_an_earlier_try_share_their_prompt_and_read_the_rest_alone(self) -> None:
        model = ArenaModel(SHARING)
        jobs = [Job(prompt_of(30), family="row", max_new_tokens=8, num_generated=number) for number in range(4)]
        model.submit(jobs)
        model.run()
        assert [chunk.num_tokens for plan in model.plans for chunk in plan.prefill] == [29, 4, 3, 2, 1]
        assert all(track.num_sampled == 8 for track in model.tracks.values())

    def test_a_prefix_stays_while_waiting_rows_want_it_and_goes_with_the_last(self) -> None:
        model = ArenaModel(replace(SHARING, max_rows=2), lag=0)
        model.submit(self.template_jobs(6, max_new_tokens=2, stop_after=2))
        model.run()
        counters = model.scheduler.counters
        assert (counters.num_prefixes, counters.num_prefix_hits) == (1, 6)

    def test_when_its_founder_is_aborted_in_its_prefill_it_is_made_again_for_another(self) -> None:
        model = ArenaModel(replace(SHARING, max_step_tokens=12, max_rows=12))
        sequences = model.submit(self.template_jobs(5))
        planned(model)
        model.abort(sequences[0])
        model.scheduler.check()
        model.run()
        assert model.scheduler.counters.num_prefixes == 2
        assert model.scheduler.counters.num_prefix_hits == 4

    def test_a_row_whose_prefix_was_evicted_before_it_could_use_it_starts_without(self) -> None:
        model = ArenaModel(replace(SHARING, max_step_tokens=12, max_rows=12))
        sequences = model.submit(self.template_jobs(5))
        planned(model)
        assert model.scheduler._room.prefixes.evict(), "as for a row that must grow"
        model.run()
        chunks = [chunk for plan in model.plans for chunk in plan.prefill if chunk.holder in sequences]
        assert {chunk.holder for chunk in chunks if not chunk.prefix_length} == {sequences[0]}
        assert model.scheduler.counters.num_prefixes == 2

    def test_a_preempted_row_finds_its_prefix_again(self) -> None:
        """The last user of the prefix gives way to an older row, which needs its places but not the prefix's."""
        model = ArenaModel(replace(SHARING, num_places=84, growth_tokens=4, prior_output_tokens=1))
        model.submit([Job(prompt_of(25), max_new_tokens=30, stop_after=30)])
        model.step()
        *short, long = self.template_jobs(3, max_new_tokens=30, stop_after=30)
        model.submit([*(replace(job, stop_after=2) for job in short), long])
        model.run()
        counters = model.scheduler.counters
        assert (counters.num_preemptions, counters.num_prefixes, counters.num_prefix_hits) == (1, 1, 4)

    def test_an_unused_prefix_makes_room_before_a_row_is_preempted(self) -> None:
        """Two old rows grow into all places while the template's rows wait for a slot."""
        model = ArenaModel(replace(SHARING, num_places=96, max_rows=2, growth_tokens=4, prior_output_tokens=1))
        olds = model.submit([Job(prompt_of(25, seed), max_new_tokens=24, stop_after=24) for seed in range(1, 3)])
        planned(model)
        model.abort(olds[1])
        model.submit(self.template_jobs(3, max_new_tokens=60, stop_after=60))
        model.run()
        assert model.scheduler.counters.num_prefixes >= 1
        assert model.tracks[olds[0]].preempted_at == []


def test_limits_that_nothing_can_run_in_are_refused() -> None:
    with pytest.raises(ValueError, match="below max_rows"):
        Limits(num_places=100, max_rows=9, max_step_tokens=8)
    with pytest.raises(ValueError, match="positive"):
        Limits(num_places=100, max_rows=0, max_step_tokens=8)
    with pytest.raises(ValueError, match="hold no granule"):
        Scheduler(Limits(num_places=3, max_rows=1, max_step_tokens=8, granule=4), count())


@st.composite
def small_limits(draw: st.DrawFn) -> Limits:
    max_rows = draw(st.integers(1, 12))
    return Limits(
        num_places=draw(st.integers(40, 200)),
        max_rows=max_rows,
        max_step_tokens=max_rows + draw(st.integers(0, 40)),
        granule=draw(st.sampled_from((1, 2, 8))),
        growth_tokens=draw(st.sampled_from((1, 4, 16))),
        min_prefix_tokens=draw(st.sampled_from((2, 8))),
        min_prefix_rows=draw(st.integers(2, 4)),
        prefix_block=draw(st.sampled_from((2, 4))),
        max_waiting_scan=draw(st.sampled_from((1, 4, 32))),
        prior_output_tokens=draw(st.sampled_from((1, 30))),
        reserve=draw(st.sampled_from((0.0, 0.2))),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_limits(), st.integers(0, 2**32), st.integers(0, 2))
def test_any_jobs_in_any_limits_read_the_right_places_and_finish(limits: Limits, seed: int, lag: int) -> None:
    """The model asserts in each step what must never happen; see ``ArenaModel``."""
    dice = Random(seed)
    model = ArenaModel(limits, lag)
    for _ in range(3):
        max_new, max_turns = dice.choice((3, 20, 60)), dice.choice((0, 3))
        model.submit(
            random_jobs(dice, dice.randint(1, 12), max_prompt=18, max_new=max_new, shared=20, max_turns=max_turns)
        )
        for _ in range(dice.randint(0, 30)):
            model.step()
            model.scheduler.check()
            if model.live and dice.random() < 0.05:
                model.abort(dice.choice(list(model.live)))
    model.run()


def soak(num_sequences: int, seed: int) -> Counters:
    """Totals over many short lives of a scheduler, each with its own dice-driven limits and aborts."""
    dice = Random(seed)
    totals = dict.fromkeys((field.name for field in fields(Counters)), 0)
    while num_sequences > 0:
        max_rows = dice.randint(1, 12)
        limits = Limits(
            num_places=dice.randint(40, 200),
            max_rows=max_rows,
            max_step_tokens=max_rows + dice.randint(0, 40),
            granule=dice.choice((1, 2, 4, 8)),
            growth_tokens=dice.choice((1, 4, 16)),
            min_prefix_tokens=dice.choice((2, 4, 8)),
            min_prefix_rows=dice.randint(2, 4),
            prefix_block=dice.choice((2, 4)),
            max_waiting_scan=dice.choice((1, 4, 32)),
            prior_output_tokens=dice.choice((1, 4, 30)),
            reserve=dice.choice((0.0, 0.05, 0.2)),
        )
        model = ArenaModel(limits, lag=dice.randint(0, 2))
        for _ in range(10):
            jobs = random_jobs(
                dice,
                20,
                max_prompt=dice.choice((5, 20)),
                max_new=dice.choice((3, 20, 60)),
                shared=dice.choice((0, 20)),
                max_turns=dice.choice((0, 2)),
            )
            num_sequences -= len(model.submit(jobs))
            while len(model.live) > 10:
                model.step()
                if dice.random() < 0.02 and model.live:
                    model.abort(dice.choice(list(model.live)))
            model.scheduler.check()
        model.run(check=False)
        assert not model.scheduler._rows
        assert not model.scheduler._line
        for name in totals:
            totals[name] += getattr(model.scheduler.counters, name)
    return Counters(**totals)


def every_rule_was_put_to_work(totals: Counters, times: int) -> bool:
    return (
        min(
            totals.num_preemptions,
            totals.num_prefixes,
            totals.num_prefix_hits,
            totals.num_growths,
            totals.num_copied_places,
            totals.num_chunked_prefills,
            totals.num_kept_hits,
            totals.num_kept_evicted,
        )
        > times
    )


def test_two_thousand_random_sequences_leave_nothing_behind() -> None:
    assert every_rule_was_put_to_work(soak(2_000, seed=1), times=10)


@pytest.mark.slow
def test_twenty_thousand_random_sequences_leave_nothing_behind() -> None:
    assert every_rule_was_put_to_work(soak(20_000, seed=2), times=200)
