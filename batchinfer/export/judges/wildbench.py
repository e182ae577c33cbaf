"""WildBench: ``result_dirs/wild_bench_v2/<model>.json``, one array.

Source: ``load_eval_data`` and ``save_outputs`` in ``src/unified_utils.py`` of allenai/WildBench: session_id,
chat_history (the messages' contents), model_input, output (a list, stripped), generator, configs, dataset, primary_tag.
``model_input`` is the prompt as the chat template wrote it, "n/a" for models behind an API; nothing reads it back. The
judge (``src/eval.py``) walks through questions and answers side by side: a question without an answer stops it.
"""

from typing import Any

from batchinfer.export.judges.answered import AnsweredQuestion, Generator, Judge

_DATASET = "wild_bench_v2"


def answer(question: AnsweredQuestion, generator: Generator) -> dict[str, Any]:
    """One item, with what was passed through of the question (``checklist``, ``primary_tag``, ...) behind it."""
    chat = question.column("conversation_input")
    sampling = generator.sampling
    item = {
        "session_id": question.column("session_id"),
        "chat_history": [message["content"] for message in chat],
        "model_input": "n/a",
        "output": [turns[-1].strip() for turns in question.samples],
        "generator": generator.name,
        "configs": {
            "engine": "batchinfer",
            "repetition_penalty": sampling.get("repetition_penalty"),
            "temperature": sampling.get("temperature"),
            "top_p": sampling.get("top_p"),
            "max_tokens": sampling.get("max_new_tokens"),
        },
        "dataset": _DATASET,
    }
    others = {name: value for name, value in question.question.items() if name not in item}
    return {**item, **{name: value for name, value in others.items() if name != "conversation_input"}}


WILDBENCH = Judge("wildbench", lambda name: f"{name}.json", answer, is_array=True)
