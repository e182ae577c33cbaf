"""The audit of an output: from its files alone, is every planned row there exactly once?

``verify`` reads footers and two columns of each part, ``verify_deep`` every byte. Parts are audited several at a time
and forgotten one by one, so memory does not grow with the output.
"""

from batchinfer.audit.deep import verify_deep
from batchinfer.audit.findings import Finding, Remark, VerifyReport
from batchinfer.audit.verify import verify

__all__ = ["Finding", "Remark", "VerifyReport", "verify", "verify_deep"]
