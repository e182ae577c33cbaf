"""The seam where storage can be broken on purpose: below the retries, around every single call.

A ``RetryPolicy`` may carry the faults of one process. Tests crash and fail there at chosen calls, ``run --chaos`` at
random ones (``chaos``, ``storage/chaos_faults``); without them nothing is asked.
"""

from collections.abc import Callable
from typing import Protocol


class StorageFaults(Protocol):
    """Asked around every call of one process, by any of its threads; ``where`` is the path, perhaps with credentials.

    Each method returns, sleeps first, raises an error as a storage does, or ends the process.
    """

    def before(self, operation: str, where: str) -> None:
        """Nothing of the call has happened."""

    def halfway(self, operation: str, where: str) -> None:
        """A local write has put half of its bytes on disk. Not asked for reads nor by object stores, whose puts are
        whole."""

    def after(self, operation: str, where: str) -> None:
        """The call has happened or has failed by itself; an error raised here is a lost answer."""


class FaultPlan(Protocol):
    """The faults of all processes of a run: frozen and picklable, since it travels to the replicas."""

    def of(self, role: str, num_tokens_generated: Callable[[], int]) -> StorageFaults:
        """Those of one process: ``driver`` or ``replica-<id>``. It can be asked what it has generated so far."""
