"""Foreign storage errors, mapped once: what is worth another try, and what each becomes in batchinfer's tree."""

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from batchinfer.errors import BatchinferError, JobError, StorageUnavailable
from batchinfer.redact import redact

log = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Busy, throttled or interrupted storage; s3fs maps SlowDown and 503 to EBUSY, 500 to EREMOTEIO, unknown codes to EIO.
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.ENETUNREACH,
        errno.EPIPE,
        getattr(errno, "EREMOTEIO", errno.EIO),
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_PERMANENT_OS_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
#: Client libraries whose own exceptions fsspec lets through.
_CLIENT_LIBRARIES = frozenset({"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"})
_RETRYABLE_STATUS = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long transient errors are waited out: exponential steps with jitter, bounded in number and length."""

    max_attempts: int = 5
    initial_s: float = 0.5
    max_s: float = 15.0


def attempt(
    operation: Callable[[], Result], where: str, blames: type[JobError], policy: RetryPolicy, *, absent_ok: bool = False
) -> Result:
    """Run ``operation``, again after transient errors; it must be safe to repeat.

    ``where`` names the path in messages (credentials are removed here). Raises StorageUnavailable when
    transient errors outlast the policy or space runs out, ``blames`` for what only the user can change.
    FileExistsError passes through, with ``absent_ok`` FileNotFoundError does too; so does every error that
    is no storage error.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(policy.max_attempts),
        wait=wait_exponential_jitter(initial=policy.initial_s, max=policy.max_s, jitter=policy.initial_s),
        before_sleep=lambda state: _log_retry(state, where, policy),
        reraise=True,
    )
    try:
        return retrying(operation)
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


def is_storage_error(error: BaseException) -> bool:
    """Whether a storage or its client raised it, rather than batchinfer or a mistake in the code."""
    if isinstance(error, BatchinferError):
        return False
    return isinstance(error, OSError) or _client_library(error) is not None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed later."""
    if not is_storage_error(error) or isinstance(error, _PERMANENT_OS_ERRORS):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if _client_library(error) is not None:
        status = _http_status(error)
        if _is_refusal(error) or type(error).__name__ == "ParamValidationError":
            return False
        return status is None or status >= 500 or status in _RETRYABLE_STATUS
    return isinstance(error, OSError) and (error.errno is None or error.errno in _TRANSIENT_ERRNOS)


def lost_exclusive_create(error: BaseException) -> bool:
    """Whether a conditional write failed because the object exists.

    FileExistsError where the filesystem says so; SeaweedFS's answer reaches us as OSError(EINVAL) with S3's code
    in the cause; Google's as an HTTP 412.
    """
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        details = response.get("Error")
        if isinstance(details, dict) and details.get("Code") in {"PreconditionFailed", "412"}:
            return True
    return _http_status(error) == 412


def _mapped(error: Exception, where: str, blames: type[JobError], policy: RetryPolicy) -> BatchinferError:
    place, cause = redact(where), redact(str(error)) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return blames(f"{place}: not found; check the path (and that the bucket or the mount exists here)")
    if _is_refusal(error):
        return blames(
            f"{place}: access refused ({cause}); check its permissions, or the credentials in the environment or "
            "storage_options"
        )
    if isinstance(error, OSError) and error.errno in _NO_SPACE_ERRNOS:
        return StorageUnavailable(f"{place}: no space left ({cause}); free some and run the same command again")
    if is_transient(error):
        return StorageUnavailable(
            f"{place}: still failing after {policy.max_attempts} attempts ({type(error).__name__}: {cause}); "
            "run the same command again when the storage answers"
        )
    return blames(f"{place}: the storage refused ({type(error).__name__}: {cause})")


def _is_refusal(error: BaseException) -> bool:
    name = type(error).__name__
    return (
        isinstance(error, PermissionError)
        or (isinstance(error, OSError) and error.errno == errno.EROFS)
        or (_client_library(error) is not None and ("Credential" in name or "Authentication" in name))
        or (_client_library(error) is not None and _http_status(error) in {401, 403})
    )


def _client_library(error: BaseException) -> str | None:
    library = type(error).__module__.partition(".")[0]
    return library if library in _CLIENT_LIBRARIES else None


def _http_status(error: BaseException) -> int | None:
    for name in ("code", "status", "status_code"):
        status = getattr(error, name, None)
        if isinstance(status, (int, str)) and str(status).isdecimal():
            return int(status)
    return None


def _log_retry(state: RetryCallState, where: str, policy: RetryPolicy) -> None:
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
