"""What is counted of rendered rows, and which prompts are held to be equal."""

from dataclasses import replace

from batchinfer.records import Conversation, Prompt, RowError, SamplingParams
from batchinfer.survey.counts import MAX_EXAMPLES, PromptCounts, RangeCounts, SamplingHashes

GREEDY = SamplingParams(max_new_tokens=10)
WARM = SamplingParams(max_new_tokens=10, temperature=1.0, n=3)


def prompt(*token_ids: int, sampling: SamplingParams = GREEDY) -> Prompt:
    return Prompt("s:0", list(token_ids), sampling)


def test_lengths_tokens_and_dead_letters_are_counted_by_shard() -> None:
    counts = RangeCounts()
    bad = RowError("s:1", "too_long", "way " * 200)
    counts.add_range("s", [prompt(1, 2), bad, prompt(1, 2, sampling=WARM)], SamplingHashes())
    counts.add_range("t", [RowError("t:0", "too_long", "long")], SamplingHashes())
    assert (counts.num_rows, dict(counts.lengths)) == (4, {2: 2})
    assert (counts.num_completions, counts.max_new_tokens, counts.num_prompt_tokens) == (4, 40, 4)
    assert counts.dead_letters == {"s": {"too_long": 1}, "t": {"too_long": 1}}
    assert [example.row_id for example in counts.examples["too_long"]] == ["s:1", "t:0"]
    assert max(len(example.error) for example in counts.examples["too_long"]) == 200
    assert counts.by_range == [(2, 4), (0, 0)]
    total = PromptCounts()
    for _ in range(4):
        total.add(counts, keeps_ranges=True)
    assert (total.num_rows, total.lengths[2], total.dead_letters["s"]["too_long"]) == (16, 8, 4)
    assert len(total.examples["too_long"]) == MAX_EXAMPLES
    assert total.duplicates.result().num_duplicates == 6


def test_choices_are_known_tokens_and_turns_are_read_one_by_one() -> None:
    counts = RangeCounts()
    choice = replace(prompt(1, 2, 3), choice_token_ids=((5,), (6, 7)))
    counts.add_range("s", [choice], SamplingHashes())
    assert (counts.num_completions, counts.num_chosen, counts.max_new_tokens) == (1, 1, 3)
    turns = replace(prompt(1, 2, 3), conversation=Conversation(("a", "b"), GREEDY))
    counts.add_range("s", [turns], SamplingHashes())
    assert (counts.num_completions, counts.num_chosen) == (2, 1)
    assert (counts.max_new_tokens, counts.num_prompt_tokens) == (3 + 20, 3 + 6)


def test_equal_prompts_have_equal_hashes_whatever_their_row_and_others_do_not() -> None:
    one, other = SamplingHashes(), SamplingHashes()
    first = one.hash_of(prompt(1, 2))
    assert other.hash_of(replace(prompt(1, 2), row_id="t:9")) == first
    assert first & 1, "a greedy prompt is marked"
    # Only what chance would ask for: it does not change a greedy completion.
    assert one.hash_of(prompt(1, 2, sampling=replace(GREEDY, seed=5, n=2, top_p=0.5))) == first
    different = [
        prompt(2, 1),
        prompt(1),
        prompt(1, 2, sampling=replace(GREEDY, max_new_tokens=11)),
        prompt(1, 2, sampling=replace(GREEDY, stop=("x",))),
        prompt(1, 2, sampling=WARM),
        prompt(1, 2, sampling=replace(WARM, seed=5)),
    ]
    assert len({first, *(one.hash_of(each) for each in different)}) == 7
    assert one.hash_of(different[-1]) & 1 == 0


def test_conversations_are_equal_when_all_their_turns_are_and_are_each_generated() -> None:
    hashes = SamplingHashes()
    talks = [replace(prompt(1, 2), conversation=Conversation(turns, GREEDY)) for turns in (("a", "b"), ("a", "c"))]
    first, second = (hashes.hash_of(talk) for talk in talks)
    assert first != second
    assert hashes.hash_of(replace(talks[0], row_id="t:9")) == first
    assert (first & 1, hashes.hash_of(prompt(1, 2)) & 1) == (0, 1)
