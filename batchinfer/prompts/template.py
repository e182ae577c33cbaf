"""``prompt.template``: sandboxed Jinja over one row's columns, without loaders, with bounds on what a row may cost."""

import json
from collections.abc import Callable, Mapping

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchinfer.errors import RowRejected, SpecError

#: A rendered prompt above this is a dead letter before anything tokenises it; far above any model's context.
MAX_PROMPT_CHARS = 10_000_000
_MAX_POWER_BITS = 100_000
_SHOWN_CHARS = 200


class _NullPrinted(Exception):
    """The template printed a null, which would read "None" in the prompt."""


def _refuse_null(value: object) -> object:
    if value is None:
        raise _NullPrinted
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """Bounds the two operators that make something huge out of two small numbers; range() is bounded by jinja."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_POWER_BITS:
                raise SecurityError("the power is too large")
        elif operator == "*":
            for repeated, count in ((left, right), (right, left)):
                if not isinstance(repeated, str | list | tuple) or not isinstance(count, int):
                    continue
                if len(repeated) * count > MAX_PROMPT_CHARS:
                    raise SecurityError("the repetition is too long")
        operators: Mapping[str, Callable[[object, object], object]] = self.binop_table
        return operators[operator](left, right)


def _tojson(value: object, indent: int | None = None) -> str:
    """Plain JSON, as chat templates know it; jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class RowTemplate:
    """A compiled template. Raises SpecError, with the template's own line, for one that cannot work."""

    def __init__(self, source: str) -> None:
        environment = _Environment(undefined=StrictUndefined, finalize=_refuse_null, autoescape=False)
        environment.filters["tojson"] = _tojson
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(tree)
            names = meta.find_undeclared_variables(tree)
        except TemplateSyntaxError as error:
            raise SpecError(f"prompt.template: line {error.lineno} of the template: {error.message}") from error
        if next(meta.find_referenced_templates(tree), "") != "":
            raise SpecError("prompt.template: include, import and extends are not available; write it as one template")
        #: Every column the template may read, whichever way it runs; sorted.
        self.columns: tuple[str, ...] = tuple(sorted(names))

    def render(self, row: Mapping[str, object]) -> str:
        """The text of one row. Raises RowRejected ("template_error", "null_prompt", "too_long")."""
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(row):
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS:
                    raise RowRejected("too_long", f"the template wrote more than {MAX_PROMPT_CHARS:,} characters")
                pieces.append(piece)
        except RowRejected:
            raise
        except _NullPrinted:
            nulls = ", ".join(name for name in self.columns if row.get(name) is None)
            text = f"the template printed a null (null columns: {nulls or 'none, it is inside one'})"
            raise RowRejected("null_prompt", text) from None
        except Exception as error:  # a template may raise anything; it costs its row alone
            raise RowRejected("template_error", short_error(error)) from error
        return "".join(pieces)


def short_error(error: BaseException) -> str:
    """First line of a foreign error, bounded: the rest may quote the whole prompt."""
    lines = str(error).splitlines()
    text = lines[0][:_SHOWN_CHARS] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
