"""Shell completion: the script a shell loads, and which values it offers behind an option."""

import click
from click.shell_completion import CompletionItem, get_completion_class

from batchinfer.errors import SpecError

#: What click looks for in the environment when a shell asks (click.shell_completion).
_VARIABLE = "_BATCHINFER_COMPLETE"
_PROGRAM = "batchinfer"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, files and keys of the job file.

    \b
    batchinfer completion bash > ~/.local/share/bash-completion/completions/batchinfer
    batchinfer completion zsh > ~/.zfunc/_batchinfer        # with fpath+=~/.zfunc before compinit
    batchinfer completion fish > ~/.config/fish/completions/batchinfer.fish
    """
    made = get_completion_class(shell)
    if made is None:
        raise SpecError(f"completion: click cannot complete {shell}; use bash, zsh or fish")
    click.echo(made(context.find_root().command, {}, _PROGRAM, _VARIABLE).source())


def complete_key(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Dotted keys of the job file, for ``--set``."""
    from batchinfer.spec import Block, JobSpec

    keys: list[str] = []
    for name, field in JobSpec.model_fields.items():
        block = field.annotation
        if isinstance(block, type) and issubclass(block, Block):
            keys += [f"{name}.{key}=" for key in block.model_fields]
        else:
            keys.append(f"{name}=")
    return [CompletionItem(key) for key in keys if key.startswith(incomplete)]
