"""Arena-Hard: ``data/<bench>/model_answer/<model>.jsonl``, in the form of v0.1 or of v2.0 as the questions are.

Source: ``gen_answer.py`` and ``utils`` of lmarena/arena-hard-auto at v0.1 and v2.0. v0.1 is FastChat's
form with objects for turns. v2.0 has a chat, and counts of what its style control corrects for.

The projects count ``token_len`` with OpenAI's tokenizers (v0.1: that of gpt-3.5-turbo, v2.0: gpt-4o's); here it is the
answering model's own count. Verdicts do not depend on it, the figures "with style control" do.
"""

import re
from typing import Any

from batchinfer.export.judges.answered import AnsweredQuestion, Generator, Judge

_FENCED = re.compile(r"```([^`]*)```")
_HEADERS = {f"h{level}": re.compile(rf"^#{{{level}}}\s", re.MULTILINE) for level in range(1, 7)}
_LISTS = {
    "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
    "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
}
_BOLD = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}


def answer(question: AnsweredQuestion, generator: Generator) -> dict[str, Any]:
    """One line; a question with a ``uid`` is one of v2.0."""
    return _v2(question, generator) if "uid" in question.question else _v0(question, generator)


def _v0(question: AnsweredQuestion, generator: Generator) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "turns": [{"content": text, "token_len": count} for text, count in zip(turns, counts, strict=True)],
        }
        for index, (turns, counts) in enumerate(zip(question.samples, question.num_tokens, strict=True))
    ]
    return {
        "question_id": question.column("question_id"),
        "answer_id": question.answer_id(generator),
        "model_id": generator.name,
        "choices": choices,
        "tstamp": float(generator.created_s),
    }


def _v2(question: AnsweredQuestion, generator: Generator) -> dict[str, Any]:
    text = question.samples[0][-1]
    unfenced = _FENCED.sub("", text)
    return {
        "uid": question.column("uid"),
        "ans_id": question.answer_id(generator),
        "model": generator.name,
        "messages": [
            {"role": "user", "content": question.column("prompt")},
            {"role": "assistant", "content": {"answer": text}},
        ],
        "tstamp": float(generator.created_s),
        "metadata": {
            "token_len": question.num_tokens[0][-1],
            "header_count": _counts(_HEADERS, unfenced),
            "list_count": _counts(_LISTS, unfenced),
            "bold_count": _counts(_BOLD, unfenced),
        },
    }


def _counts(patterns: dict[str, re.Pattern[str]], text: str) -> dict[str, int]:
    return {name: len(pattern.findall(text)) for name, pattern in patterns.items()}


ARENA_HARD = Judge("arena-hard", lambda name: f"{name}.jsonl", answer)
