"""The report as one self-contained HTML page, without network or scripts: numbers become words and shapes here."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from batchinfer.report.output_survey import Histogram, OutputSurvey
from batchinfer.report.run_history import ReplicaLife, RunHistory, RunSummary, Series
from batchinfer.report.run_report import RunReport

__all__ = [
    "Page",
    "footer_text",
    "length_histograms",
    "mapping",
    "plain",
    "rendered",
    "report_page",
    "throughput_charts",
]

_STATES = {
    "running": "running",
    "complete": "every row committed",
    "dead_letters": "finished, dead letters remain",
    "unfinished": "unfinished",
}
#: What an idle engine waited for, in words.
_IDLE = {
    "rows": "waiting for rows to be read and rendered",
    "next_turns": "waiting for next turns",
    "publishing": "waiting for parts to be published",
    "units": "without a unit",
    "": "waiting for work",
}
#: Rows of the tables of runs and lanes of replicas on the page.
_MAX_RUNS = 100
_MAX_LANES = 64


@dataclass(slots=True)
class Page:
    """What the template shows; empty parts are left out."""

    title: str
    subtitle: str
    footer: str
    state: str = ""
    state_text: str = ""
    notes: list[str] = field(default_factory=list)
    tiles: list[dict[str, str]] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    charts: list[dict[str, Any]] = field(default_factory=list)
    device: list[dict[str, Any]] = field(default_factory=list)
    lanes: list[dict[str, Any]] = field(default_factory=list)
    lanes_left_out: str = ""
    failures: list[dict[str, str]] = field(default_factory=list)
    histograms: list[dict[str, Any]] = field(default_factory=list)
    sample_note: str = ""
    dead_letters: list[dict[str, Any]] = field(default_factory=list)
    dead_letter_note: str = ""
    runs: list[dict[str, str]] = field(default_factory=list)
    runs_left_out: str = ""
    facts: list[dict[str, Any]] = field(default_factory=list)


def report_page(report: RunReport) -> str:
    """One output's report."""
    status, history, survey = report.status, report.history, report.survey
    page = Page(
        title=status.name,
        subtitle=status.output,
        footer=footer_text(report),
        state=status.state,
        state_text=_STATES[status.state],
        tiles=_tiles(report),
        charts=throughput_charts(history),
        device=_device_time(history),
        failures=[{"label": cause, "value": f"{n:,}"} for cause, n in history.failures_by_cause.most_common(20)],
        histograms=[*length_histograms(survey), *_quality(history)],
        runs=[_run_row(run) for run in history.runs[-_MAX_RUNS:]],
        facts=_facts(report),
    )
    if len(history.runs) > _MAX_RUNS:
        page.runs_left_out = f"The last {_MAX_RUNS} of {len(history.runs):,} runs."
    page.lanes = _lanes(history)
    if history.num_lives > len(page.lanes):
        page.lanes_left_out = f"The first {len(page.lanes)} of {history.num_lives:,} replica lives."
    page.sample_note = _of("completions", survey.num_parts_read, survey.num_parts)
    page.dead_letters = [
        {"name": cause.error_type, "num_rows": f"{cause.num_rows:,}", "examples": cause.examples}
        for cause in sorted(survey.dead_letters.values(), key=lambda it: -it.num_rows)
    ]
    page.dead_letter_note = _of("dead letters", survey.num_error_parts_read, survey.num_error_parts)
    if survey.num_unreadable:
        page.notes.append(f"{survey.num_unreadable} parts cannot be read: run `batchinfer verify` on the output.")
    return rendered(page)


def rendered(page: Page) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = files("batchinfer.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page)


def _tiles(report: RunReport) -> list[dict[str, str]]:
    status, history = report.status, report.history
    tiles = [
        ("Rows committed", f"{status.num_rows_committed:,} of {status.num_rows:,}"),
        ("Dead letters", f"{status.num_dead_letters:,}"),
        ("Tokens generated", _short(report.num_completion_tokens)),
        ("Prompt tokens", _short(report.num_prompt_tokens)),
        ("Generated tokens per second", _short(report.completion_tokens_per_s)),
        ("Running time", _duration(report.elapsed_s)),
        ("Device time", _duration(history.device_s)),
        ("Replicas died", f"{sum(run.num_replicas_died for run in history.runs):,}"),
    ]
    if num_shared := sum(run.num_shared_sequences for run in history.runs):
        tiles.append(("Identical sequences, not generated again", f"{num_shared:,}"))
    if report.cost is not None:
        tiles.append(("Cost", f"{report.cost:,.2f}"))
    if report.cost_per_million_tokens is not None:
        tiles.append(("Cost per million generated tokens", f"{report.cost_per_million_tokens:,.3f}"))
    return [{"label": label, "value": value} for label, value in tiles]


def throughput_charts(history: RunHistory) -> list[dict[str, Any]]:
    """Charts over running time: throughput, and where replicas reported, batch fill and KV use."""
    series = history.series
    if not series.buckets:
        return []
    caption = f"One point for each {_duration(series.width_s)} of running time"
    if len(history.runs) > 1:
        caption += f"; dashed lines are the starts of {len(history.runs):,} runs"
    charts = [
        _chart(
            "Throughput: tokens of committed units per second",
            history,
            [
                ("generated", "--accent", [it.num_completion_tokens / series.width_s for it in series.buckets]),
                ("prompt", "--accent-2", [it.num_prompt_tokens / series.width_s for it in series.buckets]),
            ],
            caption + ".",
        )
    ]
    if any(bucket.num_reports for bucket in series.buckets):
        charts.append(
            _chart(
                "Batch fill and KV cache use, percent",
                history,
                [
                    ("batch slots filled", "--accent", _carried(series, "batch_fill_sum")),
                    ("KV places used", "--accent-2", _carried(series, "kv_use_sum")),
                ],
                "Mean over the replicas that reported.",
                top=100.0,
            )
        )
    return charts


def _carried(series: Series, name: str) -> list[float]:
    """Means in percent; a bucket without a report shows the one before it."""
    values, last = [], 0.0
    for bucket in series.buckets:
        if bucket.num_reports:
            last = 100.0 * getattr(bucket, name) / bucket.num_reports
        values.append(last)
    return values


def _chart(
    title: str,
    history: RunHistory,
    lines: Sequence[tuple[str, str, Sequence[float]]],
    caption: str,
    top: float | None = None,
) -> dict[str, Any]:
    """Paths in a box of 1000 by 100, time to the right."""
    highest = top or max((max(values, default=0.0) for _, _, values in lines), default=0.0) or 1.0
    span_s = max(len(history.series.buckets) * history.series.width_s, 1e-9)
    drawn = []
    for label, colour, values in lines:
        step = 1000.0 / len(values)
        # Each bucket is a level, so that a single one is a line and not a point.
        points = [
            f"{x:.1f},{100.0 - 100.0 * min(value / highest, 1.0):.2f}"
            for index, value in enumerate(values)
            for x in (index * step, (index + 1) * step)
        ]
        path = "M" + " L".join(points)
        drawn.append({"label": label, "colour": colour, "path": path, "area": f"{path} L1000,100 L0,100 Z"})
    return {
        "title": title,
        "lines": drawn,
        "low": top is not None,
        "top": "100 %" if top else _short(highest),
        "middle": _duration(span_s / 2),
        "end": _duration(span_s),
        "run_starts": [f"{1000.0 * run.started_s / span_s:.1f}" for run in history.runs[1:_MAX_RUNS]],
        "caption": caption,
    }


def _device_time(history: RunHistory) -> list[dict[str, Any]]:
    seconds = [history.seconds(life) for life in history.lives]
    parts = [
        ("loading", "load", sum(it[0] for it in seconds)),
        ("generating", "busy", sum(it[1] for it in seconds)),
    ]
    parts += [
        (_IDLE[cause], f"idle {cause}", idle_s) for cause, idle_s in history.idle_s_by_cause().items() if idle_s > 0
    ]
    total_s = sum(part_s for _, _, part_s in parts)
    if total_s <= 0:
        return []
    return [
        {
            "label": label,
            "css": css,
            "percent": f"{100.0 * part_s / total_s:.2f}",
            "percent_text": f"{100.0 * part_s / total_s:.1f} %",
            "time": _duration(part_s),
        }
        for label, css, part_s in parts
    ]


def _lanes(history: RunHistory) -> list[dict[str, Any]]:
    span_s = max(history.end_s, 1e-9)
    ends = {run.run_id: run.ended_s for run in history.runs}
    return [_lane(life, ends.get(life.run_id, span_s), span_s, history) for life in history.lives[:_MAX_LANES]]


def _lane(life: ReplicaLife, run_end_s: float, span_s: float, history: RunHistory) -> dict[str, Any]:
    end_s = run_end_s if life.ended_s is None else life.ended_s
    ready_s = end_s if life.ready_s is None else life.ready_s

    def part(css: str, start_s: float, stop_s: float) -> dict[str, str]:
        left, width = 100.0 * start_s / span_s, max(0.1, 100.0 * (stop_s - start_s) / span_s)
        return {"css": css, "left": f"{left:.2f}", "width": f"{width:.2f}"}

    parts = [part("load", life.starting_s, ready_s)]
    if life.ready_s is not None:
        parts.append(part("busy", ready_s, end_s))
    marks = [
        f"{min(99.7, 100.0 * at_s / span_s):.2f}"
        for at_s, replica, _ in history.failures
        if replica == life.replica and life.starting_s <= at_s <= end_s
    ]
    what = f"{life.engine} on {life.node}, {life.num_units:,} units, {life.num_completion_tokens:,} tokens {life.error}"
    return {"name": f"{life.replica} {life.device}", "title": what, "parts": parts, "marks": marks[:20]}


def length_histograms(survey: OutputSurvey) -> list[dict[str, Any]]:
    """Bars of prompt and completion lengths, and of finish reasons; none where no part was read."""
    if not survey.completion_tokens.num_values:
        return []
    ends = sorted(survey.finish_reasons.items(), key=lambda it: -it[1])
    most = max(count for _, count in ends)
    return [
        _histogram("Prompt tokens", survey.prompt_tokens),
        _histogram("Completion tokens", survey.completion_tokens),
        {
            "title": "Finish reasons",
            "note": "",
            "bars": [
                {"label": name, "percent": f"{100.0 * count / most:.1f}", "value": f"{count:,}"} for name, count in ends
            ],
        },
    ]


def _quality(history: RunHistory) -> list[dict[str, Any]]:
    """Bars of what was amiss with completions; none where nothing was."""
    amiss = sum((run.quality for run in history.runs), start=Counter[str]())
    if not amiss:
        return []
    most = max(amiss.values())
    return [
        {
            "title": "Quality",
            "note": "completions that are empty, truncated, repeating or in the wrong script",
            "bars": [
                {"label": kind.replace("_", " "), "percent": f"{100.0 * count / most:.1f}", "value": f"{count:,}"}
                for kind, count in amiss.most_common()
            ],
        }
    ]


def _histogram(title: str, histogram: Histogram) -> dict[str, Any]:
    bars = histogram.bars()
    most = max((count for _, count in bars), default=0) or 1
    return {
        "title": title,
        "note": f"mean {histogram.mean:,.0f}, longest {histogram.longest:,}",
        "bars": [
            {"label": f"≤ {end:,}", "percent": f"{100.0 * count / most:.1f}", "value": f"{count:,}"}
            for end, count in bars
        ],
    }


def _run_row(run: RunSummary) -> dict[str, str]:
    rate = run.num_completion_tokens / run.elapsed_s if run.elapsed_s else 0.0
    end = run.outcome or "no word of its end"
    return {
        "run_id": run.run_id,
        "host": run.host,
        "end": f"{end}: {run.error}" if run.error else end,
        "took": _duration(run.elapsed_s),
        "units": f"{run.num_units:,}",
        "rows": f"{run.num_rows:,}",
        "tokens": _short(run.num_completion_tokens),
        "rate": _short(rate),
        "died": f"{run.num_replicas_died:,}",
    }


def _facts(report: RunReport) -> list[dict[str, Any]]:
    job = report.job
    groups = [
        ("Versions", job.get("versions")),
        ("Fingerprint", {"digest": report.status.fingerprint, **mapping(job.get("fingerprint_parts"))}),
        ("Job", job.get("spec")),
        ("Reproducibility", job.get("reproducibility")),
    ]
    return [
        {"title": title, "rows": [{"label": name, "value": plain(value)} for name, value in mapping(values).items()]}
        for title, values in groups
        if values
    ]


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one: job.json may lack anything."""
    return value if isinstance(value, dict) else {}


def plain(value: object) -> str:
    """A value of job.json as one line of text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of(what: str, num_read: int, num: int) -> str:
    return (
        f"From all {num:,} parts."
        if num_read == num
        else f"From {num_read:,} of {num:,} parts with {what}, evenly spread."
    )


def footer_text(report: RunReport) -> str:
    """Version, fingerprint and number of events."""
    version = mapping(report.job.get("versions")).get("batchinfer", "")
    return f"batchinfer {version} · fingerprint {report.status.fingerprint} · {report.history.num_events:,} events"


def _short(number: float) -> str:
    """Three figures and a unit: 12.3k, 4.56M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}" if unit != "k" else f"{number / 1e3:,.1f}k"
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:,.1f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
