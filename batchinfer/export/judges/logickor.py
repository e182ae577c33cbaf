"""LogicKor: ``generated/<model>/<strategy>.jsonl``; the judge takes the model's name from the directory's.

Source: ``generator.py`` and ``evaluator.py`` of instructkr/LogicKor: a pandas frame with the columns id, category,
questions, outputs (stripped) and references, written as lines. A job here is the strategy ``default``; for the
project's ``1-shot`` and ``cot-1-shot`` put their example turns into the questions yourself.
"""

from typing import Any

from batchinfer.export.judges.answered import AnsweredQuestion, Generator, Judge


def answer(question: AnsweredQuestion, generator: Generator) -> dict[str, Any]:
    """One line: the first sample's answer to each of the two turns."""
    return {
        "id": question.column("id"),
        "category": question.column("category"),
        "questions": question.column("questions"),
        "outputs": [answer.strip() for answer in question.samples[0]],
        "references": question.column("references"),
    }


LOGICKOR = Judge("logickor", lambda name: f"{name}/default.jsonl", answer)
