"""Credentials leave URIs; everything else stays readable."""

import pytest

from batchinfer.redact import redact, without_query


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://key:secret@bucket/a/*.parquet", "s3://***@bucket/a/*.parquet"),
        ("s3://key:se@cret@bucket/a", "s3://***@bucket/a"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://host/x?X-Amz-Signature=abc&versionId=7", "https://host/x?X-Amz-Signature=***&versionId=***"),
        ("simplecache::s3://key:secret@bucket/x", "simplecache::s3://***@bucket/x"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("abfs://container:key@account/x", "abfs://***@account/x"),
    ],
)
def test_credentials_are_hidden(uri: str, shown: str) -> None:
    assert redact(uri) == shown


@pytest.mark.parametrize(
    "uri", ["out/a@b", "/mnt/a?b=c", "s3://bucket/part-?.parquet", "s3://bucket/a@b/[0-9]*.parquet", "ray://host:10001"]
)
def test_what_holds_no_credential_is_unchanged(uri: str) -> None:
    assert redact(uri) == uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://host/a.parquet?sig=abc/def&x=1", "https://host/a.parquet"),
        ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
        ("/mnt/a?b=c", "/mnt/a?b=c"),
    ],
)
def test_a_query_is_no_part_of_a_name(uri: str, shown: str) -> None:
    assert without_query(uri) == shown
