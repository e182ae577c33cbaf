"""The results of an OpenAI batch: ``output.jsonl`` and ``errors.jsonl``, one line for every input row over both.

The lines are those of the Batch API's output and error files: what a request itself is the cause of is an answer with
status 400, anything else an ``error`` without a response. Ids follow from row ids, and ``created`` from the output's
own beginning, so that an export says the same whenever it is made.

Source of the forms: the types of the ``openai`` package (``ChatCompletion``, ``Completion``), which the tests hold the
lines against, and the API reference on batch files for the lines around them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa

from batchinfer.errors import OutputError
from batchinfer.export.source import DeadRow, JobLabel, Source
from batchinfer.export.target import Target
from batchinfer.export.token_texts import TokenTexts, load_token_texts
from batchinfer.prompts.request import CHAT_URL, COMPLETIONS_URL, URL_COLUMN
from batchinfer.records import (
    COMPLETION,
    FINISH_REASON,
    LOGPROBS,
    NUM_COMPLETION_TOKENS,
    NUM_PROMPT_TOKENS,
    ROW_ID,
    SAMPLE,
)
from batchinfer.storage.writer import REASON_LOST

OUTPUT_FILE, ERRORS_FILE = "output.jsonl", "errors.jsonl"

#: A row as read from a part, or a line to write: JSON's values by name.
Row = Mapping[str, Any]

_CUSTOM_ID = "custom_id"
_GENERATED = (
    ROW_ID,
    SAMPLE,
    COMPLETION,
    FINISH_REASON,
    NUM_PROMPT_TOKENS,
    NUM_COMPLETION_TOKENS,
    LOGPROBS,
)
#: Dead letters that say nothing about the request: another run might have answered it.
_NOT_OF_THE_REQUEST = frozenset({"killed_replica", "out_of_memory", "shard_corrupt", REASON_LOST})


def write_batch(source: Source, target: Target, tokenizer: str | None) -> int:
    """Write both files; returns the number of completions in them.

    Raises OutputError when the output lacks the columns that tell one endpoint's rows from the other's, or there are
    log-probabilities and no tokenizer to spell their tokens.
    """
    form = BatchForm(source.job, tokenizer)
    units = source.units(ordered=True)
    wanted = [*_GENERATED, _CUSTOM_ID, URL_COLUMN, *([source.job.request_column] if source.job.request_column else ())]
    num_completions = 0
    with target.file(OUTPUT_FILE) as output, target.file(ERRORS_FILE) as errors:
        for unit, table in zip(units, source.tables(units, wanted), strict=True):
            completed: set[str] = set()
            for row_id, samples in _by_row(table):
                completed.add(row_id)
                num_completions += len(samples)
                output.write(_line(form.answer(samples)))
            for dead in source.dead_rows(unit, completed):
                errors.write(_line(form.refusal(dead)))
    return num_completions


def _by_row(table: pa.Table) -> Iterator[tuple[str, list[Row]]]:
    """The samples of each row that has any, in row order. A few thousand rows are Python objects at a time."""
    rows = (row for batch in table.to_batches(max_chunksize=2048) for row in batch.to_pylist())
    return ((row_id, list(samples)) for row_id, samples in groupby(rows, key=itemgetter(ROW_ID)))


def _line(values: Row) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class BatchForm:
    """Rows of one output as lines of the batch's files."""

    def __init__(self, job: JobLabel, tokenizer: str | None) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._token_texts: TokenTexts | None = None

    def answer(self, samples: Sequence[Row]) -> Row:
        """The line of a row with completions; ``samples`` are all of them, in order."""
        first = samples[0]
        is_chat, model = self._endpoint(first)
        number = _number(first[ROW_ID])
        num_prompt_tokens = first[NUM_PROMPT_TOKENS]
        num_completion_tokens = sum(sample[NUM_COMPLETION_TOKENS] for sample in samples)
        body = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{number}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self._job.created_s,
            "model": model,
            "choices": [self._chat_choice(sample) if is_chat else self._text_choice(sample) for sample in samples],
            "usage": {
                "prompt_tokens": num_prompt_tokens,
                "completion_tokens": num_completion_tokens,
                "total_tokens": num_prompt_tokens + num_completion_tokens,
            },
            "system_fingerprint": self._job.fingerprint,
        }
        return _batch_line(first, _response(200, number, body), None)

    def refusal(self, dead: DeadRow) -> Row:
        """The line of a row that is a dead letter."""
        reason = dead.reason
        row = {**dead.row, ROW_ID: reason.row_id}
        if reason.error_type in _NOT_OF_THE_REQUEST:
            return _batch_line(row, None, {"code": reason.error_type, "message": reason.error})
        # An unsupported field's error begins with its name.
        field = reason.error.partition(": ")[0] if reason.error_type == "unsupported_field" else None
        error = {
            "message": reason.error,
            "type": "invalid_request_error",
            "param": field,
            "code": reason.error_type,
        }
        return _batch_line(row, _response(400, _number(reason.row_id), {"error": error}), None)

    def _endpoint(self, row: Row) -> tuple[bool, str]:
        """Whether the row was a chat, and the model that it asked for."""
        column = self._job.request_column
        body = row.get(column) if column else None
        asked = json.loads(body) if isinstance(body, str) else body or {}
        url = row.get(URL_COLUMN)
        model = str(asked.get("model") or self._job.model_name)
        if url in (CHAT_URL, COMPLETIONS_URL):
            return url == CHAT_URL, model
        if not asked and column is not None:
            raise OutputError(
                f"openai-batch needs the column {column} or {URL_COLUMN} beside the completions, to tell chats from "
                "texts; name it in output.columns (and custom_id, to tell the lines apart)"
            )
        return column is None or "messages" in asked, model

    def _chat_choice(self, sample: Row) -> Row:
        logprobs = sample.get(LOGPROBS)
        return {
            "index": sample[SAMPLE],
            "message": {"role": "assistant", "content": sample[COMPLETION], "refusal": None},
            "logprobs": None if logprobs is None else self._texts.of_chat(sample[COMPLETION], logprobs),
            "finish_reason": sample[FINISH_REASON],
        }

    def _text_choice(self, sample: Row) -> Row:
        logprobs = sample.get(LOGPROBS)
        return {
            "index": sample[SAMPLE],
            "text": sample[COMPLETION],
            "logprobs": None if logprobs is None else self._texts.of_text(sample[COMPLETION], logprobs),
            "finish_reason": sample[FINISH_REASON],
        }

    @property
    def _texts(self) -> TokenTexts:
        if self._token_texts is None:
            job = self._job
            self._token_texts = load_token_texts(self._tokenizer or job.model_path, job.model_revision)
        return self._token_texts


def _batch_line(row: Row, response: Row | None, error: Row | None) -> Row:
    custom_id = row.get(_CUSTOM_ID)
    return {
        "id": f"batch_req_{_number(row[ROW_ID])}",
        "custom_id": str(row[ROW_ID] if custom_id is None else custom_id),
        "response": response,
        "error": error,
    }


def _response(status_code: int, number: str, body: Row) -> Row:
    return {"status_code": status_code, "request_id": f"req_{number}", "body": body}


def _number(row_id: str) -> str:
    """A row id as ids of the API look: without a colon."""
    return row_id.replace(":", "_")
