"""``prompt.turns``: a row's user turns, and the chat that each of them is asked in.

Every turn's prompt is rendered anew from the row's turns and the answers so far, as text, the way the judges' own
tools do it: so chat templates that drop an answer's reasoning from the chat work as they were written.
"""

from batchinfer.errors import RowRejected
from batchinfer.prompts.values import Message, text_of
from batchinfer.records import Conversation, SamplingParams

__all__ = ["begin_conversation", "chat_of", "turns_of"]

#: Dead letter of a row that cannot be sampled as it asks for.
_BAD_SAMPLING = "bad_sampling"


def turns_of(value: object) -> tuple[str, ...]:
    """A row's user turns, all of them looked at before the first is generated.

    Raises RowRejected: null_prompt, empty_prompt, too_long, bad_text; it names the turn.
    """
    if value is None:
        raise RowRejected("null_prompt", "the turns are null")
    if not isinstance(value, list):
        raise RowRejected("bad_text", f"expected a list of turns, got {type(value).__name__}")
    if not value:
        raise RowRejected("empty_prompt", "there are no turns")
    turns: list[str] = []
    for index, turn in enumerate(value):
        try:
            turns.append(text_of(turn))
        except RowRejected as rejected:
            raise RowRejected(rejected.error_type, f"turn {index + 1} of {len(value)}: {rejected.error}") from None
    return tuple(turns)


def begin_conversation(turns: tuple[str, ...], sampling: SamplingParams) -> Conversation:
    """A conversation without any answer yet. Raises RowRejected: bad_sampling for choices."""
    if sampling.choices:
        raise RowRejected(_BAD_SAMPLING, "choices: they are scored for one prompt, and the turns of a row are answered")
    return Conversation(turns, sampling)


def chat_of(turns: tuple[str, ...], answers: tuple[str, ...]) -> list[Message]:
    """The messages up to the turn that is to be answered now."""
    messages: list[Message] = []
    for turn, answer in zip(turns, answers, strict=False):
        messages += ({"role": "user", "content": turn}, {"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": turns[len(answers)]}]
