"""An output's answers written in a judge's form: one file, in the questions' order, a part in memory at a time."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa

from batchinfer.errors import OutputError
from batchinfer.export.judges.answered import AnsweredQuestion, Generator, Judge
from batchinfer.export.source import Source
from batchinfer.export.target import Target
from batchinfer.records import ANSWERS, COMPLETION, GENERATED_COLUMNS, NUM_COMPLETION_TOKENS, ROW_ID

_NO_FILE_NAME = re.compile(r"[^\w.+-]+")


def write_answers(source: Source, target: Target, judge: Judge, generator: str | None) -> int:
    """Write the judge's file; returns the number of completions in it. Questions without an answer are left out.

    Raises OutputError when the output lacks a column that the form needs.
    """
    job = source.job
    by = Generator(generator or job.model_name, job.created_s, job.fingerprint, job.sampling)
    file_name = _NO_FILE_NAME.sub("_", by.name).strip("._")
    if not file_name:
        raise OutputError(f"--generator {by.name!r} makes no file name; use letters and digits")
    num_completions = 0
    with target.file(judge.file_name(file_name)) as file:
        is_first = True
        for table in source.tables(source.units(ordered=True)):
            for question in answered_questions(table):
                num_completions += len(question.samples)
                item = json.dumps(judge.answer(question, by), ensure_ascii=False, default=_moment).encode()
                if judge.is_array:
                    file.write((b"[\n" if is_first else b",\n") + item)
                else:
                    file.write(item + b"\n")
                is_first = False
        if judge.is_array:
            file.write(b"[]\n" if is_first else b"\n]\n")
    return num_completions


def answered_questions(table: pa.Table) -> Iterator[AnsweredQuestion]:
    """The rows of one part, their samples together."""
    passed = [name for name in table.column_names if name not in GENERATED_COLUMNS]
    rows = (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    for row_id, samples in groupby(rows, key=itemgetter(ROW_ID)):
        answered = list(samples)
        turns = [_turns(row) for row in answered]
        yield AnsweredQuestion(
            row_id=row_id,
            question={name: answered[0][name] for name in passed},
            samples=tuple(tuple(text for text, _ in sample) for sample in turns),
            num_tokens=tuple(tuple(number for _, number in sample) for sample in turns),
        )


def _turns(row: Mapping[str, Any]) -> Sequence[tuple[str, int]]:
    """Each answer with its number of tokens; a row without turns has one."""
    answers = row.get(ANSWERS)
    if answers is None:
        return [(row[COMPLETION], row[NUM_COMPLETION_TOKENS])]
    return [(answer[COMPLETION], answer[NUM_COMPLETION_TOKENS]) for answer in answers]


def _moment(value: object) -> str:
    """What is passed through beside the answers may hold moments."""
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    raise OutputError(f"a column holds {type(value).__name__}, which JSON cannot; leave it out of output.columns")
