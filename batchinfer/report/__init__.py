"""What an output says of itself, from its files alone: status, rows, and the report page (``page``, ``comparison``)."""

from batchinfer.report.status import Holder, LastRun, Status, read_rows, read_status

__all__ = ["Holder", "LastRun", "Status", "read_rows", "read_status"]
