"""What is handed to a cluster, what is refused before, and the exit code that comes back."""

import shlex
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from batchinfer.cluster.submit import check_paths, entrypoint, exit_code, submit
from batchinfer.errors import ClusterLost, SpecError
from tests.jobs import job, job_values, write_job_file

#: Where nothing listens.
NOWHERE = "http://127.0.0.1:9"


def details(status: JobStatus, code: int | None) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, entrypoint="", status=status, driver_exit_code=code)


@pytest.mark.parametrize(
    ("status", "code", "ends_with"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, 137, 3),
        (JobStatus.FAILED, -9, 3),
        (JobStatus.FAILED, 127, 3),
        (JobStatus.STOPPED, None, 3),
        (JobStatus.FAILED, None, 3),
        (JobStatus.SUCCEEDED, None, 0),
    ],
)
def test_the_runs_own_exit_code_comes_back(status: JobStatus, code: int | None, ends_with: int) -> None:
    assert exit_code(details(status, code)) == ends_with


def test_the_entry_point_keeps_settings_whole_and_joins_the_cluster_it_runs_on() -> None:
    command = entrypoint(["prompt.template=Say '{{ x }}' $HOME", "cluster.address=ray://elsewhere:10001"])
    words = shlex.split(command)
    assert words[:5] == ["exec", "python", "-m", "batchinfer", "run"]
    assert "prompt.template=Say '{{ x }}' $HOME" in words
    assert words[-2:] == ["--set", "cluster.address=auto"]


def test_uris_and_hub_ids_need_no_warning() -> None:
    assert check_paths(job("LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct", "s3://bucket/in", "s3://bucket/out")) == ()


def test_paths_of_this_machine_are_warned_of(tmp_path: Path) -> None:
    warnings = check_paths(job(tmp_path, tmp_path / "in", tmp_path / "out"))
    assert [warning.partition(" ")[0] for warning in warnings] == ["input.path", "output.path", "model.path"]


@pytest.mark.parametrize(("input_path", "output_path"), [("in", "/out"), ("/in", "out"), ("/in", "./out")])
def test_relative_paths_are_refused(input_path: str, output_path: str) -> None:
    """The cluster would write the output into a directory that it deletes."""
    with pytest.raises(SpecError, match="a relative path means nothing on the cluster"):
        check_paths(job("org/model", input_path, output_path))


def test_a_wrong_job_file_is_told_here_and_not_by_the_cluster(tmp_path: Path) -> None:
    job_file = write_job_file(tmp_path / "job.yaml", job_values("org/model", "/in", "/out"))
    with pytest.raises(SpecError, match="did you mean 'max_new_tokens'"):
        submit(job_file, ["sampling.max_new_token=3"], NOWHERE)
    with pytest.raises(SpecError, match="cannot be read"):
        submit(tmp_path / "none.yaml", [], NOWHERE)


def test_variables_that_only_the_cluster_has_are_no_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUCKET_OF_THE_CLUSTER", raising=False)
    values = job_values("org/model", "s3://${BUCKET_OF_THE_CLUSTER}/in", "/out")
    with pytest.raises(ClusterLost, match="no Ray job server answers there"):
        submit(write_job_file(tmp_path / "job.yaml", values), [], NOWHERE)


def test_an_address_that_is_no_url_is_refused_at_once(tmp_path: Path) -> None:
    job_file = write_job_file(tmp_path / "job.yaml", job_values("org/model", "/in", "/out"))
    with pytest.raises(SpecError, match="http://head:8265"):
        submit(job_file, [], "head:8265")
