"""Templates reach nothing outside themselves, and no row of theirs costs more than it may."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from jinja2 import StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols

from batchinfer.errors import ModelError, RowRejected, SpecError
from batchinfer.prompts import sandbox
from batchinfer.prompts.chat_template import ChatTemplate
from batchinfer.prompts.sandbox import BoundedEnvironment
from batchinfer.prompts.template import RowTemplate
from tests.chat_models import FAMILIES, exaone3, qwen
from tests.unit.test_prompts import EXAONE_DEEP_TEMPLATE

ROW: dict[str, Any] = {"a": "text", "b": [1, 2], "c": {"k": "v"}, "n": 7, "xs": list(range(1000))}
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]

ESCAPES = [
    "{{ a.__class__.__mro__[1].__subclasses__() }}",
    "{{ a['__class__'] }}",
    "{{ a | attr('__class__') | string }}",
    "{{ '{0.__class__}'.format(a) }}",
    "{{ '{x.__class__.__init__.__globals__}'.format_map({'x': a}) }}",
    "{{ ('{0.__class__}' | string).format(a) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "{{ dict.__base__ }}",
    "{{ dict.mro() }}",
    "{{ range.__class__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func }}",
    "{{ [a] | map(attribute='__class__') | list }}",
    "{{ lipsum(n=5) }}",
    "{% include 'x' %}",
    "{% import a as b %}",
    "{{ b.append(3) }}",
    "{{ c.update({'k': 1}) }}",
    "{% for x in b %}{{ loop.__class__ }}{% endfor %}",
    "{{ (b | groupby('real')).__class__ }}",
    "{{ a.encode().__class__ }}",
]

BOMBS = [
    # Time: loops in loops, macros that call themselves twice, loops that write nothing.
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in xs %}{% for j in xs %}{% for k in xs %}{{ '' }}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for x in range(99999) if x < 0 %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n %}{{ caller() }}{{ caller() }}{% endif %}{% endmacro %}"
    "{% macro r(n) %}{% if n %}{% call m(1) %}{{ r(n - 1) }}{% endcall %}{% endif %}{% endmacro %}{{ r(60) }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% block x %}{{ self.x() }}{% endblock %}",
    "{% for i in range(99999) %}{% set y = xs | sort %}{% endfor %}",
    "{% for i in range(99999) %}{% set y = xs | map('string') | join %}{% endfor %}",
    "{% for i in range(99999) %}{% set y = range(99999) | sum %}{% endfor %}",
    # Size: what doubles, by every way there is to put two things together.
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = ns.x | replace('t', 'tt') %}{% endfor %}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = ns.x.replace('t', 'tt') %}{% endfor %}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=b) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == ns.x }}",
    "{% set ns = namespace(x=b) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=b) %}{% for i in range(60) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=b) %}{% for i in range(60) %}{% set ns.x = dict(p=ns.x, q=ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=b) %}{% for i in range(60) %}{% set ns.x = dict.fromkeys(b, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ a.encode() * 10 ** 12 }}",
    "{{ [1] * 10 ** 12 }}",
    "{{ 9 ** 99999999 }}",
    "{{ a | center(10 ** 10) }}",
    "{{ a | indent(10 ** 10) }}",
    "{{ a | indent(a * 1000000) | length }}{{ ('x\n' * 100000) | indent(a * 10000) | length }}",
    "{{ xs | batch(10 ** 10, 'x') | list }}",
    "{{ xs | slice(10 ** 10) | list }}",
    "{{ xs | join('x' * 1000000) | length }}",
    "{{ ('x' * 1000000).join(xs | map('string')) | length }}",
    "{{ ('x' * 1000000).join(xs | map('string') | list) | length }}",
    "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
    "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "{{ a.ljust(10 ** 10) }}",
    "{{ a.zfill(10 ** 10) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    "{{ n.to_bytes(10 ** 10, 'big') }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=10 ** 10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ c | tojson(indent=10 ** 10) }}",
    "{{ a | wordwrap(1, wrapstring='x' * 10000000) }}",
    "{% filter replace('x', 'y' * 1000000) %}" + "x" * 1000 + "{% endfilter %}",
    "{{ range(10 ** 9) | list }}",
]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the work, so that a bomb ends soon; what it is measured by is the same."""
    monkeypatch.setattr(sandbox, "MAX_WORK", 500_000)


def environments() -> list[BoundedEnvironment]:
    return [BoundedEnvironment(undefined=StrictUndefined), BoundedEnvironment(extensions=[loopcontrols])]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_outside_itself(source: str) -> None:
    for environment in environments():
        row = {**ROW, "b": [1, 2], "c": {"k": "v"}}
        text = ""
        with suppress(Exception):
            text = environment.render(environment.bounded(source)[0], row)
        # What is not there prints as nothing, what is refused raises.
        assert text in ("", "[Undefined]")
        assert (row["b"], row["c"]) == ([1, 2], {"k": "v"})


@pytest.mark.parametrize("source", BOMBS)
@pytest.mark.usefixtures("_quick")
def test_a_template_that_costs_too_much_is_stopped(source: str) -> None:
    started_s = time.process_time()
    for environment in environments():
        with pytest.raises((SecurityError, RowRejected, OverflowError, RecursionError)):
            environment.render(environment.bounded(source)[0], ROW)
    assert time.process_time() - started_s < 5


@pytest.mark.usefixtures("_quick")
def test_the_clock_stands_behind_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.0)
    with pytest.raises(RowRejected, match="takes longer than 0 s for one row"):
        RowTemplate("{% for x in xs %}{{ x }}{% endfor %}").render(ROW)


def test_each_row_has_its_own_allowance_on_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_WORK", 300_000)
    template = RowTemplate("{% for x in xs %}{{ n }}{% endfor %}")
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda n: template.render({"xs": ROW["xs"], "n": n % 10}), range(64)))
    assert texts == [str(n % 10) * 1000 for n in range(64)]
    with pytest.raises(RowRejected, match="does more than one row may cost"):
        template.render({"xs": list(range(9999)), "n": 1})


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{{ " + "[" * 5_000 + "]" * 5_000 + " }}",
        "{{ " + "not " * 50_000 + "a }}",
        "{{ a" + ".x" * 50_000 + " }}",
        "{% for x in b %}" * 30 + "{% endfor %}" * 30,
        "x" * 1_000_001,
    ],
)
def test_a_source_too_large_to_compile_is_an_error_of_the_job_or_the_model(source: str) -> None:
    with pytest.raises(SpecError, match=r"prompt\.template: the template (is nested|has more)"):
        RowTemplate(source)
    tokenizer: Any = exaone3()
    tokenizer.chat_template = source
    with pytest.raises(ModelError, match="the model's chat template cannot be used"):
        ChatTemplate(tokenizer, {})


@pytest.mark.usefixtures("_quick")
def test_a_bomb_among_constants_is_no_bomb_while_compiling() -> None:
    template = RowTemplate("{{ 'x' | center(10 ** 10) }}{{ ('ab' * 1000000) | replace('a', 'b' * 1000000) }}")
    with pytest.raises(RowRejected, match="template_error"):
        template.render({})


def test_ordinary_templates_are_not_in_the_way_of_the_bound() -> None:
    source = (
        "{% macro shot(q, a) %}Q: {{ q }}\nA: {{ a }}\n{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for x in xs if x % 2 == 0 %}{% set ns.n = ns.n + 1 %}{{ shot(x, '%04d' % x) }}{% endfor %}"
        "{{ ns.n ~ '/' ~ xs | length }} {{ {'k': [a, n]} | tojson(indent=2) }} {{ '{:>8}'.format(a) }}"
        "{{ a | center(20) }}{{ a.replace('t', 'T') }}{{ xs[:3] | join(', ') }}{{ n * '-' }}{{ 2 ** 10 }}"
        "{% for x, y in c.items() %}{{ x }}={{ y }}{% endfor %}{% filter upper %}{{ a }}{% endfilter %}"
        "{% set q %}{{ a }}!{% endset %}{{ q }}{{ dict(x=1).x }}{{ b | map('string') | list }}"
        "{% call(x) each(b) %}{{ x }}{% endcall %}{{ (a, n)[1] }}{{ 'e' in a }}{{ a is string }}"
    )
    source = "{% macro each(l) %}{% for x in l %}{{ caller(x) }}{% endfor %}{% endmacro %}" + source
    text = RowTemplate(source).render(ROW)
    assert text.startswith("Q: 0\nA: 0000\nQ: 2\nA: 0002\n")
    assert text.endswith(
        "500/1000 " + '{\n  "k": [\n    "text",\n    7\n  ]\n}     text        text        TexT0, 1, 2-------'
        "1024k=vTEXTtext!1['1', '2']127TrueTrue"
    )


# Chat templates ----------------------------------------------------------------------------------------------------

CHATS: list[list[dict[str, Any]]] = [
    MESSAGES,
    MESSAGES[1:],
    [*MESSAGES, {"role": "assistant", "content": " Yo "}, MESSAGES[1]],
    [*MESSAGES, {"role": "assistant", "content": "Yo, it is "}],
    [*MESSAGES, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYo"}, MESSAGES[1]],
    [*MESSAGES, {"role": "assistant", "content": "Yo", "thinking": "hm"}, MESSAGES[1]],
    [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {"a": "é"}}}]},
        {"role": "tool", "content": "noon"},
    ],
    [{"role": "user", "content": "Hi", "at": object()}],
]
DEMANDING = (
    "{%- if tools %}{{ tools | tojson(indent=4) }}{% endif %}{{ tools is none }}{{ documents is none }}{{ bos_token }}"
    "{%- for m in messages %}\n  {% if m.content == 'S' %}\n{% continue %}{% endif %}"
    "{% generation %}{% set x = m.content | trim %}{{ x }}{% endgeneration %}{{ x is defined }}{{ m | tojson }}"
    "{{ m.reasoning_content }}{{ m.name or '-' }}{{ dict(a=1).a }}{% endfor %}{{ add_generation_prompt }}{{ extra }}"
)


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("family", [*FAMILIES, "deep", "demanding"])
def test_chats_are_rendered_as_transformers_renders_them(family: str, chat: int) -> None:
    tokenizer: Any = FAMILIES.get(family, exaone3)()
    tokenizer.chat_template = {"deep": EXAONE_DEEP_TEMPLATE, "demanding": DEMANDING}.get(
        family, tokenizer.chat_template
    )
    tool = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {}}}
    for extra in ({}, {"enable_thinking": True, "extra": [1, {"a": None}], "tools": [tool]}):
        continues = CHATS[chat][-1]["role"] == "assistant"
        try:
            expected = tokenizer.apply_chat_template(
                CHATS[chat],
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
                **extra,
            )
        except Exception:  # noqa: BLE001 (the template's own, or transformers')
            with pytest.raises(RowRejected):
                ChatTemplate(tokenizer, extra).render(CHATS[chat])
        else:
            assert ChatTemplate(tokenizer, extra).render(CHATS[chat]) == expected


@pytest.mark.parametrize("source", ["{% include 'x' %}", "{{ messages[0].__class__.__mro__[9] }}", *BOMBS[:3]])
@pytest.mark.usefixtures("_quick")
def test_a_checkpoints_template_costs_its_rows_and_not_the_job(source: str) -> None:
    tokenizer: Any = qwen()
    tokenizer.chat_template = "{{ messages[0].content }}" + source.replace("xs", "range(1000)")
    with pytest.raises(RowRejected, match="template_error"):
        ChatTemplate(tokenizer, {}).render(MESSAGES)
