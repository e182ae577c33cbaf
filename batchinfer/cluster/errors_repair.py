"""Mending errors parts that a crash or a race left beside the rows they should tell of.

The completions parts say which rows are dead letters, so nothing here can lose or double a row: at worst a reason is
gone. Only for the run that holds the lease.
"""

import logging
from functools import partial

import pyarrow as pa

from batchinfer.cluster.prepare import Preparation
from batchinfer.errors import InputError, OutputError, StorageUnavailable
from batchinfer.records import Shard, WorkUnit
from batchinfer.storage.filesystem import locate
from batchinfer.storage.shard_reader import ShardReader
from batchinfer.storage.writer import PartFormat, fit_errors_to_commit

logger = logging.getLogger(__name__)


def mend_errors_parts(preparation: Preparation) -> None:
    """Fit the errors parts that ``prepare`` found unfit to their units' commits; may be repeated.

    Raises StorageUnavailable when the output does not answer. A unit whose completions part is damaged is left to
    ``verify``, and a row whose input is gone keeps its id and reason alone.
    """
    if not preparation.unfit_errors:
        return
    spec, facts = preparation.spec, preparation.facts
    logger.warning(
        "%d errors parts tell of other rows than their units lack (left by a crash or by another attempt), such as %s; "
        "they are written anew",
        len(preparation.unfit_errors),
        preparation.unfit_errors[0].unit_id,
    )
    part = PartFormat(
        fingerprint=preparation.fingerprint.digest,
        run_id="",
        columns=facts.output_columns,
        n=spec.sampling.n,
        compression=spec.output.compression,
    )
    shards = {shard.shard_id: shard for shard in preparation.plan.shards}
    find = partial(locate, storage_options=spec.input.storage_options, blames=InputError)
    reader = ShardReader(find, facts.schema)
    try:
        for unit in preparation.unfit_errors:
            rows = _rows(reader, shards.get(unit.shard_id), unit, facts.schema)
            try:
                fit_errors_to_commit(preparation.output, unit, rows, (), part)
            except (pa.ArrowException, OutputError) as error:
                logger.warning("unit %s: its errors part stays as it is: %s", unit.unit_id, error)
    finally:
        reader.close()


def _rows(reader: ShardReader, shard: Shard | None, unit: WorkUnit, schema: pa.Schema) -> pa.Table:
    """The unit's input rows; none when their shard is gone or out of reach."""
    if shard is not None:
        try:
            return reader.read_unit(shard, unit).table
        except StorageUnavailable as error:
            logger.warning("unit %s: its dead letters are written without their input: %s", unit.unit_id, error)
    return schema.empty_table()
