"""The model hub: downloads through huggingface_hub and its cache (``HF_HOME``), its errors as ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from batchinfer.errors import ModelError, StorageUnavailable

__all__ = ["file_names", "snapshot"]

#: Folders hold other formats (original/, onnx/); consolidated files repeat Mistral's weights under other names.
_IGNORED_FILES = ("*/*", "consolidated*")
_LOGIN = "set HF_TOKEN to a token of an account that may read it"


def snapshot(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """``<hub cache>/models--<repo>/snapshots/<commit>`` with the files that match; downloads what is not there yet.

    Without the network, what is in the cache is used. Raises ModelError, or StorageUnavailable when the hub
    may answer the next time.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repo_id, revision):
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED_FILES)
            )
        )


def file_names(repo_id: str, commit: str) -> list[str] | None:
    """Every file of a repository at a commit; None when the client is offline and cannot know."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _hub_errors(repo_id, commit):
        try:
            return HfApi().list_repo_files(repo_id, revision=commit)
        except OfflineModeIsEnabled:
            return None


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """The one place that knows the hub client's errors."""
    from huggingface_hub import constants, errors

    named = f"model.path {repo_id}" + (f" at revision {revision}" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"{named}: the model is gated; accept its licence on its hub page and {_LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{named}: no such model on {constants.ENDPOINT}, and no such directory here; check the spelling, or if "
            f"it is private, {_LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{named}: the model has no such revision; check model.revision") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{named}: not a hub id (organisation/name), and no such directory here") from error
    except errors.LocalEntryNotFoundError as error:
        # The client looks into its cache after any failure and reports that; what happened first is the cause.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(named, error.__cause__.response.status_code) from error
        raise ModelError(_not_reachable(named)) from error
    except errors.HfHubHTTPError as error:
        raise _refused(named, error.response.status_code) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # of httpx or httpx2, by the client's version
        raise StorageUnavailable(f"{named}: the download from {constants.ENDPOINT} broke off ({error})") from error
    except OSError as error:
        raise ModelError(
            f"{named}: cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror or error}); set HF_HOME to a "
            "writable directory with room for the weights"
        ) from error


def _refused(named: str, status: int) -> ModelError | StorageUnavailable:
    from huggingface_hub import constants

    if status >= 500 or status in (408, 429):
        return StorageUnavailable(f"{named}: {constants.ENDPOINT} cannot serve it now (HTTP {status}); run again later")
    return ModelError(f"{named}: {constants.ENDPOINT} refused the download (HTTP {status}); {_LOGIN}")


def _not_reachable(named: str) -> str:
    from huggingface_hub import constants

    why = (
        "the hub client is offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"no answer: {constants.ENDPOINT}"
    )
    return (
        f"{named}: no such directory here, not in the hub cache {constants.HF_HUB_CACHE}, and {why}; download the "
        "model on a machine with network access and give its directory as model.path"
    )
