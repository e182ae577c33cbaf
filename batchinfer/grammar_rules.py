"""What ``sampling.json_schema`` and ``sampling.regex`` mean: the grammar they become, and which ones are refused.

Needs no tokenizer and no model. A grammar here is llguidance's own form of it, a text; what is made of it for a
tokenizer is ``engine.grammar``'s. Schemas and patterns may come from rows, so from anybody: what would take seconds or
gigabytes to compile is refused by its looks, and llguidance's limits bound the rest.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchinfer.records import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLParserLimits

#: Compiling a pattern takes time in the square of its length: 2,048 characters take up to 0.4 s.
_MAX_SCHEMA_CHARS = 65_536
_MAX_REGEX_CHARS = 2_048
#: Of all multipleOf of a schema together, in units of their last digit: each becomes an automaton of that many states.
_MAX_MULTIPLES = 20_000
#: Between values of a completion: what people and models write, and an end to it. llguidance's default has none, and a
#: model that likes blanks fills its budget with them.
_WHITE_SPACE = r"( ?|\n {0,20})"
_SHOWN_CHARS = 300

#: ``\d``, ``\w`` and ``\s`` as the characters that Python's ``re`` and Rust's regex agree on, and those that either
#: holds to be one: a completion matches whichever of the two it is checked with.
_AGREED = {"d": r"0-9", "w": r"\p{L}\p{Nd}_", "s": r" \t\n\r\f\v"}
_EITHER = {"d": r"\p{Nd}", "w": r"\w\p{N}", "s": r"\s\x1c-\x1f"}


def problem(params: SamplingParams) -> str:
    """What is wrong with the params' grammar, beginning with its key; empty when nothing is, or there is none.

    A grammar that passes may still be too large for llguidance's limits, which only compiling it tells.
    """
    if not params.has_grammar:
        return ""
    name = key_of(params)
    found = _looks(params)
    if found:
        return f"{name}: {found}"
    from llguidance import LLMatcher

    try:
        text = grammar(params)
    except ValueError as error:
        return f"{name}: {shown(str(error))}"
    is_wrong, remarks = LLMatcher.validate_grammar_with_warnings(text, None, limits=limits())
    return f"{name}: {shown(remarks[0])}" if is_wrong else ""


def refuse(params: SamplingParams) -> str:
    """As :func:`problem`, for an engine that cannot hold to any grammar."""
    if not params.has_grammar:
        return ""
    return f"{key_of(params)}: the fake engine, and a model without a tokenizer.json, cannot be held to a grammar"


def key_of(params: SamplingParams) -> str:
    """Under which key of ``sampling`` the params' grammar is."""
    return "regex" if params.regex is not None else "json_schema"


def grammar(params: SamplingParams) -> str:
    """llguidance's grammar of params that have one. Raises ValueError for a schema that is no JSON."""
    from llguidance import LLMatcher

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(_in_both_dialects(params.regex))
    assert params.json_schema is not None
    # Over anything that a schema says in "x-guidance": lenient would ignore what cannot be held, oneOf become anyOf.
    return LLMatcher.grammar_from_json_schema(
        params.json_schema,
        overrides={"whitespace_pattern": _WHITE_SPACE, "lenient": False, "coerce_one_of": False},
    )


def limits() -> "LLParserLimits":
    """How much work and memory one grammar may take, in llguidance's units; about 50 ms a step at the very worst."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        # 1 to 2 kB each.
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        # Its time is not bounded by the fuel.
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def shown(error: str) -> str:
    """An error text of llguidance on one line, short enough for a column."""
    line = " ".join(error.replace("<non-verbose/>", "").split())
    return line if len(line) <= _SHOWN_CHARS else f"{line[:_SHOWN_CHARS]}..."


def _looks(params: SamplingParams) -> str:
    """What a look at the text forbids."""
    if params.regex is not None:
        if len(params.regex) > _MAX_REGEX_CHARS:
            return f"{len(params.regex):,} characters are more than the {_MAX_REGEX_CHARS:,} that a pattern may have"
        return ""
    assert params.json_schema is not None
    if len(params.json_schema) > _MAX_SCHEMA_CHARS:
        return f"{len(params.json_schema):,} characters are more than the {_MAX_SCHEMA_CHARS:,} that a schema may have"
    members = list(_members(json.loads(params.json_schema)))
    num_pattern_chars = sum(len(value) for key, value in members if key == "pattern" and isinstance(value, str))
    num_pattern_chars += sum(
        len(name) for key, value in members if key == "patternProperties" and isinstance(value, dict) for name in value
    )
    if num_pattern_chars > _MAX_REGEX_CHARS:
        return f"its patterns have {num_pattern_chars:,} characters, more than the {_MAX_REGEX_CHARS:,} they may have"
    multiples = sum(_states(value) for key, value in members if key == "multipleOf" and isinstance(value, int | float))
    if multiples > _MAX_MULTIPLES:
        return f"its multipleOf add up to {multiples:,.0f}, more than the {_MAX_MULTIPLES:,} that can be held"
    return ""


def _members(value: object) -> Iterator[tuple[str, object]]:
    """Every member of every object inside. Its depth is bounded by what the JSON reader takes."""
    inner: list[object] = [value]
    while inner:
        here = inner.pop()
        if isinstance(here, dict):
            yield from here.items()
            inner.extend(here.values())
        elif isinstance(here, list):
            inner.extend(here)


def _states(multiple: float) -> float:
    digits = repr(abs(multiple))
    num_decimals = len(digits.partition(".")[2]) if "e" not in digits else 0
    return abs(multiple) * 10.0 ** (num_decimals if not digits.endswith(".0") else 0)


def _in_both_dialects(pattern: str) -> str:
    """The pattern with ``\\d``, ``\\w``, ``\\s`` and their opposites spelt out; nothing else of it changes."""
    out: list[str] = []
    # Of the classes that are open here: whether each is negated.
    negated: list[bool] = []
    index = 0
    while index < len(pattern):
        char = pattern[index]
        escape = pattern[index : index + 2]
        if char == "\\" and len(escape) == 2:
            kind = escape[1]
            out.append(_spelt_out(kind, fewest=sum(negated) % 2 == 0) if kind.lower() in _AGREED else escape)
            index += 2
            continue
        if char == "[":
            is_negated = pattern[index + 1 : index + 2] == "^"
            negated.append(is_negated)
            opening = char + "^" * is_negated
            # A bracket in the first place is a character.
            if pattern[index + len(opening) : index + len(opening) + 1] == "]":
                opening += "]"
            out.append(opening)
            index += len(opening)
            continue
        if char == "]" and negated:
            negated.pop()
        out.append(char)
        index += 1
    return "".join(out)


def _spelt_out(kind: str, *, fewest: bool) -> str:
    """A class for the letter of an escape; capitals mean all other characters."""
    lower = kind.lower()
    if kind == lower:
        return f"[{(_AGREED if fewest else _EITHER)[lower]}]"
    return f"[^{(_EITHER if fewest else _AGREED)[lower]}]"
