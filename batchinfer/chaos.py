"""What ``run --chaos`` breaks, and when: SPEC as a type, and for every storage call a decision. Pure.

A decision is a function of (seed, run number, role of the process, number of the call) alone, so a run of the same
job, seed and number meets the same faults at the same calls. What storage holds changes with storage calls only, so
a process that dies around any of them leaves every state that one killed at any moment can leave.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from hashlib import blake2b
from typing import Literal

from batchinfer.errors import SpecError

#: The process of the driver; replicas are ``replica-<id>``.
DRIVER = "driver"

KillMoment = Literal["before", "halfway", "after"]
FailMoment = Literal["before", "after"]
#: Errors that storage gives and that pass: what each becomes is the acting side's affair.
NUM_ERRORS = 4


@dataclass(frozen=True, slots=True)
class ChaosSpec:
    """Probabilities per storage call; a SPEC is ``key=value,...`` with these names, ``-`` for ``_``."""

    #: A replica's process is killed with SIGKILL, before or after the call.
    kill_replica: float = 0.0
    #: The driver's is, and its Ray with it.
    kill_driver: float = 0.0
    #: A write to a local disk is torn: its process is killed when half of the bytes are written.
    tear: float = 0.0
    #: The call fails with an error that passes (a timeout, a reset, throttling), before or after it has happened.
    fail: float = 0.0
    #: The call is delayed, by ``delay_s``: ``delay=0.02:0.5`` delays one call in 50 by half a second.
    delay: float = 0.0
    delay_s: float = 0.1
    #: The driver's lease is given to a run that does not exist, whose last heartbeat is long ago.
    expire_lease: float = 0.0
    #: Kills, torn writes and expired leases grow rarer with every run, and from this many runs on there are none.
    runs: int = 20

    def of_run(self, number: int) -> "ChaosSpec":
        """The probabilities in the ``number``-th run (0, 1, ...), faded."""
        left = max(0.0, 1.0 - number / self.runs)
        return replace(
            self,
            kill_replica=self.kill_replica * left,
            kill_driver=self.kill_driver * left,
            tear=self.tear * left,
            expire_lease=self.expire_lease * left,
        )


def parse_chaos(text: str) -> ChaosSpec:
    """``kill-replica=0.02,fail=0.05,delay=0.02:0.5``; raises SpecError for what is unknown or out of range."""
    values: dict[str, float | int] = {}
    for part in text.split(","):
        key, separator, value = part.strip().partition("=")
        read = _READERS.get(key)
        if read is None:
            near = get_close_matches(key, _READERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_READERS)}"
            raise SpecError(f"--chaos: unknown key {key!r}; {hint}")
        if not separator:
            raise SpecError(f"--chaos: {key} needs a value, such as {_EXAMPLES.get(key, f'{key}=0.02')}")
        given = read(key, value)
        if set(given) & set(values):
            raise SpecError(f"--chaos: {key} is given twice; leave one out")
        values |= given
    return replace(ChaosSpec(), **values)  # type: ignore[arg-type]


def _probability(key: str, text: str) -> Mapping[str, float]:
    return {key.replace("-", "_"): _number(key, text, 0.0, 1.0, "a probability from 0 to 1")}


def _delay(key: str, text: str) -> Mapping[str, float]:
    probability, separator, seconds = text.partition(":")
    found = dict(_probability(key, probability))
    if separator:
        found["delay_s"] = _number(key, seconds, 0.0, 3600.0, "seconds from 0 to 3600 behind the colon")
    return found


def _runs(key: str, text: str) -> Mapping[str, int]:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise SpecError(f"--chaos: {key}={text} is not a number of runs from 1 to 1000")
    return {"runs": int(text)}


def _number(key: str, text: str, low: float, high: float, meaning: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise SpecError(f"--chaos: {key}={text} is not {meaning}")
    return value


_EXAMPLES = {"delay": "delay=0.02:0.5", "runs": "runs=20"}
_READERS: dict[str, Callable[[str, str], Mapping[str, float | int]]] = {
    **{
        field.name.replace("_", "-"): _probability
        for field in fields(ChaosSpec)
        if field.name not in {"delay", "delay_s", "runs"}
    },
    "delay": _delay,
    "runs": _runs,
}


@dataclass(frozen=True, slots=True)
class CallFaults:
    """What happens to one storage call: at most one death, one error and one delay."""

    delay_s: float = 0.0
    fail: FailMoment | None = None
    #: Which of the ``NUM_ERRORS`` errors.
    error: int = 0
    kill: KillMoment | None = None
    expire_lease: bool = False


@dataclass(frozen=True, slots=True)
class Chaos:
    """The faults of one run of the driver and its replicas."""

    spec: ChaosSpec
    seed: int
    #: 0, 1, ...: the next run after a kill meets faults of its own.
    run_number: int

    def of_call(self, role: str, number: int) -> CallFaults:
        """The faults of a process's ``number``-th storage call."""
        rates = self.spec.of_run(self.run_number)
        # Every kind draws for itself, so that setting one rate leaves the others' moments where they were.
        die, tear, fail, delay, expire, choice = self._draws(role, number)
        kill_rate = rates.kill_driver if role == DRIVER else rates.kill_replica
        kill: KillMoment | None = None
        if die < kill_rate:
            kill = "before" if choice % 2 else "after"
        elif tear < rates.tear:
            kill = "halfway"
        return CallFaults(
            delay_s=rates.delay_s if delay < rates.delay else 0.0,
            fail=None if fail >= rates.fail else "before" if choice & 2 else "after",
            error=(choice >> 2) % NUM_ERRORS,
            kill=kill,
            expire_lease=role == DRIVER and expire < rates.expire_lease,
        )

    def _draws(self, role: str, number: int) -> tuple[float, float, float, float, float, int]:
        digest = blake2b(f"{self.seed}/{self.run_number}/{role}/{number}".encode(), digest_size=48).digest()
        die, tear, fail, delay, expire, choice = (int.from_bytes(digest[k : k + 8], "big") for k in range(0, 48, 8))
        unit = float(1 << 64)
        return die / unit, tear / unit, fail / unit, delay / unit, expire / unit, choice
