"""Rows become prompts: templates, the tokenizer's rules, limits, overrides; bad rows become dead letters."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from batchinfer.detokenise import Detokenizer
from batchinfer.errors import InputError, ModelError, SpecError
from batchinfer.prompts import PromptRenderer, check_schema, required_columns
from batchinfer.prompts.columns import SAMPLING_TYPES
from batchinfer.records import Prompt, RowError, SamplingParams
from batchinfer.spec import PromptSpec, SamplingSpec
from tests.tiny import EXAONE3_TEMPLATE, EXAONE4_TEMPLATE

#: As LG's README for EXAONE Deep has it.
EXAONE_DEEP_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '[|system|][|endofturn|]\\n' }}{% endif %}{% set content = message['content'] %}"
    "{% if '</thought>' in content %}{% set content = content.split('</thought>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '[|' + message['role'] + '|]' + content }}"
    "{% if not message['role'] == 'user' %}{{ '[|endofturn|]' }}{% endif %}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n[|assistant|]<thought>\\n' }}{% endif %}"
)
SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[|endofturn|]"]
VOCAB_SIZE = len(SPECIAL) + 256
SYSTEM = {"role": "system", "content": "SYS"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Yo"}


def byte_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, EXAONE's five first tokens, no chat template."""
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="[BOS]", eos_token="[|endofturn|]", pad_token="[PAD]", unk_token="[UNK]"
    )


TOKENIZER = byte_tokenizer()


def chat_tokenizer(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def struct(**fields: pa.DataType) -> pa.StructType:
    return pa.struct(list(fields.items()))


def spec(**values: object) -> PromptSpec:
    return PromptSpec.model_validate(values)


def render(
    renderer: PromptRenderer, column: str = "c", values: list[Any] | None = None, **columns: Any
) -> list[Prompt | RowError]:
    rows = pa.table(columns if values is None else {column: values})
    return renderer.render(rows, [f"s:{index}" for index in range(rows.num_rows)])


def text_of(prompt: Prompt | RowError) -> str:
    assert isinstance(prompt, Prompt), prompt
    return str(TOKENIZER.decode(list(prompt.token_ids), skip_special_tokens=False))


def kinds(prompts: list[Prompt | RowError]) -> list[str]:
    """ "ok" or the dead letter's type, per row."""
    return [prompt.error_type if isinstance(prompt, RowError) else "ok" for prompt in prompts]


def chat(template: str, messages: list[dict[str, Any]], **prompt: object) -> str:
    renderer = PromptRenderer(spec(messages="c", **prompt), SamplingSpec(), chat_tokenizer(template), 4096)
    (rendered,) = render(renderer, values=[messages])
    return text_of(rendered)


# Chat templates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([SYSTEM, USER], "[|system|]SYS[|endofturn|]\n[|user|]Hi\n[|assistant|]"),
        ([USER], "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"),
        (
            [SYSTEM, USER, ASSISTANT, USER],
            "[|system|]SYS[|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n[|user|]Hi\n[|assistant|]",
        ),
        ([USER, ASSISTANT], "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yo"),
    ],
)
def test_exaone_3_chats_read_as_its_template_says(messages: list[dict[str, str]], text: str) -> None:
    assert chat(EXAONE3_TEMPLATE, messages) == text


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER], "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]<thought>\n"),
        (
            [USER, {"role": "assistant", "content": "<thought>\nhm\n</thought>\n\nYo"}, USER],
            "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n[|user|]Hi\n[|assistant|]<thought>\n",
        ),
    ],
)
def test_exaone_deep_chats_read_as_its_template_says(messages: list[dict[str, str]], text: str) -> None:
    assert chat(EXAONE_DEEP_TEMPLATE, messages) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "[|user|]\nHi[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n"),
        (
            {"system": "SYS"},
            "[|system|]\nSYS[|endofturn|]\n[|user|]\nHi[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": True}},
            "[|user|]\nHi[|endofturn|]\n[|assistant|]\n<think>\n",
        ),
    ],
)
def test_exaone_4_chats_read_as_its_template_says(options: dict[str, object], text: str) -> None:
    assert chat(EXAONE4_TEMPLATE, [USER], **options) == text


def test_tools_reach_the_chat_template() -> None:
    tool = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {}}}
    text = chat(EXAONE4_TEMPLATE, [USER], chat_template_kwargs={"tools": [tool]})
    assert '"name": "now"' in text


def test_extra_message_fields_reach_the_chat_template_and_null_ones_do_not() -> None:
    template = "{% for m in messages %}{{ m.role }}/{{ m.name is defined }}/{{ m.name or '-' }};{% endfor %}"
    assert chat(template, [{**USER, "name": "Kim"}, {**USER, "name": None}]) == "user/True/Kim;user/False/-;"


def test_the_jobs_system_prompt_gives_way_to_the_rows_own() -> None:
    assert chat(EXAONE3_TEMPLATE, [USER], system="JOB").startswith("[|system|]JOB[|endofturn|]\n[|user|]Hi")
    assert chat(EXAONE3_TEMPLATE, [SYSTEM, USER], system="JOB").startswith("[|system|]SYS[|endofturn|]\n[|user|]Hi")


def test_the_end_of_turn_is_one_token_in_a_chat() -> None:
    renderer = PromptRenderer(spec(messages="c"), SamplingSpec(), chat_tokenizer(EXAONE3_TEMPLATE), 4096)
    (prompt,) = render(renderer, values=[[USER]])
    assert isinstance(prompt, Prompt)
    assert list(prompt.token_ids).count(4) == 1


def test_a_tokenizer_that_adds_bos_adds_it_to_text_and_not_to_chats() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    (text,) = render(PromptRenderer(spec(text="c"), SamplingSpec(), tokenizer, 99), values=["Hi"])
    (as_chat,) = render(PromptRenderer(spec(text="c", chat=True), SamplingSpec(), tokenizer, 99), values=["Hi"])
    assert text_of(text) == text_of(as_chat) == "[BOS]Hi"
    (plain,) = render(PromptRenderer(spec(text="c"), SamplingSpec(), byte_tokenizer(), 99), values=["Hi"])
    assert text_of(plain) == "Hi"


def test_a_model_without_a_chat_template_is_refused_before_any_row() -> None:
    with pytest.raises(ModelError, match=r"the model has none; set prompt\.chat: false"):
        PromptRenderer(spec(messages="c"), SamplingSpec(), byte_tokenizer(), 99)
    with pytest.raises(ModelError, match="no default among them"):
        PromptRenderer(spec(messages="c"), SamplingSpec(), chat_tokenizer({"rag": "a", "tools": "b"}), 99)
    with pytest.raises(ModelError, match="cannot be read: line 1"):
        PromptRenderer(spec(messages="c"), SamplingSpec(), chat_tokenizer("{% if %}"), 99)
    with pytest.raises(ModelError, match=r"no tokenizer; add its tokenizer\.json"):
        PromptRenderer(spec(text="c"), SamplingSpec(), None, 99)


# Text and templates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ({"text": "title"}, "서울"),
        ({"text": "title", "chat": True}, "[|system|][|endofturn|]\n[|user|]서울\n[|assistant|]"),
        ({"template": "{{ title }} has {{ n }}.", "chat": False}, "서울 has 3."),
        ({"template": "{{ title }}?"}, "[|system|][|endofturn|]\n[|user|]서울?\n[|assistant|]"),
        ({"template": "{{ {'a': title, 'b': '<'} | tojson }}", "chat": False}, '{"a": "서울", "b": "<"}'),
        ({"template": "A fixed prompt", "chat": False}, "A fixed prompt"),
    ],
)
def test_rows_become_text(prompt: dict[str, object], text: str) -> None:
    renderer = PromptRenderer(spec(**prompt), SamplingSpec(), chat_tokenizer(EXAONE3_TEMPLATE), 4096)
    (rendered,) = render(renderer, title=["서울"], n=[3])
    assert text_of(rendered) == text


def test_a_templates_columns_are_found_whichever_way_it_runs() -> None:
    template = "{% set x = a %}{% for i in range(3) %}{{ x }}{% endfor %}{% if b is defined %}{{ c.d }}{% endif %}"
    assert required_columns(spec(template=template)) == ("a", "b", "c")
    assert required_columns(spec(messages="m", sampling_column="s")) == ("m", "s")
    assert required_columns(spec(template="{{ s.seed }}", sampling_column="s")) == ("s",)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ a\n}} {% if %}", "line 2 of the template"),
        ("{{ a | shout }}", "line 1 of the template: No filter named 'shout'"),
        ("{% include 'x' %}", "include, import and extends"),
        ("{% extends name %}", "include, import and extends"),
    ],
)
def test_a_template_that_cannot_work_is_a_spec_error(template: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        required_columns(spec(template=template))


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        ("{{ a.__class__.__mro__ }}", "template_error"),
        ("{{ ''.format.__globals__ }}", "template_error"),
        ("{{ b.append(1) }}", "template_error"),
        ("{{ 1 // 0 }}", "template_error"),
        ("{{ a.nothing }}", "template_error"),
        ("{% for i in range(1000000) %}x{% endfor %}", "template_error"),
        ("{{ 'x' * 10 ** 12 }}", "template_error"),
        ("{{ 9 ** 9 ** 99999 }}", "template_error"),
        ("{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}", "too_long"),
        ("{{ none_value }}", "null_prompt"),
        ("{{ none_value or 'else' }}", "ok"),
        ("{{ '' }} \n", "empty_prompt"),
        ("{{ '\\ud800' }}", "bad_text"),
    ],
)
def test_a_template_that_fails_costs_its_row_alone(template: str, kind: str) -> None:
    renderer = PromptRenderer(spec(template=template, chat=False), SamplingSpec(), byte_tokenizer(), 99)
    prompts = render(renderer, a=["x", "y"], b=[[1], [2]], none_value=pa.array([None, "here"], pa.string()))
    assert kinds(prompts)[0] == kind
    if kind == "null_prompt":
        assert "null columns: none_value" in str(prompts[0])
        assert text_of(prompts[1]) == "here"


# Dead letters ------------------------------------------------------------------------------------------------------


def test_bad_texts_become_dead_letters_and_good_ones_go_on() -> None:
    renderer = PromptRenderer(spec(text="c"), SamplingSpec(), byte_tokenizer(), 8)
    prompts = render(renderer, values=["ok", None, "", " \n", "12345678", "1234567", "x" * 10_000_001])
    assert kinds(prompts) == ["ok", "null_prompt", "empty_prompt", "empty_prompt", "too_long", "ok", "too_long"]
    assert prompts[4] == RowError("s:4", "too_long", "8 prompt tokens and 1 new ones pass the model's limit of 8")
    assert [prompt.row_id for prompt in prompts] == [f"s:{index}" for index in range(7)]


def test_bytes_that_are_not_text_are_dead_letters_of_their_row() -> None:
    broken = pa.array([b"good", b"\xff\xfe", None]).cast(pa.string(), safe=False)
    for prompt in (spec(text="c"), spec(template="{{ c }}", chat=False)):
        prompts = render(PromptRenderer(prompt, SamplingSpec(), byte_tokenizer(), 99), c=broken)
        assert kinds(prompts) == ["ok", "bad_text", "null_prompt"]


def test_bad_conversations_become_dead_letters() -> None:
    renderer = PromptRenderer(spec(messages="c", system="SYS"), SamplingSpec(), chat_tokenizer(EXAONE3_TEMPLATE), 4096)
    prompts = render(
        renderer,
        values=[
            [USER],
            None,
            [],
            [{"role": "user", "content": "  "}],
            [{"role": "user", "content": None}],
            [{"role": None, "content": "Hi"}],
            [{"role": "", "content": "Hi"}],
            [USER, None],
        ],
    )
    expected = ["ok", "null_prompt", "empty_prompt", "empty_prompt"] + ["bad_messages"] * 4
    assert kinds(prompts) == expected


def test_what_a_chat_template_raises_costs_its_row_alone() -> None:
    renderer = PromptRenderer(spec(messages="c"), SamplingSpec(), chat_tokenizer(EXAONE4_TEMPLATE), 4096)
    prompts = render(renderer, values=[[{"role": "wizard", "content": "Hi"}], [USER]])
    assert kinds(prompts) == ["template_error", "ok"]
    assert "Unknown role: wizard" in str(prompts[0])


def test_a_last_message_that_the_template_cannot_continue_is_a_dead_letter_without_its_text() -> None:
    template = "{% for m in messages %}{{ m.role if m.role == 'assistant' else m.content }}{% endfor %}"
    renderer = PromptRenderer(spec(messages="c"), SamplingSpec(), chat_tokenizer(template), 4096)
    prompts = render(renderer, values=[[USER, {"role": "assistant", "content": "a private word"}]])
    assert kinds(prompts) == ["bad_messages"]
    assert "private" not in str(prompts[0])


def test_token_ids_are_taken_as_they_are_without_a_tokenizer() -> None:
    renderer = PromptRenderer(spec(token_ids="c"), SamplingSpec(), None, 8, vocab_size=10)
    prompts = render(renderer, values=[[1, 9], None, [], [1, None], [10], [-1], list(range(8))])
    bad = ["bad_token_ids"] * 3
    assert kinds(prompts) == ["ok", "null_prompt", "empty_prompt", *bad, "too_long"]
    assert prompts[0] == Prompt("s:0", [1, 9], SamplingParams(max_new_tokens=6))


def test_ids_of_a_tokenizer_larger_than_the_model_are_checked() -> None:
    renderer = PromptRenderer(spec(text="c"), SamplingSpec(), byte_tokenizer(), 99, vocab_size=100)
    assert kinds(render(renderer, values=["abc", "한"])) == ["ok", "bad_token_ids"]


def test_no_rows_are_no_prompts() -> None:
    renderer = PromptRenderer(spec(text="c"), SamplingSpec(), byte_tokenizer(), 99)
    assert render(renderer, c=pa.array([], pa.string())) == []
    assert kinds(render(renderer, c=pa.array([None, None], pa.null()))) == ["null_prompt"] * 2


def test_threads_may_share_a_renderer() -> None:
    renderer = PromptRenderer(spec(messages="c"), SamplingSpec(), chat_tokenizer(EXAONE3_TEMPLATE), 4096)
    batches = [[[{"role": "user", "content": f"{batch}-{row}"}] for row in range(50)] for batch in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda values: render(renderer, values=values), batches))
    assert together == [render(renderer, values=values) for values in batches]
    assert len(set(map(text_of, together[3]))) == 50


# Limits and overrides ----------------------------------------------------------------------------------------------


def test_new_tokens_are_cut_to_what_fits() -> None:
    renderer = PromptRenderer(spec(text="c"), SamplingSpec(max_new_tokens=5, min_new_tokens=2), byte_tokenizer(), 10)
    prompts = render(renderer, values=["1234", "12345678", "123456789"])
    assert kinds(prompts) == ["ok", "ok", "too_long"]
    assert [prompt.sampling.max_new_tokens for prompt in prompts if isinstance(prompt, Prompt)] == [5, 2]


def test_rows_override_sampling_field_by_field() -> None:
    sampling = SamplingSpec(max_new_tokens=5, temperature=0.5, stop=["a"], logprobs=0)
    renderer = PromptRenderer(spec(text="c", sampling_column="s"), sampling, byte_tokenizer(), 99, VOCAB_SIZE)
    overrides = [
        {"max_new_tokens": 7.0, "stop": ["b", "c"], "seed": 3},
        {"max_new_tokens": None, "temperature": 0.0},
        None,
        {"stop_token_ids": [1, 2], "logprobs": 2},
        {"stop": []},
    ]
    prompts = render(renderer, c=["x"] * 5, s=overrides)
    base = sampling.params()
    assert base.max_new_tokens == 5
    found = [prompt.sampling for prompt in prompts if isinstance(prompt, Prompt)]
    assert [(params.max_new_tokens, params.temperature, params.stop, params.seed) for params in found] == [
        (7, 0.5, ("b", "c"), 3),
        (5, 0.0, ("a",), 0),
        (5, 0.5, ("a",), 0),
        (5, 0.5, ("a",), 0),
        (5, 0.5, (), 0),
    ]
    assert found[2] == base
    assert (found[3].stop_token_ids, found[3].logprobs) == ((1, 2), 2)


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: "),
        ({"max_new_tokens": 1.5}, "max_new_tokens: "),
        ({"top_p": 1.5}, "top_p: "),
        ({"temperature": float("nan")}, "temperature: "),
        ({"min_new_tokens": 600}, "min_new_tokens 600 is above max_new_tokens 512"),
        ({"stop": [""]}, "stop.0: "),
        ({"stop": ["a", None]}, "stop.1: "),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids: 261 is outside"),
    ],
)
def test_a_bad_override_is_a_dead_letter(override: dict[str, object], error: str) -> None:
    renderer = PromptRenderer(spec(text="c", sampling_column="s"), SamplingSpec(), byte_tokenizer(), 9999, VOCAB_SIZE)
    prompts = render(renderer, c=["x", "y", "z"], s=[override, override, None])
    assert kinds(prompts) == ["bad_sampling", "bad_sampling", "ok"]
    assert isinstance(prompts[0], RowError)
    assert prompts[0].error.startswith(error)


def test_a_thousand_distinct_seeds_are_a_thousand_distinct_samplings() -> None:
    renderer = PromptRenderer(spec(text="c", sampling_column="s"), SamplingSpec(), byte_tokenizer(), 9999)
    prompts = render(renderer, c=["x"] * 9000, s=[{"seed": index} for index in range(9000)])
    assert [prompt.sampling.seed for prompt in prompts if isinstance(prompt, Prompt)] == list(range(9000))


def test_stop_conditions_that_cannot_work_are_refused_for_the_job() -> None:
    with pytest.raises(SpecError, match=r"sampling\.stop_token_ids: 10 is outside the model's 10 token ids"):
        PromptRenderer(spec(token_ids="c"), SamplingSpec(stop_token_ids=[10]), None, 99, vocab_size=10)
    with pytest.raises(SpecError, match=r"sampling\.stop: stop strings need a tokenizer"):
        PromptRenderer(spec(token_ids="c"), SamplingSpec(stop=["x"]), None, 99)


# Schemas -----------------------------------------------------------------------------------------------------------

MESSAGES = pa.list_(struct(role=pa.string(), content=pa.string()))


@pytest.mark.parametrize(
    ("prompt", "column", "accepted"),
    [
        ({"text": "c"}, pa.string(), True),
        ({"text": "c"}, pa.large_string(), True),
        ({"text": "c"}, pa.string_view(), True),
        ({"text": "c"}, pa.dictionary(pa.int32(), pa.string()), True),
        ({"text": "c"}, pa.null(), True),
        ({"text": "c"}, pa.int64(), False),
        ({"text": "c"}, pa.binary(), False),
        ({"text": "c"}, MESSAGES, False),
        ({"messages": "c"}, MESSAGES, True),
        ({"messages": "c"}, pa.large_list(MESSAGES.value_type), True),
        ({"messages": "c"}, pa.list_(struct(role=pa.string(), content=pa.string(), x=pa.int8())), True),
        ({"messages": "c"}, pa.string(), False),
        ({"messages": "c"}, pa.list_(pa.string()), False),
        ({"messages": "c"}, pa.list_(struct(role=pa.string())), False),
        ({"messages": "c"}, pa.list_(struct(role=pa.string(), content=MESSAGES)), False),
        ({"token_ids": "c"}, pa.list_(pa.int32()), True),
        ({"token_ids": "c"}, pa.list_(pa.uint16(), 4), True),
        ({"token_ids": "c"}, pa.list_(pa.float64()), False),
        ({"token_ids": "c"}, pa.int64(), False),
        ({"template": "{{ c }}"}, MESSAGES, True),
    ],
)
def test_column_types_are_checked(prompt: dict[str, object], column: pa.DataType, accepted: bool) -> None:
    schema = pa.schema({"c": column, "other": pa.int8()})
    if accepted:
        check_schema(spec(**prompt), SamplingSpec(), schema)
        return
    with pytest.raises(InputError, match=r"a\.parquet: column 'c' is .*, but prompt\.\w+ needs .*; name another"):
        check_schema(spec(**prompt), SamplingSpec(), schema, where="a.parquet")


def test_a_missing_column_is_named_with_the_nearest_one() -> None:
    schema = pa.schema({"prompt": pa.string(), "id": pa.string()})
    with pytest.raises(InputError, match=r"no column 'promt'; did you mean 'prompt'\? It has prompt, id"):
        check_schema(spec(text="promt"), SamplingSpec(), schema)
    with pytest.raises(InputError, match="no column 'titel'; it has prompt, id"):
        check_schema(spec(template="{{ prompt }}{{ titel }}"), SamplingSpec(), schema)
    twice = pa.schema([("a", pa.string()), ("a", pa.string())])
    with pytest.raises(InputError, match="'a' is there 2 times"):
        check_schema(spec(text="a"), SamplingSpec(), twice)


@pytest.mark.parametrize(
    ("struct", "problem"),
    [
        (struct(seed=pa.int64(), n=pa.float64(), top_p=pa.float32(), stop=pa.list_(pa.string())), ""),
        (pa.null(), ""),
        (pa.int64(), "needs a struct of sampling fields"),
        (struct(temprature=pa.float64()), "unknown field 'temprature'; did you mean 'temperature'?"),
        (struct(xyzzy=pa.float64()), "unknown field 'xyzzy'; known fields: max_new_tokens"),
        (struct(seed=pa.string()), "field 'seed' of column 's' is string, expected integer"),
        (struct(stop=pa.string()), "field 'stop' of column 's' is string, expected list<string>"),
        (struct(logprobs=pa.int64()), "set sampling.logprobs: 0"),
    ],
)
def test_the_sampling_column_is_a_struct_of_known_fields(struct: pa.DataType, problem: str) -> None:
    prompt, schema = spec(text="c", sampling_column="s"), pa.schema({"c": pa.string(), "s": struct})
    if not problem:
        check_schema(prompt, SamplingSpec(), schema)
        return
    with pytest.raises(InputError) as error:
        PromptRenderer(prompt, SamplingSpec(), byte_tokenizer(), 99).check_schema(schema)
    assert problem in str(error.value)


def test_every_sampling_field_has_an_override_type() -> None:
    assert set(SAMPLING_TYPES) == set(SamplingSpec.model_fields)


# Text out of token ids ---------------------------------------------------------------------------------------------


def test_completions_are_decoded_without_special_tokens_and_with_their_spaces() -> None:
    detokenizer = Detokenizer(byte_tokenizer())
    texts = ["Hello , world .", "안녕하세요", " leading", ""]
    ids = [[*TOKENIZER(text, add_special_tokens=False)["input_ids"], 4] for text in texts]
    assert detokenizer.decode_batch(ids) == texts
    assert detokenizer.decode_batch([]) == []
    assert detokenizer.decode(ids[1]) == texts[1]


def test_half_a_character_is_the_replacement_character_and_unknown_ids_are_nothing() -> None:
    detokenizer = Detokenizer(byte_tokenizer())
    ids = TOKENIZER("한", add_special_tokens=False)["input_ids"]
    assert detokenizer.decode(ids[:2]) == "\ufffd"
    assert detokenizer.decode([VOCAB_SIZE + 5, *ids]) == "한"
