"""Commands that take an output: status, verify, show, report, export."""

import json
from pathlib import Path
from typing import cast

import click

from batchinfer.cli.exit_codes import ending_with_exit_codes
from batchinfer.cli.options import JSON, OUTPUT, STORAGE_OPTIONS, storage_options_of
from batchinfer.errors import SpecError


@click.command()
@OUTPUT
@STORAGE_OPTIONS
@JSON
@ending_with_exit_codes
def status(output: str, storage_options: str, as_json: bool) -> int:
    """Show how far OUTPUT is and who works on it, from its files alone.

    \b
    batchinfer status s3://bucket/answers

    Always exits with 0 if it can read them.
    """
    from batchinfer.cli_text import print_status
    from batchinfer.report import read_status

    found = read_status(output, storage_options_of(storage_options))
    if as_json:
        click.echo(json.dumps(found.as_json()))
    else:
        print_status(found)
    return 0


@click.command()
@OUTPUT
@STORAGE_OPTIONS
@click.option("--deep", is_flag=True, help="Read every byte: checksums, values, journals, and the input's footers.")
@click.option(
    "--input-storage-options",
    default="{}",
    metavar="JSON",
    help="With --deep: options for the input's file system, as in the job file's input.storage_options.",
)
@JSON
@ending_with_exit_codes
def verify(output: str, storage_options: str, deep: bool, input_storage_options: str, as_json: bool) -> int:
    """Prove that every planned row is in OUTPUT exactly once, from its files alone.

    \b
    batchinfer verify answers/
    batchinfer verify answers/ --deep

    Exits with 0 when it is, 1 when the rest are dead letters, 2 when the output is damaged, and 3 when units are
    not committed yet, or a run has to mend what a crash left.
    """
    from batchinfer import audit
    from batchinfer.cli_text import print_verification

    options, input_options = storage_options_of(storage_options), storage_options_of(input_storage_options)
    report = audit.verify_deep(output, options, input_options) if deep else audit.verify(output, options)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        print_verification(report)
    return report.exit_code


@click.command()
@OUTPUT
@STORAGE_OPTIONS
@click.option("-n", "--rows", "num_rows", default=3, show_default=True, help="Rows to print.")
@JSON
@ending_with_exit_codes
def show(output: str, storage_options: str, num_rows: int, as_json: bool) -> int:
    """Print the first rows of OUTPUT: prompt and completion.

    \b
    batchinfer show answers/ -n 10
    """
    from batchinfer.cli_text import print_rows
    from batchinfer.report import read_rows

    rows = read_rows(output, storage_options_of(storage_options), num_rows)
    if as_json:
        click.echo(json.dumps({"rows": rows}, ensure_ascii=False, default=str))
    else:
        print_rows(rows)
    return 0


@click.command()
@OUTPUT
@click.argument("other", required=False)
@STORAGE_OPTIONS
@click.option(
    "-o", "--page", type=click.Path(path_type=Path), default="report.html", show_default=True, help="File to write."
)
@click.option(
    "--price-per-gpu-hour", type=click.FloatRange(min=0), help="What a replica's device costs an hour, in any currency."
)
@JSON
@ending_with_exit_codes
def report(
    output: str, other: str | None, storage_options: str, page: Path, price_per_gpu_hour: float | None, as_json: bool
) -> int:
    """Write a report of OUTPUT as one HTML page that needs no network; with OTHER, a page that compares both.

    \b
    batchinfer report answers/ --price-per-gpu-hour 2.5
    batchinfer report answers/monday answers/tuesday -o compared.html
    """
    from batchinfer.report.comparison import comparison_page
    from batchinfer.report.page import report_page
    from batchinfer.report.run_report import read_report

    options = storage_options_of(storage_options)
    first = read_report(output, options, price_per_gpu_hour)
    if other is None:
        html = report_page(first)
    else:
        html = comparison_page(first, read_report(other, options, price_per_gpu_hour))
    try:
        page.write_text(html, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--page {page}: cannot be written ({error.strerror}); choose another file") from error
    click.echo(json.dumps({"exit_code": 0, "page": str(page)}) if as_json else f"wrote {page}")
    return 0


@click.command()
@OUTPUT
@click.argument("target")
@click.option(
    "--format",
    "format_",
    type=click.Choice(
        ["parquet", "jsonl", "openai-batch", "mt-bench", "logickor", "arena-hard", "wildbench", "alpaca-eval"]
    ),
    default="parquet",
    show_default=True,
    help="openai-batch: output.jsonl and errors.jsonl. From mt-bench on: what that benchmark's judge reads.",
)
@click.option("--ordered", is_flag=True, help="Rows in the input's order; else part by part. Others always are.")
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier export in TARGET.")
@click.option("--generator", metavar="NAME", help="Who answered, for a judge. Default: the model's name.")
@click.option(
    "--tokenizer",
    metavar="DIRECTORY",
    help="openai-batch with log-probabilities: where tokenizer.json is. Default: the job's model.",
)
@STORAGE_OPTIONS
@click.option(
    "--target-storage-options",
    default="{}",
    metavar="JSON",
    help="Options for the target's file system, if it has any.",
)
@JSON
@ending_with_exit_codes
def export(
    output: str,
    target: str,
    format_: str,
    ordered: bool,
    overwrite: bool,
    generator: str | None,
    tokenizer: str | None,
    storage_options: str,
    target_storage_options: str,
    as_json: bool,
) -> int:
    """Copy OUTPUT's completions into the directory TARGET, in a form that others read.

    While it is under way, or if it dies, TARGET holds a file named _incomplete; the same command begins anew. Exits
    with 0 when every row is there, 1 when dead letters are missing, 3 when units are not committed yet.

    \b
    batchinfer export answers/ copy/ --format jsonl --ordered
    batchinfer export answers/ results/ --format openai-batch
    batchinfer export answers/ model_answer/ --format mt-bench --generator my-model
    """
    from batchinfer.export import Format
    from batchinfer.export import export as export_output

    result = export_output(
        output,
        target,
        cast("Format", format_),
        ordered=ordered,
        overwrite=overwrite,
        generator=generator,
        tokenizer=tokenizer,
        storage_options=storage_options_of(storage_options),
        target_options=storage_options_of(target_storage_options),
    )
    if as_json:
        click.echo(json.dumps(result.as_json()))
    else:
        missing = f"; {result.num_units_missing:,} units are not committed yet" if result.num_units_missing else ""
        click.echo(f"{result.num_completions:,} completions in {result.num_files:,} files in {result.target}{missing}")
    return result.exit_code
