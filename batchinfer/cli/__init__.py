"""The commands: parse arguments, call the library, print, end with the documented exit code.

0 every row committed · 1 finished, dead letters remain · 2 the job is wrong, a retry cannot help · 3 run it again.
Nothing heavy is imported until a command needs it.
"""

import click

from batchinfer import __version__
from batchinfer.cli import completion, jobs, outputs, submission


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchinfer")
def main() -> None:
    """Large offline generation jobs with EXAONE and other causal LMs.

    Prompts come from Parquet shards, completions go back to Parquet, every row exactly once, whatever dies on
    the way: after any crash, `run` again continues where the last one stood.
    """


for command in (
    jobs.run,
    jobs.retry_failed,
    jobs.plan,
    outputs.status,
    outputs.verify,
    outputs.show,
    outputs.report,
    outputs.export,
    completion.completion,
    submission.submit,
):
    main.add_command(command)
