"""That a growing input keeps the types of its columns: the parts of an output are one data set."""

import json
from collections.abc import Iterable

import pyarrow as pa

from batchinfer.errors import InputError, OutputError, ShardCorrupt
from batchinfer.planner import plain_type
from batchinfer.storage.footer import read_footer
from batchinfer.storage.jsonl_values import json_text_columns
from batchinfer.storage.layout import completions_part
from batchinfer.storage.location import FoundFile, Location
from batchinfer.storage.part_reader import read_part


def refuse_other_types(output: Location, unit_id: str, part: FoundFile, schema: pa.Schema) -> None:
    """InputError when columns would be written with other types than the unit's part has.

    A Parquet shard brings its types with it; those of JSON Lines follow from all values, so that a new shard may change
    them. A damaged part says nothing here; ``verify`` names it.
    """
    place = completions_part(output, unit_id)
    texts = json_text_columns(schema)
    try:
        written = read_footer(place, part.size_bytes)[1].schema.to_arrow_schema()
        examples = read_part(place, texts) if texts else pa.table({})
    except (ShardCorrupt, OutputError):
        return
    for field in schema:
        index = written.get_field_index(field.name)
        if index < 0:
            continue
        before = str(written.field(index).type)
        if plain_type(written.field(index).type) == plain_type(field.type):
            if field.name not in texts or _are_json(examples.column(field.name).to_pylist()):
                continue
            before = "plain strings"
        now = "of several types" if field.name in texts else str(field.type)
        raise InputError(
            f"column {field.name!r} of the input is {now} now, but {before} in what {output} holds already, because of "
            "shards that have come or gone since; write its values as before, or give this job another output.path"
        )


def _are_json(texts: Iterable[str | None]) -> bool:
    try:
        for text in texts:
            json.loads("null" if text is None else text)
    except ValueError:
        return False
    return True
