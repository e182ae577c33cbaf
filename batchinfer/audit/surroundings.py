"""What lies around the parts: the input they were made of, journals, and what crashes left. Nothing here is a row."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from batchinfer.audit.findings import Remark
from batchinfer.audit.holdings import Holdings
from batchinfer.errors import InputError, JobError, ShardCorrupt, StorageUnavailable
from batchinfer.records import Shard, WorkUnit
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import StorageOptions, locate
from batchinfer.storage.footer import ShardDigest, read_footer, shard_id
from batchinfer.storage.input_formats import ChosenFormat, format_of
from batchinfer.storage.journal import journaled_units, read_journal
from batchinfer.storage.jsonl_stream import FileBytes
from batchinfer.storage.layout import JOB, JOURNAL, journal_directory, staging
from batchinfer.storage.location import Location

_FOOTER_THREADS = 16
#: An input that does not answer is given up soon: the output is what is audited.
_INPUT_POLICY = RetryPolicy(max_attempts=2, initial_s=0.2, max_s=1.0)


def input_remarks(holdings: Holdings, storage_options: StorageOptions | None) -> Iterator[Remark]:
    """Shards of the plan whose file is not what was planned, or not within reach.

    Row ids are made of the shard's path, size and footer, or its content where it is JSON Lines, so an input that
    passes is the one the rows are of. Stops at a storage that does not answer, and says so.
    """
    shards, chosen = holdings.plan.shards, holdings.job.input_format
    with ThreadPoolExecutor(max_workers=_FOOTER_THREADS, thread_name_prefix="footer") as pool:
        for start in range(0, len(shards), 4 * _FOOTER_THREADS):
            chunk = shards[start : start + 4 * _FOOTER_THREADS]
            try:
                found = list(pool.map(lambda shard: _input_remark(shard, chosen, storage_options), chunk))
            except StorageUnavailable as error:
                detail = f"{error}; {len(shards) - start} shards were not held against the plan"
                yield Remark("input_out_of_reach", chunk[0].path, detail)
                return
            yield from (remark for remark in found if remark is not None)


def _input_remark(shard: Shard, chosen: ChosenFormat, storage_options: StorageOptions | None) -> Remark | None:
    try:
        location = locate(shard.uri, storage_options, blames=InputError, policy=_INPUT_POLICY)
        size_bytes = location.size_bytes()
        if format_of(shard.path, chosen) == "jsonl":
            return _lines_remark(shard, location, size_bytes)
        footer, metadata = read_footer(location, size_bytes)
    except JobError as error:
        return Remark("input_out_of_reach", shard.path, str(error))
    except ShardCorrupt as error:
        return Remark("input_changed", shard.path, f"{error}; its rows in the output are of what it was")
    if shard_id(shard.path, size_bytes, footer) == shard.shard_id and metadata.num_rows == shard.num_rows:
        return None
    return Remark(
        "input_changed",
        shard.path,
        f"has {metadata.num_rows} rows in {size_bytes} bytes and was planned with {shard.num_rows} in "
        f"{shard.size_bytes}; the next run takes it as a new shard",
    )


def _lines_remark(shard: Shard, location: Location, size_bytes: int) -> Remark | None:
    """All of a JSON Lines shard is read where its size is right."""
    if size_bytes == shard.size_bytes:
        digest = ShardDigest(shard.path, size_bytes)
        source = FileBytes(location, size_bytes, digest.update)
        while source.read():
            pass
        if digest.shard_id == shard.shard_id:
            return None
    sizes = "" if size_bytes == shard.size_bytes else f" in {size_bytes} bytes, not {shard.size_bytes},"
    detail = f"has{sizes} other lines than were planned; the next run takes it as a new shard"
    return Remark("input_changed", shard.path, detail)


def journal_remarks(holdings: Holdings) -> Iterator[Remark]:
    """Journals that no commit will remove, and segments that will not be used. Reads every journal, one at a time."""
    job, committed = holdings.job, {it.unit.unit_id for it in holdings.committed}
    planned = {unit.unit_id: unit for unit in holdings.plan.units}
    for unit_id in sorted(journaled_units(job.output)):
        where = f"{JOURNAL}/{unit_id}"
        if not journal_directory(job.output, unit_id).names():
            # Its first segment was never whole, or its last one was just removed.
            continue
        if unit_id in committed:
            yield Remark("leftover_journal", where, "of a committed unit: a crash, or a retry, left it to the next run")
        elif unit_id not in planned:
            yield Remark("leftover_journal", where, "of a unit that is not in the plan; the next run removes it")
        else:
            journal = read_journal(job.output, unit_id, job.fingerprint)
            if journal.num_damaged:
                detail = f"{journal.num_damaged} of {journal.num_segments} segments: torn, changed or of another job"
                yield Remark("damaged_segment", where, f"{detail}; what only they held is generated again")
            own = set(_row_ids(planned[unit_id]))
            foreign = sorted({row_id for row_id, *_ in journal.sequences} - own)
            if foreign:
                yield Remark("damaged_segment", where, f"tells of {len(foreign)} rows of other units, as {foreign[0]}")


def leftover_remarks(holdings: Holdings) -> Iterator[Remark]:
    """What writers that died have left; the next run clears it."""
    for part in holdings.uncommitted_errors:
        yield Remark(
            "leftover_errors_part", part.name, "its unit is not committed; the unit's next attempt replaces it"
        )
    staged = staging(holdings.job.output).files()
    if staged:
        num_bytes = sum(file.size_bytes for file in staged)
        detail = f"{len(staged)} files of {num_bytes} bytes: of writers at work, or left by a crash to the next run"
        yield Remark("leftover_bytes", f"{JOB}/tmp", detail)


def _row_ids(unit: WorkUnit) -> Iterator[str]:
    return (unit.row_id(offset) for offset in range(unit.num_rows))
