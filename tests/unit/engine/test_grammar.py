"""Masks of single grammars: over tokenizers of several families, with limits reached, and as tensors."""

import random
import re
import threading
from functools import partial

import pytest
import torch
from llguidance import LLParserLimits

from batchinfer.detokenise import Detokenizer
from batchinfer.engine.grammar import Grammars, RowGrammar
from batchinfer.engine.token_masks import TokenMasks
from batchinfer.records import SamplingParams
from tests.chat_models import FAMILIES

SCHEMA = SamplingParams(json_schema='{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}')


def world(family: str) -> tuple[Grammars, Detokenizer, frozenset[int]]:
    tokenizer = FAMILIES[family]()
    ends = frozenset([tokenizer.eos_token_id])
    detokenizer = Detokenizer(tokenizer)
    return Grammars(detokenizer.to_json, ends), detokenizer, ends


def allowed(masks: TokenMasks, vocab_size: int) -> list[list[int]]:
    """Token ids by row, read bit by bit."""
    return [
        [token for token in range(vocab_size) if token < 32 * len(words) and words[token // 32] >> (token % 32) & 1]
        for words in masks.words_GW.tolist()
    ]


def walk(grammars: Grammars, row: RowGrammar, rng: random.Random, max_tokens: int = 60) -> bool:
    """Take allowed tokens at random; whether the row came to its end."""
    for _ in range(max_tokens):
        (ids,) = allowed(grammars.masks([(0, row)]), grammars.tokenizer().vocab_size)
        if not ids:
            return False
        row.generated.append(rng.choice(ids))
        if row.ends():
            return True
    return False


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"unigram"}))
def test_the_text_of_what_is_allowed_matches(family: str) -> None:
    grammars, detokenizer, ends = world(family)
    rng = random.Random(family)
    num_ends = 0
    for pattern in (r"\d{1,9}", r"[a-z]{2,5} [A-Z]!", "가나[다-힣]{1,2}", r"(<think>|\[\|user\|\]|user)x", r" a\n"):
        for _ in range(6):
            row = grammars.begin(SamplingParams(regex=pattern), ends, [])
            if walk(grammars, row, rng):
                num_ends += 1
                assert re.fullmatch(pattern, detokenizer.decode([t for t in row.generated if t not in ends]))
            assert row.problem == ""
    assert num_ends >= 24


def test_a_tokenizer_that_is_not_known_is_a_problem_with_a_reason() -> None:
    grammars, _, ends = world("unigram")
    assert "do not work with this model's tokenizer" in grammars.problem(SCHEMA)
    row = grammars.begin(SCHEMA, ends, [])
    assert row.matcher() is None
    assert "tokenizer" in row.problem


def test_the_tokenizer_is_read_once_and_only_for_a_grammar() -> None:
    tokenizer = FAMILIES["exaone3"]()
    read: list[int] = []

    def to_json() -> str:
        read.append(1)
        return Detokenizer(tokenizer).to_json()

    grammars = Grammars(to_json, [tokenizer.eos_token_id])
    assert grammars.problem(SamplingParams()) == ""
    assert not read
    assert grammars.problem(SCHEMA) == grammars.problem(SamplingParams(regex="a")) == ""
    assert len(read) == 1


def test_the_end_is_the_rows_own_stop_ids() -> None:
    grammars, detokenizer, ends = world("exaone3")
    (eos,) = ends
    letter = next(token for token in range(291) if detokenizer.decode([token]) == "b")
    for stop_ids in (ends, frozenset([letter]), ends | {letter}, frozenset([9999])):
        row = grammars.begin(SamplingParams(regex="[ab]{2,3}"), stop_ids, [])
        held = {"a", "b"} - {"b"} if letter in stop_ids else {"a", "b"}
        for num_tokens in range(3):
            (ids,) = allowed(grammars.masks([(0, row)]), 291)
            may_end = stop_ids & {eos, letter} if num_tokens >= 2 else frozenset()
            assert set(ids) & {eos, letter} - may_end <= {letter} - stop_ids
            assert may_end <= set(ids)
            assert {detokenizer.decode([t]) for t in ids if t not in may_end} == held
            row.generated.append(next(t for t in ids if detokenizer.decode([t]) == "a"))
            assert row.ends() == (num_tokens == 2)


def test_many_rows_are_filled_together_as_each_alone() -> None:
    grammars, _, ends = world("exaone4")
    rng = random.Random(0)
    rows = [grammars.begin(SamplingParams(regex=rf"[a-z]{{{n},{n + 3}}}|\d+"), ends, []) for n in range(1, 30)]
    for row in rows:
        walk(grammars, row, rng, max_tokens=rng.randrange(1, 4))
    rows = [row for row in rows if not (row.generated and row.ends())]
    assert len(rows) > 20
    together = grammars.masks(list(enumerate(rows)))
    alone = [grammars.masks([(0, row)]).words_GW[0] for row in rows]
    assert torch.equal(together.words_GW, torch.stack(alone))


def test_a_limit_that_other_rows_used_up_is_not_this_rows_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    few_states = partial(LLParserLimits, max_lexer_states=120, verbose_errors=False)
    monkeypatch.setattr("batchinfer.grammar_rules.limits", few_states)
    grammars, _, ends = world("exaone3")
    params = SamplingParams(regex="(a|b)*a(a|b){10}x")
    rng = random.Random(1)
    renewed: list[SamplingParams] = []
    monkeypatch.setattr(grammars, "forget", lambda it: (renewed.append(it), Grammars.forget(grammars, it)))
    for _ in range(20):
        row = grammars.begin(params, ends, [])
        walk(grammars, row, rng, max_tokens=40)
        assert row.problem == ""
    assert renewed


def test_a_grammar_no_token_can_begin_is_refused_and_one_that_runs_dry_says_so() -> None:
    grammars, _, ends = world("gemma")
    # gemma's pieces here have no way to spell a tab but its byte; the empty class has none at all.
    assert "regex" in grammars.problem(SamplingParams(regex=r"[^\s\S]"))
    row = grammars.begin(SamplingParams(regex="ab"), ends, [0, 1, 2])
    assert row.matcher() is None
    assert row.problem
    masks = grammars.masks([(3, row)])
    assert masks.rows == (3,)
    assert not masks.words_GW.any()


def test_threads_may_compile_while_rows_go_on() -> None:
    grammars, _, ends = world("qwen")
    problems: list[str] = []

    def compile_many(first: int) -> None:
        for number in range(first, first + 150):
            problem = grammars.problem(SamplingParams(regex=f"[a-z]{{1,{1 + number % 200}}}"))
            problems.append(problem)

    threads = [threading.Thread(target=compile_many, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    rng = random.Random(0)
    for number in range(40):
        row = grammars.begin(SamplingParams(regex=f"[a-z]{{1,{1 + number}}}"), ends, [])
        walk(grammars, row, rng)
        assert row.problem == ""
    for thread in threads:
        thread.join()
    assert set(problems) == {""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [61, 64, 70, 96, 131])
def test_masks_hold_bit_by_bit_and_leave_other_rows_alone(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    words = torch.randint(-(2**31), 2**31, (2, 3), generator=generator, dtype=torch.int64).to(torch.int32)
    logits = torch.randn(4, vocab_size, generator=generator).to(dtype)
    kept = logits.clone()
    for rows in ((1, 3), (0, 1)):
        masks = TokenMasks(rows, words)
        masked = masks.applied(logits)
        assert torch.equal(logits, kept)
        for index, ids in zip(rows, allowed(masks, vocab_size), strict=True):
            assert masked[index].isfinite().nonzero()[:, 0].tolist() == ids
            assert torch.equal(masked[index][ids], logits[index][ids])
        for index in {0, 1, 2, 3} - set(rows):
            assert torch.equal(masked[index], logits[index])
    whole = TokenMasks((0, 1), words).applied(logits[:2])
    assert torch.equal(whole, TokenMasks((0, 1), words).applied(logits)[:2])
