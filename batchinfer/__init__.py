"""Large offline generation jobs with EXAONE and other causal LMs: Parquet in, Parquet out, every row exactly once.

>>> import batchinfer
>>> job = batchinfer.load_job("jobs/demo.yaml", ["output.path=out/mine"])
>>> result = batchinfer.run(job)
>>> batchinfer.verify("out/mine").verdict
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchinfer.audit import verify, verify_deep
    from batchinfer.cluster.driver import run
    from batchinfer.cluster.result import JobResult
    from batchinfer.cluster.retry import retry_failed
    from batchinfer.errors import BatchinferError
    from batchinfer.job_file import load_job
    from batchinfer.spec import JobSpec

__all__ = ["BatchinferError", "JobResult", "JobSpec", "load_job", "retry_failed", "run", "verify", "verify_deep"]

__version__ = "0.1.0"

# Looked up on first use: `import batchinfer` costs nothing, and neither verify nor load_job pays for Ray.
_HOMES = {
    "BatchinferError": "batchinfer.errors",
    "JobResult": "batchinfer.cluster.result",
    "JobSpec": "batchinfer.spec",
    "load_job": "batchinfer.job_file",
    "retry_failed": "batchinfer.cluster.retry",
    "run": "batchinfer.cluster.driver",
    "verify": "batchinfer.audit",
    "verify_deep": "batchinfer.audit",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'batchinfer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
