"""Which devices this machine has, without a library that would take hold of one."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

#: What CUDA takes for itself once a process uses the device, and nvidia-smi does not count before.
CONTEXT_BYTES = 512 << 20
_TIMEOUT_S = 20.0
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver names it."""

    name: str
    total_bytes: int
    #: What a new process may take.
    free_bytes: int


def local_gpus() -> tuple[Gpu, ...]:
    """This machine's NVIDIA GPUs, those that ``CUDA_VISIBLE_DEVICES`` hides left out; none without nvidia-smi."""
    try:
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return gpus_of(answer, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpus_of(answer: str, visible: str | None = None) -> tuple[Gpu, ...]:
    """The GPUs of nvidia-smi's answer: lines of name, MiB in all, MiB used. What cannot be read is left out."""
    found = []
    for line in answer.splitlines():
        # From the right: a name may hold commas.
        name, *numbers = (part.strip() for part in line.rsplit(",", 2))
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):
            total, used = (int(number) << 20 for number in numbers)
            found.append(Gpu(name, total, max(0, total - used - CONTEXT_BYTES)))
    if visible is None:
        return tuple(found)
    indices = [part.strip() for part in visible.split(",") if part.strip()]
    # Names such as GPU-8f2a or MIG-... cannot be told apart here.
    if not all(index.lstrip("-").isdigit() for index in indices):
        return tuple(found[: len(indices)])
    return tuple(found[int(index)] for index in indices if 0 <= int(index) < len(found))


def processor_name() -> str:
    """The CPU and how many of its cores this process may use, such as ``AMD EPYC 9654, 16 cores``."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        # Not Linux: what Python knows stands.
        pass
    return f"{model}, {num_cores()} cores"


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
