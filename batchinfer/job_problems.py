"""A job on its way to a spec: its values, where each was written, and what is wrong with it in plain words."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from batchinfer.errors import SpecError
from batchinfer.spec import JobSpec

#: Keys and list positions from the top of the job file.
KeyPath = tuple[str | int, ...]

_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written; ``order`` sorts problems as a reader meets them."""

    order: tuple[int, int]
    text: str


@dataclass(slots=True)
class Draft:
    """A job on its way to a spec: plain values, where each was written, and what is wrong so far."""

    source: str
    values: dict[str, object] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    #: Values that came out of the environment, with the text as written: shown instead of the value.
    written: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[Place, KeyPath, str]] = field(default_factory=list)

    def place_of(self, path: KeyPath) -> Place:
        """The place of the key itself, or of the nearest block around it."""
        for length in range(len(path), 0, -1):
            place = self.places.get(path[:length])
            if place is not None:
                return place
        return Place((0, 0), self.source)

    def add(self, path: KeyPath, message: str) -> None:
        self.problems.append((self.place_of(path), path, message))

    def has_problem_at(self, path: KeyPath) -> bool:
        return any(path[: len(known)] == known for _, known, _ in self.problems if known)

    def error(self) -> SpecError:
        lines = []
        for place, path, message in sorted(self.problems, key=lambda problem: problem[0].order):
            dotted = ".".join(str(key) for key in path)
            named = "" if place.text.startswith(f"--set {dotted}=") else dotted
            lines.append(": ".join(text for text in (place.text, named, message) if text))
        return SpecError("\n".join(lines))


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "a list of at least {min_length} item",
}


def add_validation_problems(draft: Draft, error: ValidationError) -> None:
    """Note what pydantic found, one problem per key, unless that key has a problem already."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        by_path.setdefault(real_path(draft.values, detail), []).append(detail)
    for path, details in by_path.items():
        # A list item's own problem says more than "text was expected here", the other arm of the union.
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        if draft.has_problem_at(path) or (deeper and len(details[0]["loc"]) > len(path)):
            continue
        draft.add(path, _message(draft, path, details))


def _message(draft: Draft, path: KeyPath, details: list[ErrorDetails]) -> str:
    kind, context = details[0]["type"], details[0].get("ctx", {})
    if kind == "missing":
        return "missing; the job needs it and there is no default"
    if kind == "extra_forbidden":
        return f"unknown key; {_suggestion(path)}"
    if kind == "value_error":
        return str(context["error"])
    phrases = []
    for detail in details:
        template = _EXPECTED.get(detail["type"])
        phrases.append(template.format(**detail.get("ctx", {})) if template else detail["msg"])
    value = details[0]["input"]
    hint = "; put quotes around it" if kind == "string_type" and isinstance(value, int | float) else ""
    return f"expected {' or '.join(dict.fromkeys(phrases))}, got {_described(draft, path, value)}{hint}"


def _described(draft: Draft, path: KeyPath, value: object) -> str:
    if path in draft.written:
        return f"the value of {draft.written[path]}"
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if "storage_options" in path:
        return "a single value"
    if isinstance(value, bool):
        return str(value).lower()
    shown = repr(value)
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."


def _suggestion(path: KeyPath) -> str:
    """The key the author most likely meant: a close name in the same block, or the same name in another one."""
    block: type[BaseModel] = JobSpec
    for key in path[:-1]:
        annotation = block.model_fields[str(key)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            block = annotation
    name = str(path[-1])
    close = difflib.get_close_matches(name, block.model_fields, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    homes = [dotted for dotted in _dotted_names(JobSpec, "") if dotted.rpartition(".")[2] == name]
    if homes:
        return f"did you mean {' or '.join(repr(home) for home in homes)}?"
    return f"known keys here: {', '.join(block.model_fields)}"


def _dotted_names(model: type[BaseModel], prefix: str) -> list[str]:
    names = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += _dotted_names(info.annotation, f"{prefix}{name}.")
    return names


def real_path(values: Mapping[str, object], detail: ErrorDetails) -> KeyPath:
    """pydantic's location without the tags it adds for the arms of a union, which stand in no file."""
    path: list[str | int] = []
    here: object = values
    for key in detail["loc"]:
        if isinstance(here, dict) and (key in here or detail["type"] == "missing"):
            path.append(key)
            here = here.get(key)
        elif isinstance(here, list) and isinstance(key, int):
            path.append(key)
            here = here[key]
    return tuple(path)


def value_at(values: Mapping[str, object], path: KeyPath) -> object:
    """What ``path`` leads to; it exists."""
    here: object = values
    for key in path:
        if isinstance(here, dict):
            here = here.get(key)
        elif isinstance(here, list) and isinstance(key, int):
            here = here[key]
    return here


def put_at(values: dict[str, object], path: KeyPath, value: object) -> None:
    """Replace what ``path`` leads to; a path that leads nowhere changes nothing."""
    block, key = value_at(values, path[:-1]), path[-1]
    if isinstance(block, list):
        block[int(key)] = value
    elif isinstance(block, dict):
        block[key] = value
