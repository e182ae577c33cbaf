"""A job file becomes a JobSpec: YAML, ``--set`` overrides, ``${VAR}``, and errors that say where and what to do.

YAML is read by the rules of YAML 1.2's core schema (``yes`` is text, ``1e-3`` a number, dates are text). All problems
of a file are reported together, one line each.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from batchinfer.errors import SpecError
from batchinfer.job_problems import Draft, KeyPath, Place, add_validation_problems, put_at, real_path, value_at
from batchinfer.spec import JobSpec

_VARIABLE = re.compile(r"\$(?P<escape>\$\{)|\$\{(?!\{)(?P<name>[^}]*)\}?")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHOWN_CHARS = 60


def load_job(path: str | Path, overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> JobSpec:
    """Read a job file. ``overrides`` are ``a.b=value`` texts and win over the file; relative paths stay as written.

    ``environment`` resolves ``${VAR}`` (None = the process's own). Raises SpecError with one line per problem.
    """
    draft = Draft(source=str(path))
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpecError(f"{path}: the job file cannot be read: {reason}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start}); save the job file as UTF-8") from error
    try:
        node = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        line = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        hint = "; put quotes around values with ${...} or {{...}}" if "${" in line or "{{" in line else ""
        raise SpecError(f"{place}: not valid YAML: {error.problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if node is None:
        raise SpecError(f"{path}: the file is empty; a job needs at least model, input, prompt and output")
    if not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{path}: expected keys (model, input, prompt, output, ...) at the top of the file")
    values = _Builder(draft).value(node, (), ())
    if isinstance(values, dict):
        draft.values = values
    return _finish(draft, overrides, environment)


def parse_job(
    values: Mapping[str, object], overrides: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> JobSpec:
    """The same from a mapping instead of a file, overrides and ``${VAR}`` included; ``values`` is unchanged."""
    draft = Draft(source="")
    draft.values = {str(key): _plain(value) for key, value in values.items()}
    return _finish(draft, overrides, environment)


def _finish(draft: Draft, overrides: Sequence[str], environment: Mapping[str, str] | None) -> JobSpec:
    for index, override in enumerate(overrides):
        _apply_override(draft, index, override)
    _expand(draft, draft.values, (), os.environ if environment is None else environment)
    _fill_empty_blocks(JobSpec, draft.values)
    try:
        spec = _validated(draft)
    except ValidationError as error:
        add_validation_problems(draft, error)
        raise draft.error() from None
    if draft.problems:
        raise draft.error()
    return spec


def _validated(draft: Draft) -> JobSpec:
    """A value that is one ``${VAR}`` is text wherever text will do; elsewhere it is read as an unquoted YAML word."""
    try:
        return JobSpec.model_validate(draft.values)
    except ValidationError as error:
        variables = {real_path(draft.values, detail) for detail in error.errors()} & set(draft.written)
        if not any(_is_one_variable(draft.written[path]) for path in variables):
            raise
    for path in variables:
        text = value_at(draft.values, path)
        if isinstance(text, str) and _is_one_variable(draft.written[path]):
            put_at(draft.values, path, _plain_scalar(text))
    return JobSpec.model_validate(draft.values)


# YAML --------------------------------------------------------------------------------------------------------------


class _JobLoader(yaml.SafeLoader):
    """Composes nodes with the implicit types of YAML 1.2's core schema alone (https://yaml.org/spec/1.2.2/#103-core-schema)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own attribute)


_NULL, _BOOL, _INT, _FLOAT, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_SCALARS = (
    (_NULL, re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    (_INT, re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        list("-+0123456789."),
    ),
)
for _tag, _pattern, _first in _SCALARS:
    _JobLoader.add_implicit_resolver(_tag, _pattern, _first)


def _compose(text: str) -> yaml.Node | None:
    loader = _JobLoader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


class _Builder:
    """Nodes to plain values, noting the place of every key and list item in the draft."""

    def __init__(self, draft: Draft, place: Place | None = None) -> None:
        self._draft = draft
        self._place = place

    def value(self, node: yaml.Node, path: KeyPath, ancestors: tuple[yaml.Node, ...]) -> object:
        if node in ancestors:
            self._draft.add(path, "an alias may not refer to the block it stands in")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, (*ancestors, node))
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self._note((*path, index), item)
                items.append(self.value(item, (*path, index), (*ancestors, node)))
            return items
        if node.tag not in (_NULL, _BOOL, _INT, _FLOAT, _TEXT):
            self._draft.add(path, f"the YAML tag {node.tag} is not allowed; write a plain value")
            return None
        return _scalar(node.tag, node.value)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, ancestors: tuple[yaml.Node, ...]) -> dict[str, object]:
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if key_node.tag != _TEXT or not isinstance(key, str):
                self._note((*path, "?"), key_node)
                self._draft.add((*path, "?"), "keys must be plain text; put quotes around this one")
                continue
            if key in values:
                first = self._draft.place_of((*path, key)).text
                self._note((*path, key), key_node)
                self._draft.add((*path, key), f"the key is given twice (first at {first}); keep one")
                continue
            self._note((*path, key), key_node)
            values[key] = self.value(value_node, (*path, key), ancestors)
        return values

    def _note(self, path: KeyPath, node: yaml.Node) -> None:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        self._draft.places[path] = self._place or Place((line, column), f"{self._draft.source}:{line}:{column}")


def _scalar(tag: str, text: str) -> object:
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    if tag == _INT:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _plain_scalar(text: str) -> object:
    """What an unquoted YAML word means: null, true, a number, or the text itself."""
    return next((_scalar(tag, text) for tag, pattern, _ in _SCALARS if pattern.match(text)), text)


# Overrides and variables -------------------------------------------------------------------------------------------


def _apply_override(draft: Draft, index: int, override: str) -> None:
    dotted, equals, text = override.partition("=")
    path: KeyPath = tuple(key.strip() for key in dotted.split("."))
    # A credential on the command line is not to come back in an error text.
    shown = f"{dotted}=..." if "storage_options" in path and equals else override
    place = Place((2**31, index), f"--set {shown}")
    if not equals or not all(path):
        message = "expected key=value, for example --set sampling.temperature=0.7"
        draft.problems.append((place, (), message))
        return
    block: dict[str, object] = draft.values
    for length in range(1, len(path)):
        inner = block.get(str(path[length - 1]))
        if inner is None:
            inner = {}
            block[str(path[length - 1])] = inner
            draft.places[path[:length]] = place
        if not isinstance(inner, dict):
            name = ".".join(str(key) for key in path[:length])
            draft.problems.append((place, path, f"{name} is a single value here and has no keys; set {name} itself"))
            return
        block = inner
    for known in [known for known in draft.places if known[: len(path)] == path]:
        del draft.places[known]
    draft.places[path] = place
    block[str(path[-1])] = _override_value(draft, path, place, text)


def _override_value(draft: Draft, path: KeyPath, place: Place, text: str) -> object:
    """Lists, blocks and quoted texts are YAML; anything else is one plain word of it, so ``*.parquet`` needs no quotes.

    ``{{`` and ``{%`` begin a Jinja template, not a YAML block.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")) or text.startswith(("{{", "{%", "{#")):
        return _plain_scalar(text)
    try:
        node = _compose(text)
    except yaml.YAMLError:
        node = None
    if node is None:
        draft.problems.append((place, path, "the value is not valid YAML; write a list as [a, b], a text as 'text'"))
        return None
    return _Builder(draft, place).value(node, path, ())


def _expand(draft: Draft, value: object, path: KeyPath, environment: Mapping[str, str]) -> None:
    """Replace ``${VAR}`` in every text below ``value``, in place; ``$${`` stands for a plain ``${``."""
    if isinstance(value, dict):
        paths = [(*path, key) for key in value]
    elif isinstance(value, list):
        paths = [(*path, index) for index in range(len(value))]
    else:
        return
    for here in paths:
        item = value[here[-1]]
        if isinstance(item, str) and "${" in item:
            value[here[-1]] = _expanded(draft, item, here, environment)
        else:
            _expand(draft, item, here, environment)


def _expanded(draft: Draft, text: str, path: KeyPath, environment: Mapping[str, str]) -> str:
    def replacement(match: re.Match[str]) -> str:
        if match["escape"]:
            return "${"
        name = match["name"]
        if not match[0].endswith("}") or not _VARIABLE_NAME.fullmatch(name):
            draft.add(path, f"{match[0][:_SHOWN_CHARS]!r} is no variable; write ${{NAME}}, or $${{ for a plain ${{")
            return match[0]
        draft.written[path] = text
        if name not in environment:
            draft.add(path, f"the environment variable {name} is not set; set it, or write $${{ for a plain ${{")
            return match[0]
        return environment[name]

    return _VARIABLE.sub(replacement, text)


def _is_one_variable(text: str) -> bool:
    return text.startswith("${") and text.endswith("}") and _VARIABLE_NAME.fullmatch(text[2:-1]) is not None


def _fill_empty_blocks(model: type[BaseModel], values: dict[str, object]) -> None:
    """``sampling:`` with every key commented out is null in YAML and an empty block to its author."""
    for name, info in model.model_fields.items():
        block = info.annotation
        if name in values and isinstance(block, type) and issubclass(block, BaseModel):
            if values[name] is None:
                values[name] = {}
            inner = values[name]
            if isinstance(inner, dict):
                _fill_empty_blocks(block, inner)


def _plain(value: object) -> object:
    """A copy of dicts and lists, which overrides and variables may then change."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
