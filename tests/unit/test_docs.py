"""What README and Makefile say is what there is: commands, job files, keys, defaults, exit codes, targets."""

import importlib.util
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import batchinfer
from batchinfer import errors
from batchinfer.cli import main
from batchinfer.job_file import load_job, parse_job
from batchinfer.spec import JobSpec

ROOT = Path(batchinfer.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
JOB_FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs").rglob("*.yaml"))

#: Keys for tests and tuning that the README's block leaves out.
NOT_IN_README = {"engine.fake"}
#: Keys whose value in the README is an example; in the spec they have no default, or an empty one.
EXAMPLES = {"name", "model.path", "input.path", "output.path", "prompt.messages", "prompt.system"}


def section(title: str) -> str:
    """The text under a heading of the README."""
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def job_block() -> str:
    return section("The job file").partition("```yaml\n")[2].partition("```")[0]


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, one level of blocks deep, as job files are."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and not prefix:
            flat |= flattened(value, f"{name}.")
        else:
            flat[prefix + name] = value
    return flat


def spec_keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default of every key of a block and the blocks in it."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if not prefix and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= spec_keys(field.annotation, f"{name}.")
        else:
            keys[prefix + name] = field.get_default(call_default_factory=True)
    return keys


# Commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_stands_in_the_table(name: str) -> None:
    argument = {"job": "JOB", "output": "OUTPUT", "shell": "SHELL"}[str(main.commands[name].params[0].name)]
    assert f"\n| `batchinfer {name} {argument}` | " in section("Commands")


def test_every_command_the_readme_names_exists() -> None:
    # A command, not the prose's "batchinfer's own code" nor `batchinfer/cli/`.
    named = set(re.findall(r"(?:^|`|-m )batchinfer ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= set(main.commands)


def test_every_option_the_readme_names_exists() -> None:
    benches = re.findall(r"`python (tests/bench/\w+\.py)([^`]*)`", README)
    assert len(benches) > 3
    for path, arguments in benches:
        script = (ROOT / path).read_text()
        assert all(f'"{option}"' in script for option in re.findall(r"--[a-z-]+", arguments)), path
    commands = re.sub(r"`(?:python tests/bench/[^`]*|--engine padded)`", "", README)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", commands))
    known = {option for command in main.commands.values() for param in command.params for option in param.opts}
    assert named >= {"--set", "--json", "--storage-options"}
    assert named <= known | {"--help"}


def test_the_library_example_uses_what_is_exported() -> None:
    named = set(re.findall(r"batchinfer\.([A-Za-z_]+)\b(?!\.py)", section("Commands").partition("From Python")[2]))
    assert named >= {"load_job", "run", "verify", "BatchinferError"}
    assert named <= set(batchinfer.__all__)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    rows = dict(re.findall(r"^\| (\d) \| (.+) \|$", section("Commands"), re.MULTILINE))
    assert set(rows) == {"0", "1", "2", "3"}
    assert "committed" in rows[str(errors.EXIT_COMPLETE)]
    assert "dead letters" in rows[str(errors.EXIT_DEAD_LETTERS)]
    assert "job itself is wrong" in rows[str(errors.EXIT_JOB_ERROR)]
    assert "run it again" in rows[str(errors.EXIT_RUN_AGAIN)]
    tree = {getattr(errors, name) for name in errors.__all__}
    assert {error.exit_code for error in tree if issubclass(error, errors.JobError)} == {errors.EXIT_JOB_ERROR}
    assert {error.exit_code for error in tree if not issubclass(error, errors.JobError)} == {errors.EXIT_RUN_AGAIN}


# Job files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", JOB_FILES)
def test_every_job_file_loads_and_is_linked(path: str) -> None:
    assert f"[`{path}`]({path})" in README
    assert load_job(ROOT / path).name == Path(path).stem


def test_every_job_file_named_anywhere_exists() -> None:
    named = set(re.findall(r"jobs/[\w/-]+\.yaml", README + MAKEFILE))
    for path in JOB_FILES:
        named |= set(re.findall(r"jobs/[\w/-]+\.yaml", (ROOT / path).read_text(encoding="utf-8")))
    assert named == set(JOB_FILES)


def test_the_job_block_of_the_readme_is_a_job() -> None:
    block = yaml.safe_load(job_block())
    spec = parse_job(block)
    assert spec.prompt.messages == "messages"
    assert set(block) == set(JobSpec.model_fields)


def test_every_key_stands_in_the_job_block() -> None:
    shown = set(flattened(yaml.safe_load(job_block())))
    # The sources that exclude each other stand there as comments.
    shown |= {f"prompt.{name}" for name in re.findall(r"^  # (\w+): ", job_block(), re.MULTILINE)}
    assert shown == set(spec_keys(JobSpec)) - NOT_IN_README


def test_the_values_shown_are_the_defaults() -> None:
    defaults = spec_keys(JobSpec)
    wrong = {
        name: (value, defaults[name])
        for name, value in flattened(yaml.safe_load(job_block())).items()
        if name not in EXAMPLES and value != defaults[name]
    }
    assert not wrong
    assert {name for name in EXAMPLES if defaults[name] is PydanticUndefined} == {
        "model.path",
        "input.path",
        "output.path",
    }


def test_the_choices_shown_are_all_there_are() -> None:
    """``# a | b | c`` beside a key of fixed choices."""
    for name in ("model.dtype", "model.device", "output.compression", "engine.kind"):
        block, key = name.split(".")
        model = typing.cast(type[BaseModel], JobSpec.model_fields[block].annotation)
        choices = typing.get_args(model.model_fields[key].annotation)
        shown = re.search(rf"^  {key}: \S+ +# (?P<choices>[\w |]+)", job_block(), re.MULTILINE)
        assert shown is not None, name
        assert [choice.strip() for choice in shown["choices"].split("|")] == list(choices), name


# Files, targets ----------------------------------------------------------------------------------------


def targets() -> dict[str, str]:
    """Target -> its line in the Makefile, for those a person types."""
    lines = re.findall(r"^([a-z]+):(.*)$", MAKEFILE, re.MULTILINE)
    return dict(lines)


def test_every_target_named_exists() -> None:
    named = set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)", README, re.MULTILINE))
    flat = {name for pair in named for name in pair if name}
    assert flat >= {"demo", "test", "lint", "bench"}
    assert flat <= set(targets())


def test_every_target_has_its_line_in_make_help_and_is_phony() -> None:
    assert {name for name, rest in targets().items() if "## " not in rest} == set()
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == set(targets())


def test_the_makefile_runs_modules_and_commands_that_exist() -> None:
    modules = set(re.findall(r"python -m (batchinfer[\w.]*)", MAKEFILE))
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    commands = set(re.findall(r"\$\(BIN\)/batchinfer ([a-z]+)", MAKEFILE))
    assert commands
    assert commands <= set(main.commands)


def test_every_path_the_readme_names_exists() -> None:
    rooms = re.findall(r"`((?:batchinfer|tests|docker|jobs)/[\w./-]*|\.ci/run)`", README)
    inside = re.findall(r"`((?:cluster|storage|engine|prompts)/(?:\w+\.py)?|[a-z_]+\.py)`", README)
    missing = [name for name in rooms if not (ROOT / name).exists()]
    missing += [name for name in inside if not (ROOT / "batchinfer" / name).exists()]
    assert len(rooms) > 5
    assert len(inside) > 10
    assert missing == []


def test_the_messages_to_look_up_are_those_that_are_written() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "batchinfer").rglob("*.py"))
    # A message that goes over several lines of source is one.
    written = re.sub(r'"\s*\n\s*f?"', "", sources)
    told = re.findall(r"^\| (`.+?`) \|", section("Troubleshooting"), re.MULTILINE)
    fragments = [fragment for cell in told for fragment in re.findall(r"`([^`]+)`", cell)]
    assert len(fragments) > 30
    assert [fragment for fragment in fragments if fragment not in written] == []
