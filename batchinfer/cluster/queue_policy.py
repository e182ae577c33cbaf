"""The limits that the work queue keeps to."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Limits, from the job's ``execution`` block."""

    max_attempts: int = 3
    max_start_attempts: int = 3
    units_in_flight: int = 2
    #: However small the units are, a replica holds no more.
    max_units_held: int = 64
    samples_per_row: int = 1
    #: A failed unit or start waits this long times two for each earlier failure, up to ``max_backoff_s``.
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    #: The bound for starts once ``max_start_attempts`` in a row have failed while other replicas work.
    max_start_backoff_s: float = 600.0
    #: A replica that holds units and shows no sign of life for so long is replaced.
    hang_timeout_s: float = 600.0
    #: A replica that is not ready after so long counts as a failed start.
    start_timeout_s: float = 3600.0
    #: A replica that was told to drain and does not answer for so long is ended.
    drain_timeout_s: float = 8.0

    def backoff_after(self, num_failures: int) -> float:
        """Seconds to wait after the ``num_failures``-th failure of a unit."""
        return min(self._doubled(num_failures), self.max_backoff_s)

    def start_backoff_after(self, num_failures: int) -> float:
        """Seconds to wait after the ``num_failures``-th failed start in a row."""
        if num_failures < self.max_start_attempts:
            return self.backoff_after(num_failures)
        return min(self._doubled(num_failures), self.max_start_backoff_s)

    def _doubled(self, num_failures: int) -> float:
        # Beyond 2**1023 a float raises instead of growing.
        return self.backoff_s * 2.0 ** min(num_failures - 1, 64)
