"""What the commands print for people; ``--json`` prints the same facts for programs."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import markup
from rich.console import Console
from rich.table import Table

from batchinfer.audit import Finding, Remark, VerifyReport
from batchinfer.cluster.prepare import Preparation
from batchinfer.cluster.result import JobResult
from batchinfer.live_table import replica_table
from batchinfer.records import COMPLETION, FINISH_REASON, ROW_ID
from batchinfer.redact import redact
from batchinfer.report import Status
from batchinfer.telemetry import amiss, duration, shown, time_left

_MAX_NAMED = 10
_MAX_PROMPT_CHARACTERS = 200
_MAX_COMPLETION_CHARACTERS = 600


def escape(text: str) -> str:
    """Text from outside for the console: neither rich's markup nor a terminal's commands."""
    return markup.escape("\n".join(map(shown, text.split("\n"))))


def print_result(result: JobResult) -> None:
    """The summary table at the end of a run, and the way on."""
    console = _console()
    if not result.run_id:
        console.print(
            f"{escape(result.output)}: everything is committed already: {result.num_rows:,} rows in "
            f"{result.num_units:,} units{_dead_letters(result.num_dead_letters)}.",
            soft_wrap=True,
        )
        return
    console.print(f"[bold]{escape(result.output)}[/bold]: {_OUTCOMES[result.outcome]}", soft_wrap=True)
    table = _facts()
    before = f" ({result.num_rows_committed_before:,} by earlier runs)" if result.num_rows_committed_before else ""
    table.add_row("rows committed", f"{result.num_rows_committed:,} of {result.num_rows:,}{before}")
    table.add_row("units committed", f"{result.num_units_committed:,} of {result.num_units:,}")
    if result.num_dead_letters:
        by_type = ", ".join(f"{name} {count:,}" for name, count in sorted(result.dead_letters_by_type.items()))
        table.add_row("dead letters", f"{result.num_dead_letters:,}{f' ({by_type})' if by_type else ''}")
    num_generated = result.num_completion_tokens - result.num_resumed_tokens
    rate = num_generated / result.generation_s if result.generation_s > 0 else 0.0
    quality = amiss(result.quality, result.num_completions).removeprefix(", ")
    table.add_row("completions", f"{result.num_completions:,}{f' ({quality})' if quality else ''}")
    if result.num_shared_sequences:
        table.add_row("shared", f"{result.num_shared_sequences:,} sequences: generated once for identical greedy rows")
    table.add_row("prompt tokens", f"{result.num_prompt_tokens:,}")
    resumed = f", {result.num_resumed_tokens:,} of them from journals" if result.num_resumed_tokens else ""
    table.add_row("completion tokens", f"{result.num_completion_tokens:,} ({rate:,.0f}/s{resumed})")
    start_s = result.elapsed_s - result.generation_s
    table.add_row("time", f"{duration(result.elapsed_s)} ({duration(start_s)} until the first replica was ready)")
    if result.num_replicas_died:
        table.add_row("replicas died", f"{result.num_replicas_died}")
    table.add_row("run", result.run_id)
    console.print(table)
    for unit in result.given_up[:_MAX_NAMED]:
        where = f"unit {unit.unit_id} of {escape(unit.shard)}"
        console.print(f"[red]not committed[/red] {where}: {escape(unit.error)}", soft_wrap=True)
    for path in result.unreadable_shards[:_MAX_NAMED]:
        console.print(f"[red]unreadable shard[/red] {escape(path)}: none of its rows was planned", soft_wrap=True)
    if result.outcome == "unfinished":
        console.print("Run the same command again to try what is left.")
    if result.num_dead_letters:
        console.print(
            f"Dead letters, each with its input row and the reason: {escape(result.output)}/errors", soft_wrap=True
        )


def print_retry(result: JobResult) -> None:
    """What became of an output's dead letters, and the way on."""
    console = _console()
    where = escape(result.output)
    if not result.run_id:
        console.print(f"{where}: nothing to try{_dead_letters_left(result.num_dead_letters)}.", soft_wrap=True)
    else:
        console.print(f"[bold]{where}[/bold]: {result.num_completions:,} new completions", soft_wrap=True)
        table = _facts()
        by_type = ", ".join(f"{name} {count:,}" for name, count in sorted(result.dead_letters_by_type.items()))
        table.add_row("dead letters left", f"{result.num_dead_letters:,}{f' (tried: {by_type})' if by_type else ''}")
        table.add_row("completion tokens", f"{result.num_completion_tokens:,}")
        table.add_row("time", duration(result.elapsed_s))
        table.add_row("run", result.run_id)
        console.print(table)
    for unit in result.given_up[:_MAX_NAMED]:
        console.print(f"[red]not tried[/red] unit {unit.unit_id}: {escape(unit.error)}", soft_wrap=True)
    num_missing = result.num_units - result.num_units_committed - len(result.given_up)
    if num_missing > 0:
        console.print(f"{num_missing:,} units were never committed: `batchinfer run` generates those.")


def print_plan(preparation: Preparation) -> None:
    """What ``run`` would do."""
    spec, plan = preparation.spec, preparation.plan
    console = _console()
    beginning = "begins a new output" if preparation.is_new else "continues"
    console.print(f"[bold]{escape(spec.name)}[/bold]: {beginning} at {escape(str(preparation.output))}", soft_wrap=True)
    table = _facts()
    model = escape(redact(spec.model.path))
    table.add_row("model", f"{model} ({spec.model.dtype}, up to {preparation.facts.max_model_len:,} tokens)")
    table.add_row("input", escape(", ".join(redact(path) for path in spec.input.paths)))
    table.add_row("shards", f"{len(plan.shards):,}")
    table.add_row("rows", f"{plan.num_rows:,}")
    table.add_row("units", f"{len(plan.units):,} of up to {spec.execution.rows_per_unit:,} rows")
    table.add_row("committed", f"{preparation.num_units_committed:,} units, {preparation.num_rows_committed:,} rows")
    table.add_row("to generate", f"{len(preparation.pending):,} units, {_num_pending_rows(preparation):,} rows")
    if preparation.num_dead_letters:
        table.add_row("dead letters", f"{preparation.num_dead_letters:,}")
    table.add_row("passed through", escape(", ".join(preparation.facts.output_columns)) or "no column")
    table.add_row("fingerprint", preparation.fingerprint.digest)
    console.print(table)
    for shard in plan.unreadable[:_MAX_NAMED]:
        console.print(f"[red]unreadable shard[/red] {escape(shard.path)}: {escape(shard.error)}", soft_wrap=True)
    if preparation.superseded:
        console.print(
            f"[yellow]{len(preparation.superseded)} committed units[/yellow] belong to shards that have changed; their "
            "parts would move to _job/superseded.",
            soft_wrap=True,
        )


def plan_json(preparation: Preparation) -> dict[str, object]:
    """The same facts for ``plan --json``."""
    plan = preparation.plan
    return {
        "name": preparation.spec.name,
        "output": str(preparation.output),
        "is_new": preparation.is_new,
        "fingerprint": preparation.fingerprint.digest,
        "max_model_len": preparation.facts.max_model_len,
        "num_shards": len(plan.shards),
        "num_rows": plan.num_rows,
        "num_units": len(plan.units),
        "num_units_committed": preparation.num_units_committed,
        "num_rows_committed": preparation.num_rows_committed,
        "num_units_pending": len(preparation.pending),
        "num_rows_pending": _num_pending_rows(preparation),
        "num_dead_letters": preparation.num_dead_letters,
        "output_columns": list(preparation.facts.output_columns),
        "superseded_units": list(preparation.superseded),
        "unreadable_shards": [{"path": shard.path, "error": shard.error} for shard in plan.unreadable],
        "retired_shards": [shard.path for shard in plan.retired],
    }


def print_status(status: Status) -> None:
    """How far an output is."""
    console = _console()
    console.print(
        f"[bold]{escape(status.name)}[/bold] at {escape(status.output)}: {_STATES[status.state]}", soft_wrap=True
    )
    table = _facts()
    table.add_row("rows committed", f"{status.num_rows_committed:,} of {status.num_rows:,}")
    table.add_row("units committed", f"{status.num_units_committed:,} of {status.num_units:,}")
    by_type = dict(sorted(status.dead_letters_by_type.items(), key=lambda it: (-it[1], it[0])))
    causes = ", ".join(f"{escape(name)} {count:,}" for name, count in by_type.items())
    table.add_row("dead letters", f"{status.num_dead_letters:,}{f' ({causes})' if causes else ''}")
    unreadable = f" ({status.num_unreadable_shards:,} unreadable)" if status.num_unreadable_shards else ""
    table.add_row("shards", f"{status.num_shards:,}{unreadable}")
    table.add_row("fingerprint", status.fingerprint)
    if status.holder is not None:
        holder = status.holder
        table.add_row(
            "held by", f"run {holder.run_id}, host {holder.host}, process {holder.pid}, last beat {holder.heartbeat_at}"
        )
    if status.last_run is not None:
        run = status.last_run
        table.add_row(
            "last run",
            f"{run.run_id}: {run.num_units_committed:,} units, {run.num_completion_tokens:,} tokens "
            f"({run.completion_tokens_per_s:,.0f}/s), {run.num_replicas_died} replicas died, "
            f"{run.num_unit_failures} unit failures{amiss(run.quality, run.num_completions)}; "
            f"{f'drained for {run.stop_reason}; ' if run.stop_reason else ''}{run.last_event} at {run.last_event_at}",
        )
    now = status.run_now
    if now is not None:
        rates = ""
        if now.prompt_tokens_per_s is not None and now.completion_tokens_per_s is not None:
            rates = f"{now.prompt_tokens_per_s:,.0f} in {now.completion_tokens_per_s:,.0f} out tok/s, "
        table.add_row("now", f"{rates}{now.num_units_in_flight:,} units in flight")
        if now.eta_s is not None:
            table.add_row("time left", time_left(now.eta_s, now.eta_range_s))
    console.print(table)
    if now is not None and now.replicas:
        console.print(replica_table(now.replicas, console.width))


def print_verification(report: VerifyReport) -> None:
    """The verdict, and what led to it."""
    console = _console()
    console.print(f"[bold]{escape(report.output)}[/bold]: {_VERDICTS[report.verdict]}", soft_wrap=True)
    table = _facts()
    table.add_row("planned rows", f"{report.num_rows:,} in {report.num_shards:,} shards")
    table.add_row("rows with completions", f"{report.num_rows_completed:,} ({report.num_completions:,} completions)")
    by_type = ", ".join(f"{name} {count:,}" for name, count in sorted(report.dead_letters_by_type.items()))
    table.add_row("dead letters", f"{report.num_dead_letters:,}{f' ({by_type})' if by_type else ''}")
    table.add_row("units committed", f"{report.num_units_committed:,} of {report.num_units:,}")
    if report.num_bytes_checked:
        table.add_row("checksums taken", f"{report.num_bytes_checked:,} bytes")
    console.print(table)
    _print_by_kind(console, report.findings, "red")
    _print_by_kind(console, report.remarks, "yellow")


def _print_by_kind(console: Console, found: Sequence[Finding] | Sequence[Remark], colour: str) -> None:
    """A few of each kind, and how many there are."""
    for kind, count in Counter(it.kind for it in found).items():
        console.print(f"[{colour}]{kind}[/{colour}]: {count:,}")
        for each in [it for it in found if it.kind == kind][:_MAX_NAMED]:
            console.print(f"  {shown(each.where)}: {shown(each.detail)}", soft_wrap=True, markup=False)
        if count > _MAX_NAMED:
            console.print(f"  and {count - _MAX_NAMED:,} more (--json names all)")


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """Prompt and completion of each row, long ones shortened."""
    console = _console()
    for row in rows:
        console.rule(f"{row.get(ROW_ID)}  {row.get(FINISH_REASON)}", align="left", style="dim")
        prompt = _shortened(_prompt_of(row), _MAX_PROMPT_CHARACTERS)
        completion = _shortened(str(row.get(COMPLETION)), _MAX_COMPLETION_CHARACTERS)
        console.print(prompt, style="cyan", markup=False)
        console.print(completion, markup=False)


_OUTCOMES = {
    "complete": "[green]every row is committed[/green]",
    "dead_letters": "[yellow]finished, dead letters remain[/yellow]",
    "unfinished": "[red]units remain[/red]",
}
_STATES = {
    "running": "[cyan]a run is working on it[/cyan]",
    "complete": "[green]every row is committed[/green]",
    "dead_letters": "[yellow]finished, dead letters remain[/yellow]",
    "unfinished": "[yellow]not finished, nobody is working on it[/yellow]",
}
_VERDICTS = {
    "complete": "[green]complete: every row is in the output exactly once[/green]",
    "complete_with_dead_letters": "[yellow]complete, with dead letters: every row is here once or in errors[/yellow]",
    "incomplete": "[yellow]incomplete: run again, which generates or mends what is named below[/yellow]",
    "damaged": "[red]damaged[/red]",
}


def _console() -> Console:
    """Text as it is: no colours by guess, and ``:smile:`` in a completion stays what the model wrote."""
    return Console(highlight=False, emoji=False)


def _facts() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _dead_letters_left(count: int) -> str:
    return f"; {count:,} dead letters stay as they are" if count else ": there is no dead letter"


def _dead_letters(count: int) -> str:
    return f", {count:,} of them dead letters" if count else ""


def _num_pending_rows(preparation: Preparation) -> int:
    return sum(unit.num_rows for unit in preparation.pending)


def _prompt_of(row: Mapping[str, object]) -> str:
    """The last user message, or the first text column: what a person would call the prompt."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content"))
    for name in ("prompt", "text", "question", "instruction"):
        if isinstance(row.get(name), str):
            return str(row[name])
    return next((value for name, value in row.items() if isinstance(value, str) and name != ROW_ID), "")


def _shortened(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else f"{text[: max_characters - 1]}…"
