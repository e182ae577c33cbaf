"""``prompt.template``: sandboxed Jinja over one row's columns, without loaders, with bounds on what a row may cost."""

from collections.abc import Mapping

from jinja2 import StrictUndefined, TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError

from batchinfer.errors import RowRejected, SpecError
from batchinfer.prompts.sandbox import BoundedEnvironment, short_error


class _NullPrinted(Exception):
    """The template printed a null, which would read "None" in the prompt."""


class _Environment(BoundedEnvironment):
    """A null in a prompt is a mistake of the input: the row is refused instead of reading "None"."""

    def printed(self, value: object) -> object:
        """``{{ value }}``. Raises _NullPrinted."""
        if value is None:
            raise _NullPrinted
        return super().printed(value)


class RowTemplate:
    """A compiled template. Raises SpecError, with ``key`` and the template's own line, for one that cannot work."""

    def __init__(self, source: str, *, key: str = "prompt.template") -> None:
        self._environment = _Environment(undefined=StrictUndefined)
        try:
            self._template, tree = self._environment.bounded(source)
        except TemplateSyntaxError as error:
            raise SpecError(f"{key}: line {error.lineno} of the template: {error.message}") from error
        except SecurityError as error:
            raise SpecError(f"{key}: {error}; write a simpler one") from error
        if next(meta.find_referenced_templates(tree), "") != "":
            raise SpecError(f"{key}: include, import and extends are not available; write it as one template")
        #: As the job file has it.
        self.source = source
        #: Every column the template may read, whichever way it runs; sorted.
        self.columns: tuple[str, ...] = tuple(sorted(meta.find_undeclared_variables(tree)))

    def render(self, row: Mapping[str, object]) -> str:
        """The text of one row. Raises RowRejected ("template_error", "null_prompt", "too_long")."""
        try:
            return self._environment.render(self._template, row)
        except RowRejected:
            raise
        except _NullPrinted:
            nulls = ", ".join(name for name in self.columns if row.get(name) is None)
            text = f"the template printed a null (null columns: {nulls or 'none, it is inside one'})"
            raise RowRejected("null_prompt", text) from None
        except Exception as error:  # a template may raise anything; it costs its row alone
            raise RowRejected("template_error", short_error(error)) from error
