"""Foreign errors at the border: which are tried again, and what the rest become."""

import errno
import logging
import pickle
from dataclasses import replace
from http import HTTPStatus

import aiohttp
import botocore.exceptions
import pytest

from batchinfer.errors import InputError, JobError, OutputError, StorageUnavailable
from batchinfer.storage.failures import RetryCount, attempt, is_transient, lost_exclusive_create
from tests.outputs import NO_WAIT


class ClientError(Exception):
    """As botocore raises it: the code is in the response."""

    def __init__(self, code: str, status: int | None = None) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


ClientError.__module__ = "botocore.exceptions"


def library_error(module: str, name: str, *, base: type[Exception] = Exception, **attributes: object) -> Exception:
    """An exception as a client library raises it; which libraries there are on this machine does not matter."""
    kind = type(name, (base,), {"__module__": module, **attributes})
    error: Exception = kind(name)
    return error


def gcsfs_error(code: int | str) -> Exception:
    return library_error("gcsfs.retry", "HttpError", code=code)


def azure_error(name: str, **attributes: object) -> Exception:
    return library_error("azure.core.exceptions", name, **attributes)


def s3_error(code: str, number: int = errno.EINVAL) -> OSError:
    """As s3fs translates it."""
    error = OSError(number, code)
    error.__cause__ = ClientError(code)
    return error


def google_error(name: str, because: Exception | None = None) -> Exception:
    error = library_error("google.auth.exceptions", name, retryable=False)
    error.__cause__ = because
    return error


def botocore_error(name: str, **arguments: object) -> Exception:
    """A real one."""
    error: Exception = getattr(botocore.exceptions, name)(**arguments)
    return error


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("slow"),
        ConnectionResetError("reset"),
        OSError(errno.EBUSY, "SlowDown"),
        OSError(errno.EREMOTEIO, "InternalError"),
        OSError(errno.ESTALE, "stale handle"),
        OSError("no number"),
        OSError(errno.EMFILE, "too many open files"),
        OSError(errno.ENOTCONN, "transport endpoint is not connected"),
        gcsfs_error(503),
        gcsfs_error("429"),
        library_error("gcsfs.retry", "ChecksumError"),
        library_error("requests.exceptions", "ProxyError", base=OSError),
        google_error("TransportError"),
        google_error("RefreshError", because=google_error("TransportError")),
        library_error("google.api_core.exceptions", "ServiceUnavailable", code=HTTPStatus.SERVICE_UNAVAILABLE),
        azure_error("HttpResponseError", status_code=503, error_code="ServerBusy"),
        azure_error("ServiceRequestError"),
        azure_error("ServiceResponseTimeoutError"),
        s3_error("SlowDown", errno.EBUSY),
        s3_error("ConditionalRequestConflict", errno.EIO),
        s3_error("IncompleteBody"),
        s3_error("BadDigest"),
        ClientError("InternalError", 500),
        botocore_error("EndpointConnectionError", endpoint_url="http://127.0.0.1:9"),
        botocore_error("ReadTimeoutError", endpoint_url="http://127.0.0.1:9"),
        botocore_error("ConnectionClosedError", endpoint_url="http://127.0.0.1:9"),
        botocore_error("IncompleteReadError", actual_bytes=1, expected_bytes=2),
        aiohttp.ClientPayloadError("cut off"),
        aiohttp.ServerDisconnectedError(),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError("no"),
        FileExistsError("there"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EROFS, "read-only"),
        OSError(errno.EDQUOT, "quota"),
        OSError(errno.EFBIG, "too large"),
        OSError("Forbidden: bucket/a"),  # gcsfs
        s3_error("InvalidArgument"),
        s3_error("XMinioStorageFull", errno.EIO),
        s3_error("QuotaExceeded", errno.EIO),
        gcsfs_error(404),
        gcsfs_error(412),
        gcsfs_error(401),
        gcsfs_error(507),
        library_error("gcsfs.retry", "NonRetryableError"),
        google_error("RefreshError"),
        google_error("DefaultCredentialsError"),
        azure_error("ClientAuthenticationError", status_code=None),
        azure_error("HttpResponseError", status_code=403),
        azure_error("HttpResponseError", status_code=409, error_code="InsufficientStorage"),
        ClientError("AccessDenied", 403),
        botocore_error("NoCredentialsError"),
        botocore_error("NoRegionError"),
        botocore_error("ProfileNotFound", profile="x"),
        botocore_error("ParamValidationError", report="x"),
        ValueError("a mistake in the code"),
        InputError("ours"),
    ],
    ids=repr,
)
def test_what_cannot_pass_is_not_tried_again(error: Exception) -> None:
    assert not is_transient(error)


def test_a_lost_exclusive_create_is_recognised_in_every_dialect() -> None:
    assert lost_exclusive_create(FileExistsError())
    assert lost_exclusive_create(s3_error("PreconditionFailed"))
    assert lost_exclusive_create(gcsfs_error(412))
    assert not lost_exclusive_create(s3_error("InvalidArgument"))
    assert not lost_exclusive_create(TimeoutError())


def test_a_transient_error_is_waited_out_and_each_retry_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    failures = [TimeoutError("one"), ConnectionError("two")]

    def operation() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    with caplog.at_level(logging.WARNING, "batchinfer.storage.failures"):
        assert attempt("read_bytes", operation, "s3://user:secret@bucket/a", OutputError, NO_WAIT) == "done"
    assert [record.getMessage().split(" failed ")[0] for record in caplog.records] == [
        "s3://***@bucket/a: attempt 1 of 3",
        "s3://***@bucket/a: attempt 2 of 3",
    ]


def test_transient_errors_that_outlast_the_policy_end_as_storage_unavailable_after_exactly_its_attempts() -> None:
    calls = []

    def operation() -> None:
        calls.append(1)
        raise TimeoutError("never")

    with pytest.raises(StorageUnavailable, match=r"still failing after 3 attempts.*run the same command again"):
        attempt("read_bytes", operation, "s3://bucket/a", OutputError, NO_WAIT)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("error", "becomes", "says"),
    [
        (FileNotFoundError("x"), InputError, "not found; check the path"),
        (PermissionError("AccessDenied"), InputError, "access refused .*credentials"),
        (botocore_error("NoCredentialsError"), InputError, "access refused .*storage_options"),
        (OSError("Forbidden: bucket/a"), InputError, "access refused .*credentials"),
        (google_error("DefaultCredentialsError"), InputError, "access refused .*credentials"),
        (OSError(errno.EROFS, "read-only"), InputError, "access refused"),
        (OSError(errno.ENOSPC, "full"), StorageUnavailable, "no space left .*free some"),
        (OSError(errno.EDQUOT, "quota"), StorageUnavailable, "no space left .*raise the quota"),
        (OSError(errno.EFBIG, "too large"), StorageUnavailable, "no space left .*file size limit"),
        (s3_error("XMinioStorageFull", errno.EIO), StorageUnavailable, "no space left"),
        (s3_error("InvalidBucketName"), InputError, "the storage refused"),
    ],
    ids=repr,
)
def test_each_foreign_error_names_the_path_and_the_way_out(
    error: Exception, becomes: type[Exception], says: str
) -> None:
    def operation() -> None:
        raise error

    with pytest.raises(becomes, match=f"s3://bucket/a: .*{says}") as caught:
        attempt("read_bytes", operation, "s3://bucket/a", InputError, NO_WAIT)
    assert caught.value.__cause__ is error
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_mistake_in_the_code_is_not_dressed_up_as_a_storage_error() -> None:
    def operation() -> None:
        raise KeyError("size")

    with pytest.raises(KeyError):
        attempt("read_bytes", operation, "s3://bucket/a", JobError, NO_WAIT)


def test_a_policy_counts_what_was_tried_again() -> None:
    policy = replace(NO_WAIT, retries=RetryCount())
    failures = [TimeoutError("slow"), ConnectionResetError("gone")]

    def flaky() -> str:
        if failures:
            raise failures.pop()
        return "done"

    for _ in range(2):
        assert attempt("read", flaky, "s3://bucket/x", OutputError, policy) == "done"
    assert policy.retries.number == 2
