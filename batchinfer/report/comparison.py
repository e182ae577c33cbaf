"""Two outputs side by side on one page."""

from collections.abc import Mapping
from typing import Any

from batchinfer.report.page import Page, footer_text, length_histograms, mapping, plain, rendered, throughput_charts
from batchinfer.report.run_report import RunReport

__all__ = ["comparison_page"]


def comparison_page(first: RunReport, second: RunReport) -> str:
    """Two outputs side by side; the ratio is the second to the first."""
    page = Page(
        title=f"{first.status.name} against {second.status.name}",
        subtitle=f"A: {first.status.output} · B: {second.status.output}",
        footer=footer_text(second),
        comparison={
            "names": ("A", "B"),
            "rows": _comparison_rows(first, second),
            "differences": _differences(first.job, second.job),
        },
    )
    for name, report in (("A", first), ("B", second)):
        for chart in throughput_charts(report.history)[:1]:
            page.charts.append({**chart, "title": f"{name}: {chart['title']}"})
        for histogram in length_histograms(report.survey):
            page.histograms.append({**histogram, "title": f"{name}: {histogram['title']}"})
    page.sample_note = "Over the parts that were read."
    return rendered(page)


def _comparison_rows(first: RunReport, second: RunReport) -> list[dict[str, str]]:
    #: Label, values, how they are written, and whether more is better (None: neither).
    rows: list[tuple[str, float | None, float | None, str, bool | None]] = [
        ("Rows committed", first.status.num_rows_committed, second.status.num_rows_committed, ",.0f", None),
        ("Dead letters", first.status.num_dead_letters, second.status.num_dead_letters, ",.0f", False),
        ("Generated tokens", first.num_completion_tokens, second.num_completion_tokens, ",.0f", None),
        ("Generated tokens/s", first.completion_tokens_per_s, second.completion_tokens_per_s, ",.1f", True),
        ("Running time, s", first.elapsed_s, second.elapsed_s, ",.1f", False),
        ("Device time, s", first.history.device_s, second.history.device_s, ",.1f", False),
        (
            "Completion tokens, mean",
            first.survey.completion_tokens.mean,
            second.survey.completion_tokens.mean,
            ",.1f",
            None,
        ),
        ("Replicas died", _died(first), _died(second), ",.0f", False),
        ("Cost per million tokens", first.cost_per_million_tokens, second.cost_per_million_tokens, ",.3f", False),
    ]
    return [_comparison_row(*row) for row in rows if row[1] is not None and row[2] is not None]


def _died(report: RunReport) -> int:
    return sum(run.num_replicas_died for run in report.history.runs)


def _comparison_row(
    label: str, a: float | None, b: float | None, form: str, more_is_better: bool | None
) -> dict[str, str]:
    assert a is not None
    assert b is not None
    verdict = ""
    if more_is_better is not None and a != b:
        verdict = "better" if (b > a) == more_is_better else "worse"
    ratio = f"{b / a:.2f}" if a else ""
    return {"label": label, "a": format(a, form), "b": format(b, form), "ratio": ratio, "verdict": verdict}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, str]]:
    ours, theirs = mapping(first.get("fingerprint_parts")), mapping(second.get("fingerprint_parts"))
    return [
        {"label": name, "a": plain(ours.get(name, "")), "b": plain(theirs.get(name, ""))}
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
