"""What the live view draws of one look at a run: the bar, the numbers under it, and a line for each replica."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchinfer.telemetry import ReplicaLook, ReplicaState, RunProgress, amiss, duration, engine_use, shown, time_left

#: More replicas than this are summed up by state, and only the slowest are shown one by one.
MAX_LINES = 12
NUM_SLOWEST = 5
#: Below this width of the terminal a replica's line tells the essentials only, and below the next one less still.
WIDE = 100
NARROW = 70

_STATES: tuple[ReplicaState, ...] = ("running", "starting", "draining", "dead")
_STYLES: dict[ReplicaState, str] = {"running": "green", "starting": "dim", "draining": "yellow", "dead": "red"}
_MAX_CAUSES = 4


def live_table(progress: RunProgress, width: int) -> RenderableType:
    """Everything, for a terminal of ``width`` columns."""
    eta = Text("" if progress.eta_s is None else f"ETA {time_left(progress.eta_s, progress.eta_range_s)}", style="cyan")
    bar = Table.grid(padding=(0, 1))
    # Beside the bar where there is room, under it where there is not.
    bar.add_row(*_bar(progress, width), *([eta] if width >= WIDE else []))
    lines: list[RenderableType] = [bar]
    if width < WIDE and eta:
        lines.append(eta)
    lines += [_rates(progress), _units(progress)]
    if progress.num_dead_letters:
        lines.append(_dead_letters(progress))
    if quality := amiss(progress.quality, progress.num_completions).removeprefix(", "):
        lines.append(Text(f"completions: {quality}", style="dim"))
    if progress.replicas:
        lines.append(replica_table(progress.replicas, width))
    return Group(*lines)


def _bar(progress: RunProgress, width: int) -> list[RenderableType]:
    num_done, num_rows = progress.num_rows_committed + progress.num_rows_finished, progress.num_rows
    share = f"{num_done / num_rows:.0%} " if num_rows else ""
    return [
        ProgressBar(total=num_rows or None, completed=num_done, width=max(10, min(40, width // 4))),
        Text(f"{share}{num_done:,} of {num_rows:,} rows"),
    ]


def _rates(progress: RunProgress) -> Text:
    return Text(
        f"{progress.prompt_tokens_per_s:,.0f} in {progress.completion_tokens_per_s:,.0f} out tok/s"
        f"{engine_use(progress.engines)}, running {duration(progress.elapsed_s)}"
    )


def _units(progress: RunProgress) -> Text:
    given_up = f", {progress.num_units_given_up:,} given up" if progress.num_units_given_up else ""
    return Text(
        f"units: {progress.num_units_committed:,} of {progress.num_units:,} committed, "
        f"{progress.num_units_in_flight:,} in flight, {progress.num_units_pending:,} pending{given_up}"
    )


def _dead_letters(progress: RunProgress) -> Text:
    """Those of this run by cause, the most frequent first; earlier runs' are only counted."""
    by_type = sorted(progress.dead_letters_by_type.items(), key=lambda it: (-it[1], it[0]))
    causes = [f"{shown(name)} {count:,}" for name, count in by_type[:_MAX_CAUSES]]
    num_named = sum(count for _, count in by_type[:_MAX_CAUSES])
    if progress.num_dead_letters > num_named and causes:
        causes.append(f"others {progress.num_dead_letters - num_named:,}")
    told = f": {', '.join(causes)}" if causes else ""
    return Text(f"{progress.num_dead_letters:,} dead letters{told}", style="yellow")


def replica_table(replicas: Sequence[ReplicaLook], width: int) -> Table:
    """A line for each replica, or the sums by state and the slowest; for a terminal of ``width`` columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column("replica", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    if width >= WIDE:
        table.add_column("node", no_wrap=True, overflow="ellipsis", max_width=20)
        table.add_column("device", no_wrap=True, overflow="ellipsis", max_width=12)
    if width >= NARROW:
        table.add_column("in tok/s", justify="right", no_wrap=True)
    for heading in ("out tok/s", "batch", "KV", "idle", "units"):
        table.add_column(heading, justify="right", no_wrap=True)
    if width >= NARROW:
        table.add_column("preempted", justify="right", no_wrap=True)
    if len(replicas) <= MAX_LINES:
        for look in replicas:
            table.add_row(*_line(str(look.replica_id), look.state, [look], width))
        return table
    for state in _STATES:
        if those := [look for look in replicas if look.state == state]:
            table.add_row(*_line(f"{len(those):,}", state, those, width))
    running = [look for look in replicas if look.state == "running" and look.completion_tokens_per_s is not None]
    slowest = sorted(running, key=lambda look: (look.completion_tokens_per_s or 0.0, look.replica_id))[:NUM_SLOWEST]
    if slowest:
        table.add_row("", Text("slowest", style="dim"))
    for look in slowest:
        table.add_row(*_line(f"#{look.replica_id}", look.state, [look], width))
    return table


def _line(name: str, state: ReplicaState, looks: Sequence[ReplicaLook], width: int) -> list[RenderableType]:
    """One replica, or several summed up: rates, units and preemptions added, shares averaged."""
    cells: list[RenderableType] = [name, Text(state, style=_STYLES[state])]
    if width >= WIDE:
        cells += [_common(look.node for look in looks), _common(look.device for look in looks)]
    if width >= NARROW:
        cells.append(_sum(look.prompt_tokens_per_s for look in looks))
    cells += [
        _sum(look.completion_tokens_per_s for look in looks),
        _mean(look.batch_fill for look in looks),
        _mean(look.kv_use for look in looks),
        _mean(look.idle_share for look in looks),
        "" if state in ("starting", "dead") else f"{sum(look.num_units for look in looks):,}",
    ]
    if width >= NARROW:
        num_preemptions = sum(look.num_preemptions for look in looks)
        cells.append(f"{num_preemptions:,}" if num_preemptions else "")
    return cells


def _common(names: Iterable[str]) -> Text:
    """The name that all share, else how many there are."""
    distinct = {name for name in names if name}
    return Text(shown(distinct.pop()) if len(distinct) == 1 else f"{len(distinct):,} of them" if distinct else "")


def _sum(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known):,.0f}" if known else ""


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.0%}" if known else ""
