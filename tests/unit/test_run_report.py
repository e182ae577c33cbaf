"""The report: events folded in bounded memory, parts surveyed, one page without network or scripts."""

import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchinfer.cli import main
from batchinfer.report.comparison import comparison_page
from batchinfer.report.output_survey import MAX_PARTS, Histogram, survey
from batchinfer.report.page import report_page
from batchinfer.report.run_history import MAX_BUCKETS, MAX_KEPT, fold
from batchinfer.report.run_report import read_report
from batchinfer.storage.events import Event
from batchinfer.storage.filesystem import locate
from tests.outputs import begin_job, finished_job, planned, write_shard
from tests.reports import event, one_run, reported


def test_a_run_is_summed_up() -> None:
    history = fold(one_run())
    [run] = history.runs
    assert (run.run_id, run.host, run.outcome) == ("run-1", "gpu-17", "done")
    assert (run.num_units, run.num_rows, run.num_prompt_tokens, run.num_completion_tokens) == (6, 60, 1800, 3000)
    assert (run.num_replicas_died, run.num_unit_failures, run.elapsed_s) == (1, 1, 100.0)
    assert history.failures_by_cause == {"StorageUnavailable": 1, "RayActorError": 1}
    first, second = history.lives
    assert (first.end, first.ended_s, first.num_units) == ("died", 60.0, 3)
    assert (second.end, second.ended_s, second.num_units, second.capacity) == ("", None, 3, 8)
    assert history.seconds(first) == (10.0, 49.0, 0.0)
    assert history.seconds(second) == (10.0, 80.0, 9.0)
    assert history.device_s == 59.0 + 99.0
    assert history.idle_s_by_cause() == {"rows": 5.0, "next_turns": 0.0, "publishing": 2.0, "units": 1.0, "": 1.0}
    assert run.num_shared_sequences == 6
    assert run.quality == {"repeating": 12}


def test_hours_between_runs_are_left_out() -> None:
    """A night between two runs of an output would squeeze both into the edges of every chart."""
    history = fold([*one_run(), *one_run(86400.0, "run-2")])
    assert [(run.started_s, run.ended_s) for run in history.runs] == [(0.0, 100.0), (100.0, 200.0)]
    assert history.end_s == 200.0
    assert sum(bucket.num_completion_tokens for bucket in history.series.buckets) == 6000
    assert [life.run_id for life in history.lives] == ["run-1"] * 2 + ["run-2"] * 2


def test_a_crashed_run_ends_with_its_last_event() -> None:
    events = list(one_run())[:8]
    [run] = fold(events).runs
    assert run.outcome == ""
    assert run.elapsed_s == 40.0


def test_memory_does_not_grow_with_events() -> None:
    def many() -> Iterator[Event]:
        yield event("run_started", 0, run="r", host="h")
        for index in range(30_000):
            if index % 10 == 0:
                yield event("replica_starting", 3 * index, replica=index)
                yield event("replica_died", 3 * index + 1, replica=index, error=f"E{index % 3}: x")
            yield event("unit_committed", 3 * index, replica=index, num_rows=1, num_completion_tokens=7)

    history = fold(many())
    assert MAX_BUCKETS // 2 <= len(history.series.buckets) <= MAX_BUCKETS
    assert sum(bucket.num_completion_tokens for bucket in history.series.buckets) == 210_000
    assert sum(bucket.num_failures for bucket in history.series.buckets) == 3_000
    assert len(history.lives) == len(history.failures) == MAX_KEPT
    assert history.num_lives == 3_000
    assert set(history.failures_by_cause) == {"E0", "E1", "E2"}


@pytest.mark.parametrize(
    "odd", [{"event": "unit_committed"}, {"at": "yesterday", "event": "run_started"}, {"at": 1, "event": None}]
)
def test_odd_events_do_no_harm(odd: Event) -> None:
    assert fold([odd, *one_run(), odd]).runs[0].num_units == 6


def test_lengths_fall_into_powers_of_two() -> None:
    import numpy as np

    histogram = Histogram()
    histogram.add(np.array([0, 8, 9, 16, 17, 100, 3_000_000]))
    assert histogram.bars()[0] == (8, 2)
    assert dict(histogram.bars())[16] == 2
    assert dict(histogram.bars())[32] == 1
    assert dict(histogram.bars())[128] == 1
    assert histogram.longest == 3_000_000
    assert sum(count for _, count in histogram.bars()) == histogram.num_values == 7


def test_parts_are_surveyed_and_a_damaged_one_left_out(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, num_rows=45, dead=[3, 4])
    units = [unit.unit_id for unit in plan.units]
    output.child(f"completions/part-{units[1]}.parquet").write_replace(b"PAR1 no", output.child("_job/tmp"))
    found = survey(output, units, units[:1])
    assert (found.num_parts, found.num_parts_read, found.num_unreadable) == (5, 4, 1)
    assert found.completion_tokens.num_values == 45 - 10 - 2
    assert found.completion_tokens.mean == 3.0
    assert found.finish_reasons == {"stop": 33}
    [cause] = found.dead_letters.values()
    assert (cause.error_type, cause.num_rows) == ("too_long", 2)
    assert [row_id.rpartition(":")[2] for row_id, _ in cause.examples] == ["3", "4"]


def test_of_many_parts_a_sample_is_read(tmp_path: Path) -> None:
    output, plan = finished_job(tmp_path, num_rows=25)
    units = [unit.unit_id for unit in plan.units]
    found = survey(output, [units[index % 3] for index in range(10 * MAX_PARTS)], [])
    assert (found.num_parts, found.num_parts_read) == (10 * MAX_PARTS, MAX_PARTS)


class _Outside(html.parser.HTMLParser):
    """Everything of a page that would run code or reach for another file."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name: value or "" for name, value in attrs}
        if tag in {"script", "link", "iframe", "object", "embed", "img", "form"} or {"src", "href"} & set(names):
            self.found.append(tag)
        self.found += [name for name in names if name.startswith("on")]


def test_the_page_is_self_contained_and_says_what_happened(tmp_path: Path) -> None:
    page = report_page(reported(tmp_path, price=3.6))
    outside = _Outside()
    outside.feed(page)
    assert outside.found == []
    assert "http" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "url(" not in page
    assert "@import" not in page
    for words in (
        "finished, dead letters remain",
        "too_long",
        "25 of 25",
        "run-2",
        "StorageUnavailable",
        "waiting for work",
        "waiting for rows to be read and rendered",
        "waiting for parts to be published",
        "without a unit",
        "Identical sequences, not generated again",
        "repeating",
    ):
        assert words in page, words
    # Two runs of 158 s of devices at 3.6 an hour; 6,000 tokens.
    assert "0.32" in page
    assert "52.667" in page
    assert len(page) < 60_000


def test_nothing_from_a_row_becomes_markup(tmp_path: Path) -> None:
    page = report_page(reported(tmp_path, hostile="<script>alert(1)</script>"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_two_outputs_are_compared(tmp_path: Path) -> None:
    first = reported(tmp_path / "a")
    page = comparison_page(first, reported(tmp_path / "b"))
    assert "Nothing that decides what is generated." in page
    assert "Generated tokens/s" in page
    assert "1.00" in page


def test_a_job_without_a_run_has_a_report(tmp_path: Path) -> None:
    plan = planned(write_shard(tmp_path / "in" / "a.parquet", 25).parent)
    output = locate(str(tmp_path / "out"))
    begin_job(output, plan)
    assert "0 of 25" in report_page(read_report(str(output)))


def test_the_command_writes_a_page_and_compares_two(tmp_path: Path) -> None:
    reported(tmp_path / "a")
    reported(tmp_path / "b")
    first, second = str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["report", first, "-o", str(page), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["page"]) == (0, str(page))
    assert "Dead letters by cause" in page.read_text()
    assert CliRunner().invoke(main, ["report", first, second, "-o", str(page)]).exit_code == 0
    assert "Side by side" in page.read_text()


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["report", str(tmp_path)]).exit_code == 2
    reported(tmp_path)
    result = CliRunner().invoke(main, ["report", str(tmp_path / "out"), "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "choose another file" in result.stderr
