"""Foreign errors at the border: which are tried again, and what the rest become."""

import errno
import logging
import pickle

import pytest

from batchinfer.errors import InputError, JobError, OutputError, StorageUnavailable
from batchinfer.storage.failures import attempt, is_transient, lost_exclusive_create
from tests.outputs import NO_WAIT


class ClientError(Exception):
    """As botocore raises it: the code is in the response."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code: int | str) -> None:
        super().__init__(f"status {code}")
        self.code = code


HttpError.__module__ = "gcsfs.retry"


class NoCredentialsError(Exception):
    """As botocore raises it."""


NoCredentialsError.__module__ = "botocore.exceptions"


def einval_because(code: str) -> OSError:
    error = OSError(errno.EINVAL, code)
    error.__cause__ = ClientError(code)
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
        HttpError(503),
        HttpError("429"),
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
        einval_because("InvalidArgument"),
        HttpError(404),
        HttpError(412),
        NoCredentialsError("none"),
        ValueError("a mistake in the code"),
        InputError("ours"),
    ],
    ids=repr,
)
def test_what_cannot_pass_is_not_tried_again(error: Exception) -> None:
    assert not is_transient(error)


def test_a_lost_exclusive_create_is_recognised_in_every_dialect() -> None:
    assert lost_exclusive_create(FileExistsError())
    assert lost_exclusive_create(einval_because("PreconditionFailed"))
    assert lost_exclusive_create(HttpError(412))
    assert not lost_exclusive_create(einval_because("InvalidArgument"))
    assert not lost_exclusive_create(TimeoutError())


def test_a_transient_error_is_waited_out_and_each_retry_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    failures = [TimeoutError("one"), ConnectionError("two")]

    def operation() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    with caplog.at_level(logging.WARNING, "batchinfer.storage.failures"):
        assert attempt(operation, "s3://user:secret@bucket/a", OutputError, NO_WAIT) == "done"
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
        attempt(operation, "s3://bucket/a", OutputError, NO_WAIT)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("error", "becomes", "says"),
    [
        (FileNotFoundError("x"), InputError, "not found; check the path"),
        (PermissionError("AccessDenied"), InputError, "access refused .*credentials"),
        (NoCredentialsError("Unable to locate credentials"), InputError, "access refused .*storage_options"),
        (OSError(errno.EROFS, "read-only"), InputError, "access refused"),
        (OSError(errno.ENOSPC, "full"), StorageUnavailable, "no space left .*free some"),
        (einval_because("InvalidBucketName"), InputError, "the storage refused"),
    ],
    ids=repr,
)
def test_each_foreign_error_names_the_path_and_the_way_out(
    error: Exception, becomes: type[Exception], says: str
) -> None:
    def operation() -> None:
        raise error

    with pytest.raises(becomes, match=f"s3://bucket/a: .*{says}") as caught:
        attempt(operation, "s3://bucket/a", InputError, NO_WAIT)
    assert caught.value.__cause__ is error
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_mistake_in_the_code_is_not_dressed_up_as_a_storage_error() -> None:
    def operation() -> None:
        raise KeyError("size")

    with pytest.raises(KeyError):
        attempt(operation, "s3://bucket/a", JobError, NO_WAIT)
