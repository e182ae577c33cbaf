"""Shell completion, asked for as a shell does it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchinfer.cli import main


def completed(*words: str) -> list[str]:
    """What bash would offer for the last word."""
    environment = {
        **os.environ,
        "_BATCHINFER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("batchinfer", *words)),
        "COMP_CWORD": str(len(words)),
    }
    program = [sys.executable, "-c", "from batchinfer.cli import main; main(prog_name='batchinfer')"]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return [line.partition(",")[2] for line in ended.stdout.splitlines()]


def test_commands_options_and_keys_are_offered() -> None:
    assert completed("ver") == ["verify"]
    assert "--storage-options" in completed("status", "--")
    keys = completed("run", "job.yaml", "--set", "sampling.te")
    assert keys == ["sampling.temperature="]
    assert {"name=", "model.path=", "output.path="} <= set(completed("run", "job.yaml", "--set", ""))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_its_shell_can_read(shell: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["completion", shell])
    assert printed.exit_code == 0
    assert "_BATCHINFER_COMPLETE" in printed.output
    if program := shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(printed.output)
        subprocess.run([program, "-n", str(script)], check=True, timeout=60)
