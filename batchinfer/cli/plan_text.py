"""What ``plan`` prints of prompts, memory and time; ``--json`` has the same facts for programs."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchinfer.cli_text import escape
from batchinfer.spec import ExecutionSpec
from batchinfer.survey.duplicates import Duplicates
from batchinfer.survey.estimate import Estimate
from batchinfer.survey.memory import MemoryFit
from batchinfer.survey.plan_survey import PlanSurvey
from batchinfer.survey.prompts import OnProgress, PromptSurvey
from batchinfer.survey.trial import Trial
from batchinfer.telemetry import duration

_BAR_CHARACTERS = 40
_MAX_SHARDS_NAMED = 10
_LOG_INTERVAL_S = 10.0


@contextmanager
def survey_progress() -> Iterator[OnProgress]:
    """Rows tokenised, on stderr: a bar on a terminal, a line every ten seconds elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_every(_LOG_INTERVAL_S)
        return
    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(num_done: int, num_rows: int) -> None:
            progress.update(task, completed=num_done, total=num_rows)
            if num_done >= num_rows:
                # What is printed next must not meet a bar that is being drawn.
                progress.stop()

        yield show


def _line_every(interval_s: float) -> OnProgress:
    due_s = time.monotonic() + interval_s

    def show(num_done: int, num_rows: int) -> None:
        nonlocal due_s
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + interval_s
            print(f"{num_done:,} of {num_rows:,} rows tokenised", file=sys.stderr)

    return show


def print_found(survey: PlanSurvey) -> None:
    """Prompts and memory, one block after the other."""
    console = _console()
    if survey.prompts is not None:
        _print_prompts(console, survey.prompts)
    if survey.memory is not None:
        _print_memory(console, survey.memory, survey.lengths)


def print_estimate(survey: PlanSurvey, execution: ExecutionSpec) -> None:
    """What the probe measured, and the time that all this comes to."""
    console = _console()
    if survey.trial is not None:
        _print_trial(console, survey.trial)
    if survey.estimate is not None:
        _print_estimate(console, survey.estimate, execution)
    else:
        console.print(f"[bold]time[/bold]: unknown: {survey.unknown}", soft_wrap=True)


def _console() -> Console:
    return Console(highlight=False, emoji=False)


def _print_prompts(console: Console, prompts: PromptSurvey) -> None:
    rows = "rows" if prompts.num_rows != 1 else "row"
    seen = (
        f"all {prompts.num_rows:,} {rows} left"
        if prompts.is_full
        else f"a sample of {prompts.num_rows_seen:,} of {prompts.num_rows:,} {rows} left, from "
        f"{prompts.num_ranges:,} places in {prompts.num_shards_seen:,} shards"
    )
    console.print(f"[bold]prompts[/bold]: {seen}")
    table = _facts()
    error = f" ± {prompts.mean_length_error:,.0f}" if prompts.mean_length_error is not None else ""
    shares = "".join(f", {percent} % up to {length:,}" for percent, length in prompts.percentiles().items())
    table.add_row("tokens", f"{prompts.mean_length:,.1f}{error} on average{shares}, longest {prompts.longest:,}")
    about = "" if prompts.is_full else "about "
    table.add_row(
        "in all",
        f"{about}{prompts.num_tokens_to_read * prompts.scale:,.0f} prompt tokens, "
        f"{about}{prompts.num_completions * prompts.scale:,.0f} completions",
    )
    table.add_row("duplicates", _duplicates(prompts.duplicates, prompts))
    console.print(table)
    _print_histogram(console, prompts)
    _print_dead_letters(console, prompts)


def _print_histogram(console: Console, prompts: PromptSurvey) -> None:
    bins = prompts.histogram()
    if not bins:
        return
    most = max(number for _, _, number in bins)
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 2))
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for shortest, longest, number in bins:
        # At least a mark where there is anything: the longest prompts are few, and what memory is needed for.
        bar = "█" * max(1, round(number / most * _BAR_CHARACTERS)) if number else ""
        table.add_row(f"{shortest:,} to {longest:,}", bar, f"{number:,}")
    console.print(table)


def _duplicates(duplicates: Duplicates, prompts: PromptSurvey) -> str:
    if not duplicates.num_rows:
        return "none"
    share = duplicates.num_duplicates / duplicates.num_rows
    tokens = duplicates.num_duplicate_tokens / max(1, prompts.num_tokens)
    found = "none"
    if duplicates.num_duplicates:
        greedy = duplicates.num_greedy_duplicates
        found = (
            f"{'about ' if duplicates.is_estimate else ''}{duplicates.num_duplicates:,} ({share:.1%}, {tokens:.1%} of "
            f"the tokens) repeat an earlier prompt{', all of them' if greedy == duplicates.num_duplicates else ''}"
            f"{'' if greedy == duplicates.num_duplicates else f', {greedy:,} of them'} greedy"
        )
    return found if prompts.is_full else f"{found}, within the sample, which cannot see most of them: --full counts all"


def _print_dead_letters(console: Console, prompts: PromptSurvey) -> None:
    by_type = prompts.dead_letters_by_type()
    if not by_type:
        return
    about = "" if prompts.is_full else "about "
    for error_type, number in sorted(by_type.items(), key=lambda item: -item[1]):
        seen = "" if prompts.is_full else f" ({number:,} in the sample)"
        console.print(
            f"[yellow]{escape(error_type)}[/yellow]: {about}{number * prompts.scale:,.0f} rows would be dead letters"
            f"{seen}",
            soft_wrap=True,
        )
        for example in prompts.examples.get(error_type, ())[:2]:
            console.print(f"  row {escape(example.row_id)}: {escape(example.error)}", soft_wrap=True)
    worst = sorted(prompts.dead_letters.items(), key=lambda item: -sum(item[1].values()))
    for path, types in worst[:_MAX_SHARDS_NAMED]:
        counts = ", ".join(f"{escape(name)} {number:,}" for name, number in sorted(types.items()))
        console.print(f"  shard {escape(path)}: {counts}", soft_wrap=True)
    if len(worst) > _MAX_SHARDS_NAMED:
        console.print(f"  and {len(worst) - _MAX_SHARDS_NAMED:,} more shards (--json names all)")


def _print_memory(console: Console, memory: MemoryFit, lengths: tuple[float, float] | None) -> None:
    weights = "unknown until they are on this machine"
    if memory.weights_bytes is not None:
        weights = _size(memory.weights_bytes)
    console.print(
        f"[bold]memory[/bold]: weights {weights} in {memory.dtype}, {_size(memory.kv_bytes_per_token)} of KV cache per "
        f"token, {memory.engine} engine",
        soft_wrap=True,
    )
    if not memory.fits:
        return
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("device", overflow="fold")
    table.add_column("fits")
    table.add_column("KV tokens", justify="right")
    if lengths is not None:
        table.add_column(f"sequences of {lengths[0]:,.0f}", justify="right")
        table.add_column(f"of {lengths[1]:,.0f} tokens", justify="right")
    for fit in memory.fits:
        device = fit.device
        name = f"{device.count} × {escape(device.name)}" if device.count > 1 else escape(device.name)
        row = [name, "[green]yes[/green]" if fit.fits else "[red]no[/red]", f"{fit.num_tokens:,}"]
        if lengths is not None:
            row += [f"{fit.num_sequences(length):,}" for length in lengths]
        table.add_row(*row)
    console.print(table)
    too_small = [fit for fit in memory.fits if not fit.fits and fit.num_tokens]
    if too_small:
        console.print(
            "  A device must hold one sequence of model.max_model_len tokens; lower that where it does not.",
            soft_wrap=True,
        )


def _print_trial(console: Console, trial: Trial) -> None:
    speed = trial.speed
    console.print(
        f"[bold]probe[/bold]: {escape(speed.device)}, {speed.engine} engine, loaded in {duration(trial.load_s)}: "
        f"{speed.prefill_tokens_per_s or 0:,.0f} prompt tokens/s read, {speed.decode_tokens_per_s or 0:,.0f} "
        f"tokens/s generated with {trial.num_sequences:,} of {trial.capacity:,} sequences at once",
        soft_wrap=True,
    )


def _print_estimate(console: Console, estimate: Estimate, execution: ExecutionSpec) -> None:
    work, speed = estimate.work, estimate.speed
    at_most = "at most " if work.is_upper_bound else "about "
    replicas = "one replica, whose number only the cluster knows"
    if estimate.num_replicas is not None:
        replicas = f"{estimate.num_replicas:,} replica{'s' if estimate.num_replicas != 1 else ''}"
    console.print(
        f"[bold]time[/bold]: {at_most}{_range(estimate.elapsed_s, duration)} on {replicas}, "
        f"{at_most}{_range(estimate.gpu_hours, _hours)} GPU hours"
        + (f", {at_most}{_range(estimate.cost, _money)} in all" if estimate.cost is not None else ""),
        soft_wrap=True,
    )
    table = _facts()
    source = "a probe" if speed.source == "probe" else "a run"
    rates = f"{speed.num_completion_tokens / speed.replica_s:,.0f} tokens/s generated per replica"
    if speed.prefill_tokens_per_s and speed.decode_tokens_per_s:
        rates = f"{speed.prefill_tokens_per_s:,.0f} prompt tokens/s read, {speed.decode_tokens_per_s:,.0f} generated"
    table.add_row("speed", f"of {source} on {escape(speed.device)}, {escape(speed.at)}: {rates}")
    lengths = {
        "max_new_tokens": "as long as sampling.max_new_tokens allows; most models stop earlier",
        "a run of this job": "as long as this job's last run made them",
        "probe": "as long as the probe made them",
        "given choices": "the given choices",
    }[work.lengths]
    table.add_row("completions", f"{work.num_completion_tokens:,.0f} tokens, {lengths}")
    if estimate.replica_s[0] != estimate.replica_s[1]:
        table.add_row("range", "what reading a prompt token costs is not known here; --probe measures it")
    console.print(table)
    allowed = execution.max_gpu_hours
    if allowed is not None and estimate.gpu_hours[0] > allowed and not work.is_upper_bound:
        console.print(
            f"[yellow]execution.max_gpu_hours {allowed:g}[/yellow] are less than that: the run would stop early.",
            soft_wrap=True,
        )


def _range(values: Sequence[float], shown: Callable[[float], str]) -> str:
    least, most = (shown(value) for value in values)
    return least if least == most else f"{least} to {most}"


def _hours(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _money(value: float) -> str:
    return f"{value:,.2f}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def _facts() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
