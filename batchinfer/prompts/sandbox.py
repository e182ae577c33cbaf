"""The Jinja that templates run in, a job's and a checkpoint's: no code, no files, and a bound on what one row may cost.

Jinja's own sandbox keeps a template from Python's internals; it does not keep it from looping for ever or from filling
the memory. Here every loop turn, call, filter and printed value draws on an allowance that each render starts with,
and the operations that make something huge out of two small things are refused before they run. The bound counts work,
not time, so a row's fate does not depend on the machine; a clock stands behind it for what no count sees.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from batchinfer.errors import RowRejected

__all__ = ["MAX_PROMPT_CHARS", "BoundedEnvironment", "short_error"]

#: A rendered prompt above this is a dead letter before anything tokenises it; far above any model's context.
MAX_PROMPT_CHARS = 10_000_000
#: What one render may do: the characters and items that it touches, with every loop turn, call and filter as a hundred.
MAX_WORK = 50_000_000
_STEP = 100
MAX_RENDER_S = 30.0
_MAX_SOURCE_CHARS = 1_000_000
_MAX_NUMBER_BITS = 100_000
_MAX_WIDTH = 1_000_000
_MAX_JSON_INDENT = 32
_SHOWN_CHARS = 200
#: Widths in a format: a number of six digits and more, or one that is itself formatted in.
_PERCENT_WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{6})")
_BRACE_WIDTH = re.compile(r"\{[^{}]*:[^{}]*(?:\d{6}|\{)")
_WIDE_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"})
_WIDE_FILTERS = frozenset({"batch", "center", "indent", "slice", "truncate", "wordwrap"})
#: Filters that look at their value's end or not at all; the others pay for every item.
_CHEAP_FILTERS = frozenset({"attr", "count", "d", "default", "first", "last", "length", "map", "reject", "rejectattr"})
_CHEAP_FILTERS |= {"select", "selectattr"}
#: Filters that write out their value with everything inside it.
_WRITING_FILTERS = frozenset({"escape", "e", "forceescape", "join", "pprint", "string", "tojson", "urlencode"})

_SIZED = (str, bytes, list, tuple, dict)


class _Allowance(threading.local):
    """What is left to the render (or the compilation) that runs on this thread."""

    work = 0
    until_s = 0.0


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Templates of this environment are made by :meth:`bounded` and rendered by :meth:`render` alone.

    Threads may share it. There is no loader: include, import and extends find nothing.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        self._allowance = _Allowance()
        super().__init__(autoescape=False, **{"finalize": self.printed, **options})
        self.globals.pop("lipsum", None)  # random text, and as much of it as asked for
        self.globals["dict"] = _NewDict()
        self.globals["namespace"] = _PublicNamespace
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = self._charged(name, function)

    def bounded(self, source: str) -> tuple[Template, nodes.Template]:
        """The compiled template and its syntax tree as written.

        Raises TemplateSyntaxError for what Jinja cannot parse, SecurityError for a source that is too long or too
        deeply nested to be compiled.
        """
        if len(source) > _MAX_SOURCE_CHARS:
            raise SecurityError(f"the template has more than {_MAX_SOURCE_CHARS:,} characters")
        try:
            with self._fresh_allowance():  # constants are folded, and so computed, while compiling
                counted = _Counting(self).visit(self.parse(source))
                return self.from_string(counted), self.parse(source)
        except (RecursionError, MemoryError, SyntaxError) as error:
            # Python's own parser gives up on deep nesting with any of the three.
            raise SecurityError(f"the template is nested too deeply ({type(error).__name__})") from error

    def render(self, template: Template, variables: Mapping[str, object]) -> str:
        """The text of one row. Raises RowRejected ("too_long"), SecurityError above the allowance, and whatever the
        template raises.
        """
        pieces: list[str] = []
        num_chars = 0
        with self._fresh_allowance():
            for piece in template.generate(variables):
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS:
                    raise RowRejected("too_long", f"the template wrote more than {MAX_PROMPT_CHARS:,} characters")
                pieces.append(piece)
        return "".join(pieces)

    @contextmanager
    def _fresh_allowance(self) -> Iterator[None]:
        self._allowance.work = MAX_WORK
        self._allowance.until_s = time.monotonic() + MAX_RENDER_S
        try:
            yield
        finally:
            self._allowance.work = 0

    # What templates call through the syntax tree that `_Counting` has rewritten. --------------------------------

    def turn(self, work: int) -> None:
        """One turn of a loop or one call of a macro, with that many characters of the template's own in it."""
        self._charge(_STEP + work)

    def gathered(self, value: object) -> object:
        """A list, tuple or dict that the template has just written down."""
        self._charge_deep(value)
        return value

    def iterated(self, value: object) -> object:
        """What a loop runs over."""
        self._charge(_length(value))
        return value

    def joined(self, *values: object) -> str:
        """``a ~ b``"""
        for value in values:
            self._charge_deep(value)
        return "".join(map(str, values))

    def printed(self, value: object) -> object:
        """``{{ value }}``, inside a macro or a set block too."""
        self._charge_deep(value)
        return value

    # What Jinja calls. --------------------------------------------------------------------------------------------

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """``left + right`` and the like, refused where the result would be huge."""
        self._charge(_STEP)
        if operator == "+":
            if isinstance(left, _SIZED) and isinstance(right, _SIZED):
                self._charge(len(left) + len(right))
        elif operator == "%":
            if isinstance(left, str | bytes):
                self._check_format(_PERCENT_WIDTH, left)
                self._charge_deep(right)
        else:
            self._check_product(operator, left, right)
        operators: Mapping[str, Callable[[object, object], object]] = self.binop_table
        return operators[operator](left, right)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call from a template, of a macro, a global or a method of a value."""
        if getattr(called, "__self__", None) is self:
            return super().call(context, called, *args, **kwargs)  # a counter
        self._charge(_STEP)
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        self._check_method(getattr(method, "__self__", None), getattr(method, "__name__", ""), args)
        result = super().call(context, called, *args, **kwargs)
        if isinstance(result, _SIZED):
            self._charge_deep(result)
        return result

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._charge(_STEP)
            # Jinja passes its context or itself first to those filters that ask for it.
            values = args[1:] if hasattr(function, "jinja_pass_arg") else args
            if name not in _CHEAP_FILTERS:
                for value in values:
                    self._charge(_length(value))
            if name in _WRITING_FILTERS:
                self._charge_deep(values[0])
            self._check_filter(name, values, kwargs)
            result = function(*args, **kwargs)
            if isinstance(result, str | bytes):
                self._charge(len(result))
            elif isinstance(result, _SIZED) and name not in _CHEAP_FILTERS:
                self._charge_deep(result)
            return result

        return charged

    def _check_filter(self, name: str, values: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rest = (*values[1:], *kwargs.values())
        if name in _WIDE_FILTERS and any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in rest):
            raise SecurityError(f"a width above {_MAX_WIDTH:,} in the filter {name}")
        if name == "format":
            self._check_format(_PERCENT_WIDTH, str(values[0]))
        elif name in ("replace", "indent", "wordwrap", "join", "batch"):
            # Each puts an argument between the parts of its value, of which there are at most len(value) + 1.
            longest = max((_width(value) for value in rest), default=0)
            parts = str(values[0]).count(str(rest[0])) if name == "replace" and rest else _length(values[0])
            self._charge((parts + 1) * longest)

    def _check_method(self, owner: object, name: str, args: tuple[Any, ...]) -> None:
        if isinstance(owner, int | float | str | bytes):
            if name in _WIDE_METHODS and any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in args):
                raise SecurityError(f"a width above {_MAX_WIDTH:,} in {name}()")
            if isinstance(owner, int | float):
                return
            self._charge(len(owner))
            if name in ("format", "format_map"):
                self._check_format(_BRACE_WIDTH, owner)
                for value in args:
                    self._charge_deep(value)
            elif name == "replace" and len(args) >= 2:
                self._charge((owner.count(args[0]) + 1) * _length(args[1]))
            elif name == "translate" and args and isinstance(args[0], Mapping):
                self._charge(len(owner) * max((_length(value) for value in args[0].values()), default=0))
            elif name == "join" and args:
                self._charge_deep(args[0])
                self._charge(len(owner) * _length(args[0]))
        elif isinstance(owner, list | tuple | dict):
            self._charge(0 if name == "get" else len(owner))

    def _check_product(self, operator: str, left: object, right: object) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_NUMBER_BITS:
                raise SecurityError("the number is too large")
        elif operator == "*":
            for repeated, count in ((left, right), (right, left)):
                if isinstance(repeated, str | bytes | list | tuple) and isinstance(count, int):
                    if len(repeated) * count > MAX_PROMPT_CHARS:
                        raise SecurityError("the repetition is too long")
                    self._charge(len(repeated) * max(count, 0))

    def _check_format(self, width: re.Pattern[str], text: str | bytes) -> None:
        if width.search(text.decode("latin-1") if isinstance(text, bytes) else text):
            raise SecurityError("the format has a width that is too large or computed")

    def _charge(self, work: int) -> None:
        allowance = self._allowance
        allowance.work -= work
        if allowance.work < 0:
            raise SecurityError("the template does more than one row may cost")
        if time.monotonic() > allowance.until_s:
            raise SecurityError(f"the template takes longer than {MAX_RENDER_S:.0f} s for one row")

    def _charge_deep(self, value: object) -> None:
        """For everything in a value, a part as often as it occurs: lists that share a part can be exponential."""
        if type(value) is str:
            self._charge(len(value))
            return
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self._charge(1 + _length(item))
            if isinstance(item, list | tuple):
                waiting.extend(item)
            elif isinstance(item, dict):
                waiting.extend(item)
                waiting.extend(item.values())


def short_error(error: BaseException) -> str:
    """First line of a foreign error, bounded: the rest may quote the whole prompt."""
    lines = str(error).splitlines()
    text = lines[0][:_SHOWN_CHARS] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Counting(NodeTransformer):
    """Puts the calls of :class:`BoundedEnvironment`'s counters into a syntax tree."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 (Jinja's name)
        """Every turn is counted, and so is what the loop runs over: its filter has no turn."""
        self.generic_visit(node)
        node.iter = self._call("iterated", [cast("nodes.Expr", node.iter)], node)
        node.body.insert(0, self._turn(node, node.body))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        """A macro may call itself, and in more than one place."""
        self.generic_visit(node)
        node.body.insert(0, self._turn(node, node.body))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:  # noqa: N802
        """``caller()`` may be called as often as a macro."""
        self.generic_visit(node)
        node.body.insert(0, self._turn(node, node.body))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        """``~`` is no operator that the sandbox could intercept."""
        self.generic_visit(node)
        return self._call("joined", node.nodes, node)

    def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
        """See ``gathered``."""
        return self._gathered(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:  # noqa: N802
        """See ``gathered``."""
        return self._gathered(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        """See ``gathered``; a tuple may also be what is assigned to."""
        return self._gathered(node) if node.ctx == "load" else node

    def _gathered(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        if not any(True for _ in node.find_all(nodes.Name)):
            return node  # a constant: nothing can grow in it
        self.generic_visit(node)
        return self._call("gathered", [node], node)

    def _turn(self, node: nodes.Stmt, body: list[nodes.Node]) -> nodes.Node:
        literal = sum(len(text.data) for child in body for text in _own_texts(child))
        work = nodes.Const(literal)
        work.set_lineno(node.lineno)
        call = self._call("turn", [work], node)
        return nodes.ExprStmt(call).set_lineno(node.lineno)

    def _call(self, name: str, arguments: list[nodes.Expr], node: nodes.Node) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name)
        call = nodes.Call(function, arguments, [], None, None)
        for made in (function, call):
            made.set_lineno(node.lineno)
            made.set_environment(self._environment)
        return call


def _own_texts(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """The literal text of a node, that of inner loops left out: they count their own."""
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        for child in node.iter_child_nodes():
            yield from _own_texts(child)


class _NewDict:
    """``dict(...)`` of templates; the type itself would be an object to climb on."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """``dict.fromkeys``"""
        return dict.fromkeys(*args)


class _PublicNamespace(Namespace):
    """``namespace(...)`` of templates, for names without an underscore before them: the others are Python's."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}: names with an underscore first are refused")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as chat templates know it; jinja's own filter escapes HTML."""
    if indent is not None and _width(indent) > _MAX_JSON_INDENT:
        raise SecurityError(f"tojson indents by at most {_MAX_JSON_INDENT}")
    if separators is not None and sum(map(len, separators)) > _MAX_JSON_INDENT:
        raise SecurityError(f"tojson separates by at most {_MAX_JSON_INDENT} characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _length(value: object) -> int:
    return len(value) if isinstance(value, (*_SIZED, range)) else 0


def _width(value: object) -> int:
    """How much of something an argument asks for: a number of blanks, or a text."""
    return abs(value) if isinstance(value, int) else _length(value)
