"""Credentials out of URIs: what logs, errors, plans and job.json may show of a path."""

import re

#: ``user:password@`` or a bare token before the host. The part before the last @ of the host may itself hold an @.
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<userinfo>[^/\s]*)@")
#: ``?key=value`` and ``&key=value``; a glob's ? is followed by no key and stays.
_QUERY_VALUE = re.compile(r"(?P<key>[?&][A-Za-z0-9_.\-]+=)[^&#\s]+")
_QUERY = re.compile(r"\?[A-Za-z0-9_.\-]+=.*")
#: Here the part before the @ is the container, not a user.
_CONTAINER_SCHEMES = frozenset({"abfs", "abfss", "wasb", "wasbs"})

HIDDEN = "***"


def redact(uri: str) -> str:
    """The URI without userinfo and without the values of its query (signatures, SAS tokens); plain paths unchanged.

    Works on chained URIs (``simplecache::s3://key:secret@bucket/x``) and on globs, which a URL parser would refuse.
    """
    if "://" not in uri:
        return uri
    return _QUERY_VALUE.sub(rf"\g<key>{HIDDEN}", _USERINFO.sub(_without_userinfo, uri))


def without_query(uri: str) -> str:
    """The URI up to its query: what stays the same when a signature is renewed. Plain paths unchanged."""
    return _QUERY.sub("", uri) if "://" in uri else uri


def _without_userinfo(match: re.Match[str]) -> str:
    scheme, userinfo = match["scheme"], match["userinfo"]
    if scheme.lower() in _CONTAINER_SCHEMES and ":" not in userinfo:
        return match[0]
    return f"{scheme}://{HIDDEN}@"
