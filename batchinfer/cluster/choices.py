"""``sampling.choices``: a prompt becomes one sequence per choice, and what they score becomes one completion. Pure.

A choice's score is the sum of its tokens' log-probabilities behind the prompt, exact, whatever else a model might say
there. A choice that begins another one ("A" and "AB") is scored as it stands: its score holds the other's too.
"""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from batchinfer.engine.engine import Generation, Sequence
from batchinfer.records import ChoiceScore, Completion, Prompt, RowError, SamplingParams

#: Dead letter of a row all of whose choices the model holds for impossible.
NO_CHOICE = "no_choice"


def sequences_of_choices(prompt: Prompt) -> tuple[Sequence, ...]:
    """One sequence per choice, its index the sample; they have one prompt, so that an engine reads it once."""
    sampling = prompt.sampling
    scored = replace(
        prompt,
        sampling=SamplingParams(
            max_new_tokens=max(map(len, prompt.choice_token_ids)),
            logprobs=sampling.logprobs or 0,
            choices=sampling.choices,
        ),
    )
    return tuple(Sequence(scored, index, forced=token_ids) for index, token_ids in enumerate(prompt.choice_token_ids))


def choose(generations: Iterable[Generation]) -> list[Completion | RowError]:
    """One end per row for the ends of all its choices' sequences, none of which failed."""
    by_row: dict[str, list[Generation]] = defaultdict(list)
    for generation in generations:
        by_row[generation.sequence.prompt.row_id].append(generation)
    return [_chosen(sorted(ends, key=lambda it: it.sequence.sample)) for ends in by_row.values()]


def _chosen(ends: SequenceOf[Generation]) -> Completion | RowError:
    prompt = ends[0].sequence.prompt
    scores = choice_scores(
        prompt.sampling.choices,
        [_logprob(end) for end in ends],
        [len(end.token_ids) for end in ends],
    )
    best = max(range(len(scores)), key=lambda index: scores[index].logprob)
    if not math.isfinite(scores[best].logprob):
        return RowError(prompt.row_id, NO_CHOICE, "the model gives none of the choices a probability above zero")
    return Completion(
        row_id=prompt.row_id,
        sample=0,
        text=scores[best].choice,
        token_ids=ends[best].token_ids,
        finish_reason="stop",
        num_prompt_tokens=len(prompt.token_ids),
        logprobs=ends[best].logprobs,
        choices=scores,
    )


def _logprob(end: Generation) -> float:
    """Of all its tokens, in the precision that a journal keeps: a resumed row has the very same score."""
    return math.fsum(array("f", (token.logprob for token in end.logprobs or ())))


def choice_scores(
    choices: SequenceOf[str], logprobs: SequenceOf[float], num_tokens: SequenceOf[int]
) -> tuple[ChoiceScore, ...]:
    """The scores in the choices' order; probabilities add up to 1, and are 0 where no log-probability is finite."""
    highest = max(logprobs)
    shares = [math.exp(logprob - highest) if math.isfinite(highest) else 0.0 for logprob in logprobs]
    total = math.fsum(shares) or 1.0
    return tuple(
        ChoiceScore(choice, logprob, share / total, count)
        for choice, logprob, share, count in zip(choices, logprobs, shares, num_tokens, strict=True)
    )
