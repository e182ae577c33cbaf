import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants, errors

from batchinfer.errors import ModelError, StorageUnavailable
from batchinfer.models.files import check_model_files
from batchinfer.models.identity import directory_identity
from batchinfer.models.locate import cache_directory, hub_identity, locate_model, preflight
from tests.tiny import tiny_exaone3, tiny_llama
from tests.unit.models import fake_hub
from tests.unit.models.fake_hub import FakeHub

REPO = "LGAI-EXAONE/EXAONE-3.0-tiny"
URI = "s3://key:secret@bucket/models/exaone?token=secret"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # Whatever the environment says: these tests have a hub of their own, on the loopback interface.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub.serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        running.repositories[REPO] = tiny_exaone3(tmp_path / "on-the-hub")
        (running.repositories[REPO] / "pytorch_model.bin").write_bytes(b"pickle")
        (running.repositories[REPO] / "consolidated.safetensors").write_bytes(b"the same weights again")
        (running.repositories[REPO] / "README.md").write_text("a model card")
        yield running


def never(_uri: str, _target: Path) -> None:
    raise AssertionError("fetched")


def test_a_local_directory_is_used_as_it_is(tmp_path: Path) -> None:
    directory = tiny_exaone3(tmp_path / "model")
    assert locate_model(str(directory), fetch=never) == directory
    assert not (tmp_path / "cache").exists()


def test_a_file_or_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; name the directory that holds it"):
        locate_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(ModelError, match="no such directory, and not a hub id"):
        locate_model(str(tmp_path / "nothing"))


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision v1 applies to hub models only"):
        locate_model(str(tmp_path), "v1")


def test_the_cache_directory_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_CACHE", "/some/where")
    assert cache_directory() == Path("/some/where")
    monkeypatch.delenv("BATCHINFER_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "batchinfer"


def test_a_hub_model_arrives_whole_and_without_pickles(hub: FakeHub) -> None:
    directory = locate_model(REPO)
    assert directory.name == hub.commit
    check_model_files(directory, needs_tokenizer=True)
    assert sorted(hub.downloads) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_hub_model_is_downloaded_once(hub: FakeHub) -> None:
    with ThreadPoolExecutor(4) as pool:
        directories = set(pool.map(lambda _: locate_model(REPO), range(4)))
    assert len(directories) == 1
    assert len(hub.downloads) == len(set(hub.downloads))


def test_the_preflight_of_a_hub_model_downloads_no_weights_and_pins_the_commit(hub: FakeHub) -> None:
    found = preflight(REPO, "main", needs_tokenizer=True)
    assert (found.revision, found.identity) == (hub.commit, {"hub": REPO, "commit": hub.commit})
    assert sorted(path.name for path in found.directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    check_model_files(locate_model(REPO, found.revision), needs_tokenizer=True)


def test_the_hub_identity_is_the_commit(hub: FakeHub) -> None:
    assert hub_identity(REPO, "main") == hub.commit
    assert "model.safetensors" not in hub.downloads


def test_the_preflight_refuses_a_hub_model_with_pickles_only(hub: FakeHub) -> None:
    (hub.repositories[REPO] / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"{REPO} at aaaaaaaaaaaa: weights are pickles only"):
        preflight(REPO, needs_tokenizer=True)


def test_the_preflight_refuses_a_hub_model_without_a_tokenizer_where_one_is_needed(hub: FakeHub) -> None:
    (hub.repositories[REPO] / "tokenizer.json").unlink()
    preflight(REPO, needs_tokenizer=False)
    with pytest.raises(ModelError, match="no tokenizer"):
        preflight(REPO, needs_tokenizer=True)


@pytest.mark.parametrize(
    ("refusal", "error", "message"),
    [
        ((404, "RepoNotFound"), ModelError, "no such model on http://127.0.0.1.*check the spelling"),
        ((401, "RepoNotFound"), ModelError, "no such model on .*if it is private, set HF_TOKEN"),
        ((401, ""), ModelError, r"refused the download \(HTTP 401\); set HF_TOKEN"),
        ((403, "GatedRepo"), ModelError, "gated; accept its licence on its hub page and set HF_TOKEN"),
        ((403, ""), ModelError, r"refused the download \(HTTP 403\); set HF_TOKEN"),
        ((500, ""), StorageUnavailable, r"cannot serve it now \(HTTP 500\); run again later"),
    ],
    ids=["unknown", "private", "logged-out", "gated", "forbidden", "down"],
)
def test_what_the_hub_refuses_is_named_with_the_way_out(
    hub: FakeHub, refusal: tuple[int, str], error: type[Exception], message: str
) -> None:
    hub.refusals["org/private"] = refusal
    with pytest.raises(error, match=rf"model\.path org/private: .*({message})"):
        locate_model("org/private")


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (errors.HTTPError("reset by peer"), StorageUnavailable, r"broke off \(reset by peer\)"),
        (OSError(28, "No space left on device"), ModelError, r"No space left on device\); set HF_HOME"),
        (errors.HFValidationError("bad id"), ModelError, "not a hub id"),
    ],
    ids=["connection", "disk", "id"],
)
def test_a_download_that_breaks_off_is_named(
    monkeypatch: pytest.MonkeyPatch, broken: Exception, error: type[Exception], message: str
) -> None:
    def download(*_: object, **__: object) -> str:
        raise broken

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(error, match=message):
        locate_model(REPO)


def test_an_unknown_revision_is_named(hub: FakeHub) -> None:
    with pytest.raises(ModelError, match=r"at revision v9: the model has no such revision; check model\.revision"):
        locate_model(REPO, "v9")


def test_offline_and_not_cached_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"offline \(HF_HUB_OFFLINE\); download the model on a machine with network"):
        locate_model(REPO)
    assert hub.downloads == []


def test_offline_and_cached_works(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = locate_model(REPO, "main"), preflight(REPO, "main", needs_tokenizer=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (locate_model(REPO, "main"), preflight(REPO, "main", needs_tokenizer=True)) == online


def test_an_unreachable_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"no answer: http://127\.0\.0\.1:9; download the model on a machine"):
        locate_model(REPO)


class CopyingFetch:
    """Stands for storage: copies a directory, counting; breaks off when told to."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.num_calls = 0
        self.breaks = False

    def __call__(self, uri: str, target: Path) -> None:
        assert uri == URI
        self.num_calls += 1
        for file in sorted(self.source.iterdir()):
            shutil.copy(file, target)
            if self.breaks:
                raise StorageUnavailable("broke off")


@pytest.fixture
def fetch(tmp_path: Path) -> CopyingFetch:
    return CopyingFetch(tiny_exaone3(tmp_path / "bucket"))


def test_a_uri_is_fetched_once_into_the_cache(tmp_path: Path, fetch: CopyingFetch) -> None:
    directory = locate_model(URI, fetch=fetch)
    assert locate_model(URI, fetch=fetch) == directory
    assert fetch.num_calls == 1
    assert directory.is_relative_to(tmp_path / "cache" / "models")
    check_model_files(directory, needs_tokenizer=True)


def test_a_uri_asked_for_by_many_is_fetched_by_one(fetch: CopyingFetch) -> None:
    barrier = threading.Barrier(6)

    def ask(_: int) -> Path:
        barrier.wait()
        return locate_model(URI, fetch=fetch)

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(ask, range(6)))) == 1
    assert fetch.num_calls == 1


def test_an_interrupted_fetch_is_begun_anew(tmp_path: Path, fetch: CopyingFetch) -> None:
    fetch.breaks = True
    with pytest.raises(StorageUnavailable):
        locate_model(URI, fetch=fetch)
    left_behind = [path for path in (tmp_path / "cache" / "models").iterdir() if not path.name.startswith(".")]
    assert left_behind == []
    fetch.breaks = False
    (fetch.source / "config.json").rename(fetch.source / "config.json.bak")
    directory = locate_model(URI, fetch=fetch)
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in fetch.source.iterdir())


def test_neither_names_nor_errors_hold_the_credentials_of_a_uri(tmp_path: Path, fetch: CopyingFetch) -> None:
    assert "secret" not in str(locate_model(URI, fetch=fetch))
    with pytest.raises(ModelError) as refused:
        locate_model(URI)
    assert "secret" not in str(refused.value)
    assert "exaone: a URI cannot be fetched here" in str(refused.value)


def test_an_empty_uri_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing there; check the URI"):
        locate_model(URI, fetch=lambda _uri, _target: None)


def test_the_identity_of_a_uri_and_of_a_directory_is_their_content(fetch: CopyingFetch) -> None:
    by_uri = preflight(URI, needs_tokenizer=True, fetch=fetch)
    by_path = preflight(str(fetch.source), needs_tokenizer=True)
    assert by_uri.identity == by_path.identity == directory_identity(fetch.source)
    assert by_uri.revision is None


def test_the_preflight_of_a_directory_is_as_strict_as_loading(tmp_path: Path) -> None:
    (tiny_exaone3(tmp_path) / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        preflight(str(tmp_path), needs_tokenizer=True)


def test_the_preflight_refuses_a_model_that_needs_its_own_code(tmp_path: Path) -> None:
    config = json.loads((tiny_llama(tmp_path) / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not know model_type unheard_of"):
        preflight(str(tmp_path), needs_tokenizer=True)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set BATCHINFER_CACHE to a writable directory"):
        locate_model(URI, fetch=never)


def test_the_preflight_of_an_exaone_directory_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    tiny_exaone3(tmp_path)
    code = (
        "import sys; from batchinfer.models.locate import preflight; "
        f"preflight({str(tmp_path)!r}, needs_tokenizer=True); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
