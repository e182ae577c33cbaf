"""From ``model.path`` to a local directory: a directory as it is, a hub id or a URI downloaded once per node.

Hub models go through huggingface_hub and its cache (``HF_HOME``). URIs are fetched by a function the caller
passes in, into :func:`cache_directory`, where the locks of both live.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from batchinfer.errors import ModelError
from batchinfer.models import hub
from batchinfer.models.architecture import check_architecture
from batchinfer.models.files import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    check_config_files,
    check_model_files,
    check_weight_names,
    read_config,
)
from batchinfer.models.identity import directory_identity

__all__ = ["Fetch", "Preflight", "cache_directory", "hub_identity", "locate_model", "preflight"]

#: Copies every file below a URI, pickles left out, into an empty local directory.
Fetch = Callable[[str, Path], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = (*CONFIG_FILES, *TOKENIZER_FILES)
_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the driver knows of a model before any replica loads it.

    ``directory`` holds at least configuration and tokenizer; weights only where the model is not on the hub.
    ``revision`` is the hub commit to hand to every replica (None off the hub), so that all load the same one
    even if the branch moves. ``identity`` goes into the job's fingerprint.
    """

    directory: Path
    revision: str | None
    identity: dict[str, str]


def cache_directory() -> Path:
    """``$BATCHINFER_CACHE``, or ``batchinfer`` in ``$XDG_CACHE_HOME`` (``~/.cache``); not created here."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("BATCHINFER_CACHE") or f"{home}/batchinfer").expanduser()


def locate_model(path: str, revision: str | None = None, *, fetch: Fetch | None = None) -> Path:
    """The local directory that holds the model; downloads it where it is not on this node yet.

    Safe to call from many processes of a node at once: one downloads, the others wait for it. May be repeated:
    a finished download is used again, an interrupted one is taken up (hub) or begun anew (URI). A URI is taken
    to be immutable: put new weights under a new one, or delete its folder in the cache. ``fetch`` is needed for
    URIs only. Raises ModelError, or StorageUnavailable when a download may succeed the next time.
    """
    match _kind(path, revision):
        case "directory":
            return Path(path).expanduser()
        case "uri":
            return _fetched(path, fetch)
        case "hub":
            return _hub_snapshot(path, revision, _MODEL_FILES)


def preflight(
    path: str, revision: str | None = None, *, needs_tokenizer: bool, fetch: Fetch | None = None
) -> Preflight:
    """Check a model as far as its small files and file names tell, and say what identifies it.

    Of a hub model only configuration and tokenizer are downloaded. A URI is fetched whole, as a replica on
    this node would. Raises ModelError as ``check_model_files`` does, and what :func:`locate_model` raises.
    """
    if _kind(path, revision) == "hub":
        return _hub_preflight(path, revision, needs_tokenizer=needs_tokenizer)
    directory = locate_model(path, revision, fetch=fetch)
    check_model_files(directory, needs_tokenizer=needs_tokenizer)
    _check_own_code(directory)
    return Preflight(directory, None, directory_identity(directory))


def hub_identity(path: str, revision: str | None = None) -> str:
    """The commit that ``revision`` of a hub model points at now (or last did, offline); downloads small files only."""
    return _hub_snapshot(path, revision, _SMALL_FILES).name


def _kind(path: str, revision: str | None) -> Literal["directory", "hub", "uri"]:
    if "://" in path:
        kind: Literal["directory", "uri"] = "uri"
    elif Path(path).expanduser().is_dir():
        kind = "directory"
    elif Path(path).expanduser().exists():
        raise ModelError(f"model.path {path}: is a file; name the directory that holds it")
    elif _HUB_ID.fullmatch(path):
        return "hub"
    else:
        raise ModelError(f"model.path {path}: no such directory, and not a hub id (organisation/name)")
    if revision is not None:
        raise ModelError(f"model.revision {revision} applies to hub models only; leave it out (model.revision=null)")
    return kind


def _hub_preflight(repo_id: str, revision: str | None, *, needs_tokenizer: bool) -> Preflight:
    directory = _hub_snapshot(repo_id, revision, _SMALL_FILES)
    commit = directory.name
    check_config_files(directory, needs_tokenizer=needs_tokenizer)
    names = hub.file_names(repo_id, commit)
    if names is not None:
        check_weight_names(names, f"{repo_id} at {commit[:12]}")
    _check_own_code(directory)
    return Preflight(directory, commit, {"hub": repo_id, "commit": commit})


def _check_own_code(directory: Path) -> None:
    config = read_config(directory)
    if "auto_map" in config:
        # Elsewhere the replica's own check is enough; this one costs the driver the import of transformers.
        check_architecture(config)


def _hub_snapshot(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    with _lock(f"hub-{repo_id.replace('/', '--')}"):
        return hub.snapshot(repo_id, revision, patterns)


def _fetched(uri: str, fetch: Fetch | None) -> Path:
    # The URI itself may carry credentials: only its last part is shown or becomes part of a name.
    last = re.sub(r"[^\w.-]+", "-", uri.split("?")[0].rstrip("/").rsplit("/", 1)[-1]) or "model"
    name = f"{last}-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    if fetch is None:
        raise ModelError(f"model.path .../{last}: a URI cannot be fetched here; download it and name the directory")
    models = cache_directory() / "models"
    target, partial = models / name, models / f".{name}.partial"
    with _lock(name):
        if target.is_dir():
            return target
        # A crash before the rename leaves only the partial folder; whoever holds the lock next starts it anew.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _log.info("fetching the model .../%s into %s", last, target)
            fetch(uri, partial)
            if not any(partial.iterdir()):
                raise ModelError(f"model.path .../{last}: nothing there; check the URI")
            partial.rename(target)
        except OSError as error:
            raise ModelError(
                f"model.path .../{last}: cannot be stored in {models} ({error.strerror or error}); set "
                "BATCHINFER_CACHE to a writable directory with room for the weights"
            ) from error
    return target


@contextmanager
def _lock(name: str) -> Iterator[None]:
    """Held by one process of this node at a time; waits. The system drops it when the holder dies."""
    path = cache_directory() / "locks" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be written ({error.strerror}); set BATCHINFER_CACHE to a writable directory"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
