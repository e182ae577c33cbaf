"""What a lack of memory looks like, on every device, and what an engine tells of a row that cannot do with it."""

import torch

from batchinfer.engine.engine import Generation
from batchinfer.engine.row import Row, failure

__all__ = ["MEMORY_ERRORS", "does_not_fit", "is_out_of_memory"]

#: What may be a lack of memory; ``is_out_of_memory`` says which ones are. ``torch.OutOfMemoryError`` is one of them.
MEMORY_ERRORS = (RuntimeError, MemoryError)

#: How it reads where it has no class of its own: torch's allocator on a CPU, CUDA outside of torch's allocator, and
#: the libraries' workspaces.
_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether less work at once would help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return any(known in text for known in _TEXTS)


def does_not_fit(row: Row) -> Generation:
    """The end of a row that ran out of memory with the device to itself."""
    cause = f"{row.length} tokens do not fit the device's memory even alone; lower max_model_len"
    return failure(row.sequence, "out_of_memory", cause)
