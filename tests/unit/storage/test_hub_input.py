"""hf:// paths, against a hub on the loopback interface: what is listed and read, and what every refusal becomes."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, constants
from huggingface_hub.utils import _http, close_session

from batchinfer.errors import InputError, JobError, OutputError, StorageUnavailable
from batchinfer.planner import check_output_apart, columns_to_read, plan_input
from batchinfer.storage.filesystem import locate
from batchinfer.storage.shard_reader import ShardReader
from tests.outputs import NO_WAIT, rows_table, write_shard
from tests.unit.storage import fake_dataset_hub
from tests.unit.storage.fake_dataset_hub import FakeDatasetHub

TOKEN = "hf_secret"


@pytest.fixture(scope="module")
def running() -> Iterator[FakeDatasetHub]:
    with fake_dataset_hub.serve() as hub:
        yield hub
    close_session()


@pytest.fixture
def hub(running: FakeDatasetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDatasetHub:
    """A hub with the data set ``org/rows``: two Parquet shards, a card, and one of JSON Lines beside them."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    HfFileSystem.clear_instance_cache()
    root = tmp_path / "hub"
    write_shard(root / "data" / "part-0.parquet", 3000, row_group_size=500)
    write_shard(root / "data" / "deep" / "part-1.parquet", 5, first=3000)
    (root / "lines").mkdir()
    (root / "lines" / "a.jsonl").write_text("".join(json.dumps({"id": n}) + "\n" for n in range(100)))
    (root / "README.md").write_text("# a card")
    (root / ".gitattributes").write_text("")
    running.data_sets = {"org/rows": root, "org/private": root}
    running.tokens = {"org/private": TOKEN}
    running.refusals = {}
    running.num_bytes_sent.clear()
    running.num_requests.clear()
    return running


def options(hub: FakeDatasetHub) -> dict[str, object]:
    return {"endpoint": hub.url}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("data", ["deep/part-1.parquet", "part-0.parquet"]),
        ("data/part-0.parquet", ["part-0.parquet"]),
        ("data/*.parquet", ["part-0.parquet"]),
        ("**/part-*.parquet", ["data/deep/part-1.parquet", "data/part-0.parquet"]),
        ("lines", ["a.jsonl"]),
    ],
)
@pytest.mark.parametrize("root", ["hf://datasets/org/rows", "hf://datasets/org/rows@v1"])
def test_files_directories_and_globs_of_a_data_set(hub: FakeDatasetHub, root: str, path: str, names: list[str]) -> None:
    found = plan_input([f"{root}/{path}"], options(hub), 1000, NO_WAIT)
    assert [shard.path for shard in found.plan.shards] == names
    assert all(shard.uri.startswith(f"{root}/") for shard in found.plan.shards)


def test_rows_and_ids_are_those_of_the_same_files_elsewhere(hub: FakeDatasetHub) -> None:
    for place, expected in (("data", rows_table(3005).column("id").to_pylist()), ("lines", list(range(100)))):
        on_hub = plan_input([f"hf://datasets/org/rows/{place}"], options(hub), 1000, NO_WAIT)
        local = plan_input([str(hub.data_sets["org/rows"] / place)], None, 1000)
        assert on_hub.plan.units == local.plan.units
        schema, _ = columns_to_read(on_hub.schemas, (), None)
        open_input = partial(locate, storage_options=options(hub), blames=InputError, policy=NO_WAIT)
        reader = ShardReader(open_input, schema)
        shards = {shard.shard_id: shard for shard in on_hub.plan.shards}
        ids = [
            number
            for unit in on_hub.plan.units
            for number in reader.read_unit(shards[unit.shard_id], unit).table["id"].to_pylist()
        ]
        assert sorted(ids) == expected
        reader.close()


def test_planning_parquet_fetches_footers_alone(hub: FakeDatasetHub) -> None:
    size_bytes = (hub.data_sets["org/rows"] / "data" / "part-0.parquet").stat().st_size
    location = locate("hf://datasets/org/rows/data/part-0.parquet", options(hub), blames=InputError, policy=NO_WAIT)
    assert len(location.read_range(100, 50)) == 50
    assert hub.num_bytes_sent["data/part-0.parquet"] == 50 < size_bytes


def test_ids_do_not_depend_on_the_token_and_no_uri_has_it(hub: FakeDatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ["hf://datasets/org/private/data"]
    by_environment = plan_input(path, options(hub), 1000, NO_WAIT).plan
    monkeypatch.delenv("HF_TOKEN")
    by_option = plan_input(path, {**options(hub), "token": TOKEN}, 1000, NO_WAIT).plan
    assert by_environment == by_option
    assert TOKEN not in repr(by_option)
    with pytest.raises(InputError, match=r"hf://datasets/org/private/data: no such repository.*or set HF_TOKEN"):
        plan_input(path, {**options(hub), "token": False}, 1000, NO_WAIT)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("hf://datasets/org/nothing", "no such repository on the hub, or a private one"),
        ("hf://datasets/org/rows@v9/data", "the repository has no such revision; check what is behind the @"),
        ("hf://datasets/org/rows/nothing", "no such file or directory"),
        ("hf://datasets/org/rows/nothing/*.parquet", "the glob matches no file"),
        ("hf://datasets/org", r"hf://datasets/<namespace>/<name>\[@<revision>\]/<path>"),
        ("hf://rows", r"hf://datasets/<namespace>/<name>"),
        ("hf://datasets/org/rows/README.md", "no Parquet footer"),
    ],
)
def test_what_is_wrong_with_a_path_is_said_with_the_way_out(hub: FakeDatasetHub, path: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan_input([path], options(hub), 1000, NO_WAIT)


@pytest.mark.parametrize(
    ("refusal", "error", "says"),
    [
        ((99, 403, "GatedRepo"), InputError, "the repository is gated; ask for access on its hub page"),
        ((99, 403, ""), InputError, "access refused"),
        ((99, 429, ""), StorageUnavailable, "still failing after 3 attempts.*429"),
        ((99, 503, ""), StorageUnavailable, "still failing after 3 attempts"),
    ],
    ids=["gated", "forbidden", "rate limit", "down"],
)
def test_what_the_hub_refuses_is_final_or_worth_another_run(
    hub: FakeDatasetHub, refusal: tuple[int, int, str], error: type[Exception], says: str
) -> None:
    hub.refusals["org/rows"] = refusal
    with pytest.raises(error, match=says):
        plan_input(["hf://datasets/org/rows/data"], options(hub), 1000, NO_WAIT)


def test_a_busy_hub_is_waited_for(hub: FakeDatasetHub) -> None:
    hub.refusals["org/rows"] = (2, 503, "")
    assert plan_input(["hf://datasets/org/rows/data"], options(hub), 1000, NO_WAIT).plan.num_rows == 3005


def test_a_hub_that_is_not_there_or_not_to_be_asked(hub: FakeDatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageUnavailable, match="still failing after 3 attempts"):
        plan_input(["hf://datasets/org/rows/data"], {"endpoint": "http://127.0.0.1:9"}, 1000, NO_WAIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="unset HF_HUB_OFFLINE, or give the path of a copy"):
        plan_input(["hf://datasets/org/rows/data"], options(hub), 1000, NO_WAIT)


def test_the_hub_is_read_only_and_its_revisions_are_one_place(hub: FakeDatasetHub) -> None:
    with pytest.raises(OutputError, match="the hub is read, not written to"):
        locate("hf://datasets/org/rows/out", options(hub))
    check_output_apart(["hf://datasets/org/rows/data"], "s3://bucket/out")
    assert issubclass(InputError, JobError)
