"""Single calls to storage: tried again while that may help, and what their failures become in batchinfer's tree."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from batchinfer.errors import BatchinferError, JobError, StorageUnavailable
from batchinfer.redact import redact
from batchinfer.storage.error_kinds import (
    hub_problem,
    is_no_space,
    is_refusal,
    is_storage_error,
    is_transient,
    lost_exclusive_create,
)
from batchinfer.storage.faults import StorageFaults

__all__ = ["RetryPolicy", "attempt", "is_storage_error", "is_transient", "lost_exclusive_create"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(slots=True)
class RetryCount:
    """How many calls were tried again. Threads that count at the same moment may count one less: it is for people."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long transient errors are waited out: exponential steps with jitter, bounded in number and length."""

    max_attempts: int = 6
    initial_s: float = 0.5
    max_s: float = 15.0
    #: Broken on purpose; None = nothing is asked.
    faults: StorageFaults | None = None
    #: Counts up; shared by all that are called under this policy.
    retries: RetryCount = field(default_factory=RetryCount, compare=False)


def attempt(
    name: str,
    operation: Callable[[], Result],
    where: str,
    blames: type[JobError],
    policy: RetryPolicy,
    *,
    absent_ok: bool = False,
) -> Result:
    """Run ``operation``, again after transient errors; it must be safe to repeat.

    ``name`` is what the operation is called towards faults, ``where`` names the path in messages (credentials are
    removed here). Raises StorageUnavailable when transient errors outlast the policy or space runs out, ``blames``
    for what only the user can change. FileExistsError passes through, with ``absent_ok`` FileNotFoundError does too;
    so does every error that is no storage error.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(policy.max_attempts),
        wait=wait_exponential_jitter(initial=policy.initial_s, max=policy.max_s, jitter=policy.initial_s),
        before_sleep=lambda state: _log_retry(state, where, policy),
        reraise=True,
    )
    try:
        return retrying(_with_faults(name, operation, where, policy.faults))
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        if absent_ok:
            raise
        raise _mapped(error, where, blames, policy) from error
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise _mapped(error, where, blames, policy) from error


def _with_faults(
    name: str, operation: Callable[[], Result], where: str, faults: StorageFaults | None
) -> Callable[[], Result]:
    """``operation`` with the faults asked around each of its tries."""
    if faults is None:
        return operation

    def disturbed() -> Result:
        faults.before(name, where)
        try:
            result = operation()
        except Exception:
            faults.after(name, where)
            raise
        faults.after(name, where)
        return result

    return disturbed


def _mapped(error: Exception, where: str, blames: type[JobError], policy: RetryPolicy) -> BatchinferError:
    place, cause = redact(where), redact(str(error)) or type(error).__name__
    problem = hub_problem(error)
    if problem is not None:
        return blames(f"{place}: {problem}")
    if isinstance(error, FileNotFoundError):
        return blames(f"{place}: not found; check the path (and that the bucket or the mount exists here)")
    if is_refusal(error):
        return blames(
            f"{place}: access refused ({cause}); check its permissions, or the credentials in the environment or "
            "storage_options"
        )
    if is_no_space(error):
        return StorageUnavailable(
            f"{place}: no space left ({cause}); free some, or raise the quota or file size limit, and run the same "
            "command again"
        )
    if is_transient(error):
        return StorageUnavailable(
            f"{place}: still failing after {policy.max_attempts} attempts ({type(error).__name__}: {cause}); "
            "run the same command again when the storage answers"
        )
    return blames(f"{place}: the storage refused ({type(error).__name__}: {cause})")


def _log_retry(state: RetryCallState, where: str, policy: RetryPolicy) -> None:
    policy.retries.number += 1
    error = state.outcome.exception() if state.outcome else None
    log.warning(
        "%s: attempt %d of %d failed (%s: %s); next in %.1f s",
        redact(where),
        state.attempt_number,
        policy.max_attempts,
        type(error).__name__,
        redact(str(error)),
        state.next_action.sleep if state.next_action else 0.0,
    )
