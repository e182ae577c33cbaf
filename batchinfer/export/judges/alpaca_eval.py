"""AlpacaEval 2: ``model_outputs.json``, one array, given to ``alpaca_eval --model_outputs``.

Source: README of tatsu-lab/alpaca_eval: objects with instruction, output and generator; ``dataset`` goes along where
the question has it.
"""

from typing import Any

from batchinfer.export.judges.answered import AnsweredQuestion, Generator, Judge


def answer(question: AnsweredQuestion, generator: Generator) -> dict[str, Any]:
    """One item, of the first sample."""
    dataset = {"dataset": question.question["dataset"]} if "dataset" in question.question else {}
    return {
        **dataset,
        "instruction": question.column("instruction"),
        "output": question.samples[0][-1],
        "generator": generator.name,
    }


ALPACA_EVAL = Judge("alpaca-eval", lambda name: "model_outputs.json", answer, is_array=True)
