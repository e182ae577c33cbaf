"""``prompt.turns``: what is asked behind an answer, what a journal knows of a conversation, and what becomes of it.

Each turn is a sequence of its own, for the engine and for the journal. Nothing is remembered between two of them: a
turn's prompt carries the conversation so far, and the next one is made of that and of the answer.
"""

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from batchinfer.cluster.journal_keeper import UnitJournal
from batchinfer.cluster.texts import Texts
from batchinfer.engine.engine import Generation, Sequence
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import Answer, Completion, Conversation, Prompt


class Conversations:
    """Asks the turns of one job's rows. Any number of threads may call at once."""

    def __init__(self, renderer: PromptRenderer, texts: Texts) -> None:
        self._renderer = renderer
        self._texts = texts

    def next_turn(self, ended: Generation) -> Sequence | Generation:
        """The sequence that answers the turn behind ``ended``, which has one; or that row's end, with the reason."""
        return self._next_turns([ended])[0]

    def resume(self, journal: UnitJournal, sequences: Iterable[Sequence]) -> tuple[list[Generation], list[Sequence]]:
        """Hold the rows' first turns, and those behind them, against what former holders of the unit generated.

        The ends of all turns that have one, and the sequences to go on with.
        """
        newest, left = journal.resume(sequences)
        ended = list(newest)
        while following := self._next_turns([it for it in newest if it.is_followed]):
            newest, more = journal.resume(it for it in following if isinstance(it, Sequence))
            ended += [*newest, *(it for it in following if isinstance(it, Generation))]
            left += more
        return ended, left

    def _next_turns(self, ended: SequenceOf[Generation]) -> list[Sequence | Generation]:
        conversations = [_with_answer(it.sequence, text) for it, text in zip(ended, self._texts.of(ended), strict=True)]
        row_ids = [it.sequence.prompt.row_id for it in ended]
        rendered = self._renderer.render_turns(conversations, row_ids) if conversations else []
        following: list[Sequence | Generation] = []
        for it, conversation, prompt in zip(ended, conversations, rendered, strict=True):
            sample = it.sequence.sample
            if isinstance(prompt, Prompt):
                following.append(Sequence(prompt, sample))
            else:
                unasked = Prompt(prompt.row_id, (), conversation.sampling, conversation=conversation)
                following.append(Generation(Sequence(unasked, sample), (), "length", error=prompt))
        return following


def completions(ends: SequenceOf[Generation], texts: Texts) -> list[Completion]:
    """One for each sample of each row, of the ends of all its turns, none of which failed."""
    turns: dict[tuple[str, int], list[tuple[Generation, str]]] = defaultdict(list)
    for end, text in zip(ends, texts.of(ends), strict=True):
        turns[end.sequence.sequence_id].append((end, text))
    return [_completion(sorted(answered, key=lambda it: it[0].sequence.turn)) for answered in turns.values()]


def _completion(turns: SequenceOf[tuple[Generation, str]]) -> Completion:
    last, text = turns[-1]
    prompt = last.sequence.prompt
    whole = Completion(
        row_id=prompt.row_id,
        sample=last.sequence.sample,
        text=text,
        token_ids=last.token_ids,
        finish_reason=last.finish_reason,
        num_prompt_tokens=len(prompt.token_ids),
        logprobs=last.logprobs,
    )
    if prompt.conversation is None:
        return whole
    logprobs = tuple(scored for end, _ in turns for scored in end.logprobs or ())
    return replace(
        whole,
        token_ids=tuple(token_id for end, _ in turns for token_id in end.token_ids),
        logprobs=None if last.logprobs is None else logprobs,
        answers=tuple(
            Answer(answer, end.finish_reason, len(end.sequence.prompt.token_ids), len(end.token_ids))
            for end, answer in turns
        ),
    )


def _with_answer(sequence: Sequence, answer: str) -> Conversation:
    conversation = sequence.prompt.conversation
    assert conversation is not None, "a sequence with a next turn is one of a conversation"
    return replace(conversation, answers=(*conversation.answers, answer))
