"""The way of an export: open the output, claim the target, write it in one of the forms, say what was lacking."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from batchinfer.errors import EXIT_COMPLETE, EXIT_DEAD_LETTERS, EXIT_RUN_AGAIN, JobError, OutputError
from batchinfer.export.judges import JUDGES
from batchinfer.export.judges.writing import write_answers
from batchinfer.export.numbered import is_numbered, write_numbered
from batchinfer.export.openai_batch import write_batch
from batchinfer.export.source import open_source
from batchinfer.export.target import Target
from batchinfer.redact import redact
from batchinfer.storage.filesystem import StorageOptions, canonical_uri, locate

Format = Literal["parquet", "jsonl", "openai-batch", "mt-bench", "logickor", "arena-hard", "wildbench", "alpaca-eval"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was copied, and what the output lacked at that moment."""

    target: str
    num_files: int
    num_completions: int
    num_units: int
    num_units_missing: int
    num_units_with_dead_letters: int

    @property
    def exit_code(self) -> int:
        """0 all there, 1 but for dead letters, 3 units are not committed yet: run the job and export again."""
        if self.num_units_missing:
            return EXIT_RUN_AGAIN
        return EXIT_DEAD_LETTERS if self.num_units_with_dead_letters else EXIT_COMPLETE

    def as_json(self) -> dict[str, object]:
        """For ``--json``: plain values only."""
        return {"exit_code": self.exit_code, **asdict(self)}


def export(
    output_path: str,
    target_path: str,
    format_: Format = "parquet",
    *,
    ordered: bool = False,
    overwrite: bool = False,
    generator: str | None = None,
    tokenizer: str | None = None,
    storage_options: StorageOptions | None = None,
    target_options: StorageOptions | None = None,
) -> ExportResult:
    """Copy every committed completion into the directory ``target_path``, whole files only.

    ``parquet`` and ``jsonl``: numbered files, in the input's order if ``ordered`` (shards as the plan has them, rows as
    the shard has them, then samples). Rows without a completion leave no gap; ``row_id`` tells where a row belongs.
    The other forms are always in the input's order: ``openai-batch`` has one line for every committed row in
    output.jsonl or errors.jsonl, the others one answer for every row that has one, under the name ``generator`` (None =
    the model's). ``tokenizer`` is the directory with the model's tokenizer.json, for log-probabilities of a batch (None
    = the job's model).

    The target must be empty, or hold an unfinished export of this very kind, unless ``overwrite``: then files of an
    earlier export are replaced. It holds the file ``_incomplete`` until everything is there.

    Raises OutputError when there is no job, the target lies inside the output or is not empty, or the form needs a
    column that the output does not have; StorageUnavailable when the storage does not answer.
    """
    target_place = locate(target_path, target_options)
    ours, theirs = canonical_uri(output_path), canonical_uri(target_path)
    if theirs == ours or theirs.startswith(ours.rstrip("/") + "/"):
        raise OutputError(f"{target_place}: lies inside the output {redact(output_path)}; choose a directory beside it")
    source = open_source(output_path, storage_options)
    claim = {"output": redact(ours), "format": format_, "fingerprint": source.job.fingerprint, "ordered": ordered}
    target = Target(target_place, claim)
    target.begin(overwrite=overwrite)
    try:
        if format_ == "parquet" or format_ == "jsonl":
            num_completions = write_numbered(source, target, format_, ordered=ordered)
        elif format_ == "openai-batch":
            num_completions = write_batch(source, target, tokenizer)
        else:
            num_completions = write_answers(source, target, JUDGES[format_], generator)
    except JobError:
        target.withdraw()
        raise
    target.end(lambda name: is_numbered(name, format_))
    return ExportResult(
        str(target_place),
        target.num_files,
        num_completions,
        len(source.plan.units),
        source.num_units_missing,
        len(source.failed),
    )
