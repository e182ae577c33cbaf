"""What a foreign storage error means: worth another try, refused, no space left, or something else that is final.

Read from the error mappings of s3fs (``s3fs.errors``), gcsfs (``gcsfs.retry``), adlfs and their clients, and from the
errno values of local and network filesystems.
"""

import errno
from collections.abc import Mapping

from batchinfer.errors import BatchinferError

#: Busy, throttled or interrupted storage, and machines short of descriptors, memory or locks for a moment.
#: s3fs makes EBUSY of SlowDown, 409 and 503, EREMOTEIO of 500, EIO of codes it does not know.
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOLCK,
        errno.ENOMEM,
        errno.ENOTCONN,  # a FUSE mount whose server went away
        errno.EPIPE,
        getattr(errno, "EREMOTEIO", errno.EIO),
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
#: EFBIG: a limit on file sizes (ulimit, FAT), which may be raised as space may be freed.
_NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PERMANENT_OS_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
#: Client libraries whose own exceptions fsspec lets through.
_CLIENT_LIBRARIES = frozenset(
    {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"}
    | {"httpcore2", "httpx2", "huggingface_hub"}
)
_RETRYABLE_STATUS = frozenset({408, 425, 429})
_NO_SPACE_STATUS = 507
#: Of botocore's many errors those of the wire; the others are about the client's configuration.
_BOTOCORE_TRANSIENT = frozenset(
    {"ChecksumError", "ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"}
)
#: S3 codes of answers that s3fs makes EINVAL of, though the next try may well succeed: bytes were lost on the way.
_S3_TRANSIENT_CODES = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"})
#: Codes of S3 servers (Ceph, MinIO) and of Azure whose disks or quotas are full.
_NO_SPACE_CODES = frozenset(
    {"InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"}
)
#: Final whatever their status says: the caller's mistake, or an answer that gcsfs has given up on.
_PERMANENT_NAMES = frozenset({"InvalidURL", "NonRetryableError", "ParamValidationError"})
#: What huggingface_hub raises, some of it as the cause of a FileNotFoundError, and the way out.
_HUB_PROBLEMS = {
    "GatedRepoError": "the repository is gated; ask for access on its hub page, and set HF_TOKEN to a token of that "
    "account",
    "DisabledRepoError": "the hub has disabled the repository",
    "RepositoryNotFoundError": "no such repository on the hub, or a private one; check the spelling, or set HF_TOKEN "
    "to a token of an account that may read it",
    "RevisionNotFoundError": "the repository has no such revision; check what is behind the @",
    "RemoteEntryNotFoundError": "no such file in the repository",
    "BucketNotFoundError": "no such bucket on the hub, or a private one; check the spelling, or set HF_TOKEN",
    "HFValidationError": "no id of a repository; data sets are hf://datasets/<namespace>/<name>[@<revision>]/<path>",
    "HfUriError": "no path on the hub; those of data sets are hf://datasets/<namespace>/<name>[@<revision>]/<path>",
    "OfflineModeIsEnabled": "the hub client is told to be offline; unset HF_HUB_OFFLINE, or give the path of a copy",
}


def is_storage_error(error: BaseException) -> bool:
    """Whether a storage or its client raised it, rather than batchinfer or a mistake in the code."""
    if isinstance(error, BatchinferError):
        return False
    return isinstance(error, OSError) or _client_library(error) is not None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed later: throttling, timeouts, resets, 5xx."""
    if not is_storage_error(error) or isinstance(error, _PERMANENT_OS_ERRORS) or hub_problem(error) is not None:
        return False
    if is_refusal(error) or is_no_space(error) or type(error).__name__ in _PERMANENT_NAMES:
        return False
    if isinstance(error, (TimeoutError, ConnectionError)) or _s3_code(error) in _S3_TRANSIENT_CODES:
        return True
    library, status = _client_library(error), _http_status(error)
    if library is not None and status is not None:
        return status >= 500 or status in _RETRYABLE_STATUS
    if library == "botocore":
        return any(base.__name__ in _BOTOCORE_TRANSIENT for base in type(error).__mro__)
    if library is not None:
        return True
    return isinstance(error, OSError) and (error.errno is None or error.errno in _TRANSIENT_ERRNOS)


def is_refusal(error: BaseException) -> bool:
    """Whether credentials or permissions are what is missing."""
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return True
    if isinstance(error, OSError) and error.errno is None and str(error).startswith("Forbidden: "):
        return True  # gcsfs makes this of a 403, without a number
    library, name = _client_library(error), type(error).__name__
    if library is None:
        return False
    if library == "google" and getattr(error, "retryable", None) is False:
        # google.auth: an account that cannot be used, unless it was the network that failed while asking about it.
        return "TransportError" not in {name, type(error.__cause__).__name__}
    return "Credential" in name or "Authentication" in name or _http_status(error) in {401, 403}


def is_no_space(error: BaseException) -> bool:
    """Whether disk, quota or file size limit is exhausted."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE_ERRNOS:
        return True
    return _s3_code(error) in _NO_SPACE_CODES or (
        _client_library(error) is not None and _http_status(error) == _NO_SPACE_STATUS
    )


def hub_problem(error: BaseException) -> str | None:
    """What is wrong with a path on the Hugging Face hub, with the way out; None for any other error."""
    names = (type(each).__name__ for each in (error, error.__cause__) if each is not None)
    return next((_HUB_PROBLEMS[name] for name in names if name in _HUB_PROBLEMS), None)


def lost_exclusive_create(error: BaseException) -> bool:
    """Whether a conditional write failed because the object exists.

    FileExistsError where the filesystem says so; SeaweedFS's answer reaches us as OSError(EINVAL) with S3's code
    in the cause; Google's as an HTTP 412.
    """
    if isinstance(error, FileExistsError):
        return True
    return _s3_code(error) in {"PreconditionFailed", "412"} or _http_status(error) == 412


def _client_library(error: BaseException) -> str | None:
    library = type(error).__module__.partition(".")[0]
    return library if library in _CLIENT_LIBRARIES else None


def _s3_code(error: BaseException) -> str | None:
    """The code of an S3 answer, in the error itself or in the one that s3fs translated; Azure has ``error_code``."""
    for each in (error, error.__cause__):
        answer = _s3_answer(each)
        details = answer.get("Error") if answer is not None else None
        if isinstance(details, Mapping):
            return str(details.get("Code"))
    code = getattr(error, "error_code", None)
    return str(code) if code is not None else None


def _s3_answer(error: BaseException | None) -> Mapping[str, object] | None:
    answer = getattr(error, "response", None)
    return answer if isinstance(answer, Mapping) else None


def _http_status(error: BaseException) -> int | None:
    for name in ("code", "status", "status_code"):
        status = getattr(error, name, None)
        if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()):
            return int(status)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status
    answer = _s3_answer(error)
    metadata = answer.get("ResponseMetadata") if answer is not None else None
    status = metadata.get("HTTPStatusCode") if isinstance(metadata, Mapping) else None
    return status if isinstance(status, int) else None
