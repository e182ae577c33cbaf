"""FastChat's ``llm_judge``: MT-Bench, and KoMT-Bench, which LG AI Research publishes in the same form.

Source: ``fastchat/llm_judge/gen_model_answer.py`` of lm-sys/FastChat, from memory: one JSON object per line with
question_id, answer_id, model_id, choices and tstamp, in ``data/<bench>/model_answer/<model id>.jsonl``. The judge takes
the model's name from the file's.
"""

from typing import Any

from batchinfer.export.judges.answered import AnsweredQuestion, Generator, Judge


def answer(question: AnsweredQuestion, generator: Generator) -> dict[str, Any]:
    """One line: every sample is a choice, with one text per turn."""
    return {
        "question_id": question.column("question_id"),
        "answer_id": question.answer_id(generator),
        "model_id": generator.name,
        "choices": [{"index": index, "turns": list(turns)} for index, turns in enumerate(question.samples)],
        "tstamp": float(generator.created_s),
    }


MT_BENCH = Judge("mt-bench", lambda name: f"{name}.jsonl", answer)
