"""Completions held to a schema or a pattern are what they have to be, in every engine and however often begun anew."""

import json
import random
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import jsonschema
import pytest
import torch
from llguidance import LLParserLimits
from transformers import PreTrainedModel

from batchinfer.detokenise import Detokenizer
from batchinfer.engine import kv_cache
from batchinfer.engine.continuous import ContinuousEngine
from batchinfer.engine.decoder import Decoder
from batchinfer.engine.decoder_config import decoder_config
from batchinfer.engine.decoder_weights import load_weights
from batchinfer.engine.engine import Engine, Generation, Sequence
from batchinfer.engine.grammar import Grammars
from batchinfer.engine.padded import PaddedEngine
from batchinfer.engine.sampler import Drawn, Sampler
from batchinfer.engine.scheduler_limits import Limits
from batchinfer.engine.token_masks import TokenMasks
from batchinfer.engine.torch_ops import TorchOps
from batchinfer.grammar_rules import problem
from batchinfer.models.loading import load_model, read_facts
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.records import Prompt, SamplingParams
from batchinfer.spec import canonical_schema
from tests.tiny import EOS_TOKEN_ID, MAX_MODEL_LEN, PAD_TOKEN_ID, VOCAB_SIZE, tiny_exaone35
from tests.unit.engine.tiny_models import drain

ROOMY = Limits(num_places=16384, max_rows=64, max_step_tokens=256)
#: Rows wait, move and are preempted all the time.
SCARCE = Limits(
    num_places=600,
    max_rows=5,
    max_step_tokens=16,
    granule=4,
    growth_tokens=4,
    prior_output_tokens=1,
    min_prefix_tokens=2,
    min_prefix_rows=2,
    prefix_block=2,
)
KINDS = ("padded", "continuous", "one step ahead")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "나", "b c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PAIR = {
    "type": "object",
    "properties": {"수": {"type": "integer", "maximum": 999}, "s": {"type": "string", "maxLength": 3}},
    "required": ["수", "s"],
    "additionalProperties": False,
}
KOREAN = r"[가-힣]{1,2}( [가-힣])?[.!]"


@dataclass(frozen=True)
class World:
    """A tiny model, its tokenizer and its grammars."""

    model: PreTrainedModel
    decoder: Decoder
    detokenizer: Detokenizer
    grammars: Grammars

    def engine(self, kind: str, number: int = 0) -> Engine:
        """A new engine; the number chooses among limits, so that no two are batched alike."""
        if kind == "padded":
            return PaddedEngine(
                self.model,
                eos_token_ids=[EOS_TOKEN_ID],
                pad_token_id=PAD_TOKEN_ID,
                max_model_len=MAX_MODEL_LEN,
                decode=self.detokenizer.decode,
                grammars=self.grammars,
                max_batch_rows=(64, 5, 9)[number % 3],
            )
        limits = (ROOMY, SCARCE, replace(SCARCE, num_places=1000))[number % 3]
        return ContinuousEngine(
            self.decoder,
            kv_cache.allocate(self.decoder.config, limits.num_places, torch.float32, torch.device("cpu")),
            limits,
            eos_token_ids=[EOS_TOKEN_ID],
            max_model_len=MAX_MODEL_LEN,
            decode=self.detokenizer.decode,
            grammars=self.grammars,
            num_steps_ahead=int(kind == "one step ahead"),
        )

    def text(self, generation: Generation) -> str:
        return self.detokenizer.decode([token for token in generation.token_ids if token != EOS_TOKEN_ID])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tiny_exaone35(tmp_path_factory.mktemp("exaone35"))
    return open_world(directory)


def open_world(directory: Path) -> World:
    facts, cpu = read_facts(directory), torch.device("cpu")
    config = decoder_config(facts.config)
    weights = load_weights(config, facts.weight_files, dtype=torch.float32, device=cpu, key_mapping=facts.key_mapping)
    detokenizer = Detokenizer(load_tokenizer(directory))
    return World(
        load_model(directory, dtype="float32", device="cpu").model,
        Decoder(config, weights, TorchOps(), MAX_MODEL_LEN),
        detokenizer,
        Grammars(detokenizer.to_json, [EOS_TOKEN_ID]),
    )


def steered(index: int, sampling: SamplingParams, **changes: object) -> Sequence:
    rng = random.Random(index)
    prompt = tuple(rng.randrange(4, VOCAB_SIZE - 1) for _ in range(1 + rng.randrange(12)))
    return Sequence(Prompt(f"shard:{index}", prompt, replace(sampling, **changes)))  # type: ignore[arg-type]


def random_schema(rng: random.Random, depth: int = 2) -> object:
    """Schemas of what jobs use; strings and arrays are short, so that most completions end within their budget."""
    kind = rng.choice(["string", "integer", "number", "boolean", "enum", "const", "null", "format", "pattern"])
    if depth and rng.random() < 0.7:
        kind = rng.choice(["object", "array", "anyOf", "ref"])
    match kind:
        case "string":
            low = rng.randrange(3)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(5)}
        case "integer":
            low = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 2000)}
        case "number":
            return {"type": "number", "minimum": rng.randrange(-9, 0), "exclusiveMaximum": rng.randrange(1, 99)}
        case "boolean" | "null":
            return {"type": kind}
        case "enum":
            return {"enum": rng.sample(["red", "파랑", 'say "hi"', 7, 2.5, None, True, ["x"], {"k": "v"}], 3)}
        case "const":
            return {"const": rng.choice(["서울", {"a": [1, 2]}, -3])}
        case "format":
            return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[A-Z]{2}-[0-9]{1,3}$", "^[가-힣]{2,5}$", "^(a|bc)+$"])}
        case "array":
            return {
                "type": "array",
                "items": random_schema(rng, depth - 1),
                "minItems": rng.randrange(2),
                "maxItems": 2,
            }
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, 0)]}
        case "ref":
            return {"$defs": {"d": random_schema(rng, 0)}, "type": "array", "prefixItems": [{"$ref": "#/$defs/d"}],
                    "items": False, "minItems": 1}  # fmt: skip
    names = rng.sample(["id", "name", "이름", "a b", "x"], rng.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randrange(len(names) + 1)),
        "additionalProperties": rng.random() < 0.1,
    }


def random_pattern(rng: random.Random) -> str:
    atoms = ["[a-f]", r"\d", r"\w", "가", "[^x\n]", r"(ab|나다|\.)", "[A-Z0-9_-]", ".", "(?:x{2}|y)", r"\s", r"[\d-]"]
    counts = ["", "", "{1,3}", "?", "{2}", "*", "+"]
    return "".join(rng.choice(atoms) + rng.choice(counts) for _ in range(rng.randrange(1, 6))) + rng.choice(["", "$"])


def random_params(seed: int) -> SamplingParams:
    rng = random.Random(seed)
    params = SamplingParams(max_new_tokens=100, seed=seed, temperature=rng.choice([0.0, 0.0, 0.7, 1.5]))
    params = replace(
        params,
        top_k=rng.choice([0, 0, 1, 20]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.9]),
        logprobs=rng.choice([None, None, 2]),
    )
    while True:
        chosen = (
            replace(params, regex=random_pattern(rng))
            if rng.random() < 0.4
            else replace(params, json_schema=canonical_schema(as_object(random_schema(rng))))
        )
        # Few of what is drawn is refused, such as additional properties of too many kinds.
        if not problem(chosen):
            return chosen


def as_object(schema: object) -> dict[str, object]:
    assert isinstance(schema, dict)
    return schema


def assert_fits(params: SamplingParams, text: str) -> None:
    if params.regex is not None:
        assert re.fullmatch(params.regex, text), (params.regex, text)
        return
    assert params.json_schema is not None
    jsonschema.validate(json.loads(text), json.loads(params.json_schema))


def assert_same(ends: dict[tuple[str, int], Generation], expected: dict[tuple[str, int], Generation]) -> None:
    assert ends.keys() == expected.keys()
    for key, whole in expected.items():
        assert (ends[key].token_ids, ends[key].finish_reason, ends[key].error) == (
            whole.token_ids,
            whole.finish_reason,
            whole.error,
        ), key


def test_random_schemas_and_patterns_hold_in_every_engine(world: World) -> None:
    submitted = [steered(seed, random_params(seed)) for seed in range(45)]
    expected = drain(world.engine("padded"), submitted)
    finished = [end for end in expected.values() if end.finish_reason == "stop"]
    assert not [end.error for end in expected.values() if end.error is not None]
    # The others fill their budget with a string or a repetition without an end.
    assert len(finished) >= 30
    for end in finished:
        assert_fits(end.sequence.prompt.sampling, world.text(end))
    for number, kind in ((1, "padded"), (0, "continuous"), (2, "one step ahead")):
        assert_same(drain(world.engine(kind, number), submitted), expected)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_random_schemas_and_patterns(world: World, block: int) -> None:
    submitted = [steered(seed, random_params(seed)) for seed in range(1000 + 100 * block, 1100 + 100 * block)]
    ends = drain(world.engine(KINDS[block % 3]), submitted)
    assert not [end.error for end in ends.values() if end.error is not None]
    for end in ends.values():
        if end.finish_reason == "stop":
            assert_fits(end.sequence.prompt.sampling, world.text(end))


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_goes_on_behind_any_of_its_tokens(world: World, kind: str) -> None:
    submitted = [
        steered(0, SamplingParams(max_new_tokens=40, json_schema=canonical_schema(PAIR), temperature=1.0)),
        steered(1, SamplingParams(max_new_tokens=60, regex=KOREAN, temperature=1.0, logprobs=1)),
        steered(2, SamplingParams(max_new_tokens=9, regex=r"\w+", repetition_penalty=1.2)),
    ]
    whole = drain(world.engine(kind), submitted)
    assert {end.finish_reason for end in whole.values()} == {"stop", "length"}
    for number, end in enumerate(whole.values()):
        parts = [
            replace(end.sequence, token_ids=end.token_ids[:length], logprobs=(end.logprobs or ())[:length])
            for length in range(len(end.token_ids) + 1)
        ]
        engine = world.engine(kind, number)
        # Where the host is a step behind, a third of the places is time enough.
        for part in parts[:: 3 if kind == "one step ahead" else 1]:
            again = drain(engine, [part])[end.sequence.sequence_id]
            assert (again.token_ids, again.finish_reason) == (end.token_ids, end.finish_reason)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_another_row_are_dropped(world: World, kind: str) -> None:
    one = steered(0, SamplingParams(max_new_tokens=40, regex=r"[a-d]{8}"))
    whole = drain(world.engine(kind), [one])[one.sequence_id]
    early_end = (*whole.token_ids[:3], EOS_TOKEN_ID)
    for wrong in ((*whole.token_ids[:2], whole.token_ids[0] + 60), early_end):
        again = drain(world.engine(kind), [replace(one, token_ids=wrong)])[one.sequence_id]
        assert (again.token_ids, again.finish_reason) == (whole.token_ids, "stop")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_grammar_do_not_feel_their_neighbours(world: World, kind: str) -> None:
    free = [steered(index, SamplingParams(max_new_tokens=20, temperature=0.8, seed=index)) for index in range(8)]
    held = [steered(100 + index, SamplingParams(max_new_tokens=20, regex=r"\d+")) for index in range(8)]
    alone = drain(world.engine(kind), free)
    mixed = drain(world.engine(kind), [row for pair in zip(free, held, strict=True) for row in pair])
    assert_same({key: end for key, end in mixed.items() if key in alone}, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_n_samples_of_a_schema_are_distinct_and_valid(world: World, kind: str) -> None:
    params = SamplingParams(max_new_tokens=150, json_schema=canonical_schema(PERSON), temperature=1.2, n=6)
    one = steered(3, params)
    ends = drain(world.engine(kind), [replace(one, sample=sample) for sample in range(6)])
    texts = [world.text(end) for end in ends.values() if end.finish_reason == "stop"]
    assert len(set(texts)) == len(texts) >= 5
    for text in texts:
        assert list(json.loads(text)) == ["name", "age", "tags"]
        assert_fits(params, text)


def test_log_probabilities_are_those_of_the_raw_logits(world: World) -> None:
    free = steered(5, SamplingParams(max_new_tokens=1, logprobs=4))
    held = replace(free, prompt=replace(free.prompt, sampling=replace(free.prompt.sampling, regex="[QZ]")))
    (end,) = drain(world.engine("continuous"), [held]).values()
    (raw,) = drain(world.engine("continuous"), [free]).values()
    assert end.logprobs is not None
    assert raw.logprobs is not None
    assert end.logprobs[0].top == raw.logprobs[0].top
    assert end.logprobs[0].logprob < raw.logprobs[0].logprob


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_grammar_ends_the_row_and_an_open_one_needs_an_end_token(world: World, kind: str) -> None:
    closed = drain(world.engine(kind), [steered(0, SamplingParams(max_new_tokens=30, regex="[ab]{3}"))])
    (end,) = closed.values()
    assert end.finish_reason == "stop"
    assert EOS_TOKEN_ID not in end.token_ids
    assert re.fullmatch("[ab]{3}", world.detokenizer.decode(end.token_ids))
    seeds = range(12)
    open_ends = drain(
        world.engine(kind),
        [steered(s, SamplingParams(max_new_tokens=30, regex="[ab]{2,}", temperature=3.0, seed=s)) for s in seeds],
    )
    reasons = {end.finish_reason for end in open_ends.values()}
    for end in open_ends.values():
        assert (end.token_ids[-1] == EOS_TOKEN_ID) == (end.finish_reason == "stop")
        assert len(world.text(end)) >= 2
    assert "stop" in reasons


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_is_possible_where_the_grammar_may_end_and_nowhere_else(world: World, kind: str) -> None:
    stop_id = next(token for token in range(VOCAB_SIZE) if world.detokenizer.decode([token]) == "b")
    rows = [
        steered(
            seed,
            SamplingParams(
                max_new_tokens=40, regex="[abc]{3,6}", temperature=5.0, seed=seed, stop_token_ids=(stop_id,)
            ),
        )
        for seed in range(20)
    ]
    ends = drain(world.engine(kind), rows)
    assert {end.token_ids[-1] for end in ends.values()} >= {stop_id}
    for end in ends.values():
        assert stop_id not in end.token_ids[:-1]
        text = world.detokenizer.decode([t for t in end.token_ids if t not in (stop_id, EOS_TOKEN_ID)])
        assert re.fullmatch("[ac]{3,6}", text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_grammar_that_cannot_go_on_is_that_rows_error_alone(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One state for each character: the limit is reached behind some tokens, by this row and no other.
    costly = SamplingParams(max_new_tokens=200, regex="[a-c]{150}")
    fine = SamplingParams(max_new_tokens=30, regex="[a-c]{20}")
    rows = [steered(0, fine), steered(1, costly), steered(2, fine)]
    few_states = partial(LLParserLimits, max_lexer_states=100, verbose_errors=False)
    monkeypatch.setattr("batchinfer.grammar_rules.limits", few_states)
    grammars = Grammars(world.detokenizer.to_json, [EOS_TOKEN_ID])
    ends = drain(replace(world, grammars=grammars).engine(kind), rows)
    assert ends["shard:1", 0].error is not None
    assert ends["shard:1", 0].error.error_type == "grammar_failed"
    assert "too many states" in ends["shard:1", 0].error.error
    assert [ends[f"shard:{index}", 0].finish_reason for index in (0, 2)] == ["stop", "stop"]
    assert [ends[f"shard:{index}", 0].error for index in (0, 2)] == [None, None]


@pytest.mark.parametrize("kind", ["continuous", "one step ahead"])
def test_a_lack_of_memory_behind_the_masks_costs_no_row(
    world: World, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the step before has been read, and rows of the plan may have ended."""
    held = SamplingParams(max_new_tokens=40, json_schema=canonical_schema(PAIR), temperature=1.0)
    rows = [steered(seed, held, seed=seed) for seed in range(4)] + [steered(9, SamplingParams(max_new_tokens=12))]
    expected = drain(world.engine(kind), rows)
    launch, num_calls = Sampler.launch, count()

    def short_of_memory(sampler: Sampler, logits: torch.Tensor, masks: TokenMasks | None = None) -> Drawn:
        if next(num_calls) % 5 == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(sampler, logits, masks)

    monkeypatch.setattr(Sampler, "launch", short_of_memory)
    assert_same(drain(world.engine(kind), rows), expected)
    assert next(num_calls) > 10
    # Alone, so that each failure is that of a step of one token.
    for row in rows[:2]:
        assert_same(drain(world.engine(kind), [row]), {row.sequence_id: expected[row.sequence_id]})


def test_an_engine_without_grammars_refuses_rows_that_need_them(world: World) -> None:
    engine = PaddedEngine(
        world.model, eos_token_ids=[EOS_TOKEN_ID], pad_token_id=PAD_TOKEN_ID, max_model_len=MAX_MODEL_LEN
    )
    with pytest.raises(ValueError, match="without grammars"):
        engine.submit([steered(0, SamplingParams(regex="a"))])
