"""What a crash left beside the parts, which a run clears even when it has nothing to generate."""

from datetime import UTC, datetime

from batchinfer.storage.journal import journaled_units
from batchinfer.storage.layout import staging
from batchinfer.storage.lease import Process, read_lease
from batchinfer.storage.location import Location


def has_leftovers(output: Location) -> bool:
    """Whether a lease nobody holds, a journal, or bytes on their way to a name are there; no, while a run is live."""
    lease = read_lease(output)
    if lease is not None:
        return not lease.is_live(datetime.now(UTC), Process.current())
    return bool(staging(output).files() or journaled_units(output))
