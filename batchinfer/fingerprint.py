"""What makes two jobs the same job: everything that changes the rows, and nothing that only changes the way to them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from batchinfer.records import FORMAT_VERSION
from batchinfer.redact import HIDDEN, redact
from batchinfer.spec import JobSpec

_SHOWN_CHARS = 72

#: Keys that came after format 1, with the value that means what jobs without them always meant. At that value they are
#: left out: an output begun before the key existed is still the same job's.
ADDED_KEYS: Mapping[str, object] = {
    "prompt.request": None,
    "prompt.sampling_template": None,
    "prompt.turns": None,
    "sampling.choices": [],
    "sampling.json_schema": None,
    "sampling.regex": None,
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``digest``: 16 hex digits over ``parts``, a flat map from dotted name to JSON text."""

    digest: str
    parts: dict[str, str]


def fingerprint(spec: JobSpec, model_identity: Mapping[str, str]) -> Fingerprint:
    """Fingerprint of a job whose model directory has this identity (content, not path).

    Left out on purpose, as they change no row: name, input paths, cluster, engine limits and the fake engine's
    speed and faults, execution, output path and compression, storage options.
    """
    prompt = spec.prompt.model_dump(mode="json")
    prompt["chat"] = spec.prompt.applies_chat_template
    prompt["control_tokens"] = spec.prompt.control_token_rule
    sampling = spec.sampling.model_dump(mode="json")
    # As text: a schema's members have an order, which completions follow.
    sampling["json_schema"] = spec.sampling.params().json_schema
    facts: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        **{f"model.{name}": value for name, value in model_identity.items()},
        "model.dtype": spec.model.dtype,
        "model.max_model_len": spec.model.max_model_len,
        "engine.fake": spec.engine.kind == "fake",
        **{f"prompt.{name}": value for name, value in prompt.items()},
        **{f"sampling.{name}": value for name, value in sampling.items()},
        "output.columns": spec.output.columns,
        "output.token_ids": spec.output.token_ids,
    }
    parts = {
        name: json.dumps(facts[name], ensure_ascii=False, sort_keys=True)
        for name in sorted(facts)
        if name not in ADDED_KEYS or facts[name] != ADDED_KEYS[name]
    }
    canonical = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return Fingerprint(digest=hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16], parts=parts)


def diff(old_parts: Mapping[str, str], new_parts: Mapping[str, str]) -> list[str]:
    """One readable line per difference between an output's parts (old) and a job's (new), sorted by name."""
    lines = []
    for name in sorted({*old_parts, *new_parts}):
        old, new = old_parts.get(name), new_parts.get(name)
        if old == new:
            continue
        if old is None or new is None:
            old_text = "absent" if old is None else _shorten(old, 0)
            new_text = "absent" if new is None else _shorten(new, 0)
        else:
            first = _first_difference(old, new)
            old_text, new_text = _shorten(old, first), _shorten(new, first)
        lines.append(f"{name}: {old_text} in the output, {new_text} in the job")
    return lines


def redacted_spec(spec: JobSpec) -> dict[str, object]:
    """The spec as JSON-able values for job.json: storage options keep their names only, URIs lose credentials."""
    values: dict[str, object] = _without_credentials(spec.model_dump(mode="json"))
    return values


def _without_credentials(block: dict[str, object]) -> dict[str, object]:
    clean: dict[str, object] = {}
    for name, value in block.items():
        if name == "storage_options" and isinstance(value, dict):
            clean[name] = dict.fromkeys(value, HIDDEN)
        elif isinstance(value, dict):
            clean[name] = _without_credentials(value)
        elif name in ("path", "address"):
            clean[name] = [redact(item) for item in value] if isinstance(value, list) else _redacted_path(value)
        else:
            clean[name] = value
    return clean


def _redacted_path(value: object) -> object:
    return redact(value) if isinstance(value, str) else value


def _first_difference(old: str, new: str) -> int:
    for position, (left, right) in enumerate(zip(old, new, strict=False)):
        if left != right:
            return position
    return min(len(old), len(new))


def _shorten(text: str, around: int) -> str:
    """A window of ``text`` that shows position ``around``; texts that fit are whole."""
    if len(text) <= _SHOWN_CHARS:
        return text
    start = min(max(0, around - _SHOWN_CHARS // 3), len(text) - _SHOWN_CHARS)
    end = start + _SHOWN_CHARS
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
