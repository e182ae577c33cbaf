"""What is told of a completion without reading it: empty, truncated, repeating, in another script."""

import functools
import re
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchinfer.quality import (
    _RANGES,
    MAX_BLOCK_CHARACTERS,
    MIN_LOOP_CHARACTERS,
    MIN_REPEATS,
    CompletionJudge,
    Script,
    ends_in_loop,
    is_written_in,
)
from batchinfer.records import Completion

ENGLISH = "The quick brown fox jumps over the lazy dog while counting all the stars from one to seven."
KOREAN = "안녕하세요. 저는 언어 모델이며, 질문에 답하고 글을 쓰고 요약하는 일을 도와드립니다."
JAPANESE = "これは日本語の文章です。漢字とかなが混ざっています。"
PYTHON = "```python\ndef answer(question: str) -> str:\n    return model.generate(question)\n```"


def completion(text: str, finish_reason: str = "stop", token_ids: tuple[int, ...] = (5, 6, 1)) -> Completion:
    return Completion("shard:0", 0, text, token_ids, finish_reason, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "finish_reason", "kinds"),
    [
        (ENGLISH, "stop", []),
        (ENGLISH, "length", ["truncated"]),
        ("", "stop", ["empty"]),
        (" \n\t\u3000", "stop", ["empty"]),
        ("", "length", ["empty", "truncated"]),
        ("I am sorry. " * 40, "length", ["truncated", "repeating"]),
        ("a\n" * 100, "stop", ["repeating"]),
    ],
)
def test_what_is_amiss_with_a_text(text: str, finish_reason: str, kinds: list[str]) -> None:
    assert CompletionJudge().kinds(completion(text, finish_reason)) == kinds


def test_without_a_tokenizer_token_ids_are_judged() -> None:
    judge = CompletionJudge(has_text=False)
    assert judge.kinds(completion("", "stop", (1,))) == ["empty"]
    assert judge.kinds(completion("", "length", (7,))) == ["truncated"]
    assert judge.kinds(completion("", "stop", tuple(range(1, 200)))) == []
    assert judge.kinds(completion("", "length", (*range(50), *(3, 140_000, 9) * 20))) == ["truncated", "repeating"]


def test_a_units_completions_are_counted_by_kind() -> None:
    judge = CompletionJudge(("hangul",))
    completions = [completion(KOREAN), completion(ENGLISH), completion(ENGLISH, "length"), completion("")]
    assert judge.count(completions) == {"empty": 1, "truncated": 1, "wrong_script": 2}


@given(st.text(max_size=300), st.text(min_size=1, max_size=200), st.integers(MIN_REPEATS, 12), st.integers(0, 199))
@example("", "ab", MIN_LOOP_CHARACTERS // 2, 1)
@example("x" * 24, "x" * 30 + "y", MIN_REPEATS, 7)
def test_a_block_again_and_again_is_a_loop_wherever_it_is_cut(
    before: str, block: str, num_repeats: int, num_cut: int
) -> None:
    loop = block * (num_repeats + 1)
    loop = loop[: len(loop) - num_cut % len(block)]
    long_enough = len(loop) >= MIN_LOOP_CHARACTERS
    assert ends_in_loop(before + loop, MIN_LOOP_CHARACTERS) or not long_enough


@settings(max_examples=30)
@given(st.lists(st.integers(0, 10**9), min_size=60, max_size=200, unique=True))
def test_counting_on_is_no_loop(numbers: list[int]) -> None:
    assert not ends_in_loop(" ".join(f"{number}," for number in numbers), MIN_LOOP_CHARACTERS)


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH * 3,
        "same line\n" * (MIN_LOOP_CHARACTERS // 10 - 1),
        ("one long paragraph of many words " * 40)[: MAX_BLOCK_CHARACTERS + 10] * 3 + "The end.",
        "\n".join(f"{number}. an item of a list, as long as the others" for number in range(100)),
        "| a | b |\n|---|---|\n" + "\n".join(f"| {n} | {n * n} |" for n in range(50)),
        "ㅋㅋㅋㅋㅋㅋㅋㅋ",
    ],
    ids=["three times only", "too short", "it recovered", "a list", "a table", "laughter"],
)
def test_what_only_looks_alike_is_no_loop(text: str) -> None:
    assert not ends_in_loop(text, MIN_LOOP_CHARACTERS)


def test_the_longest_block_is_found_and_a_longer_one_is_not() -> None:
    letters = "".join(chr(0x4E00 + number) for number in range(MAX_BLOCK_CHARACTERS + 1))
    assert ends_in_loop(letters[:-1] * MIN_REPEATS, MIN_LOOP_CHARACTERS)
    assert not ends_in_loop(letters * (MIN_REPEATS + 2), MIN_LOOP_CHARACTERS)


def test_judging_is_bounded_whatever_the_text_is() -> None:
    judge = CompletionJudge(("hangul",))
    nasty = ["`" * 10**6, "ab" * 500_000 + "c" + "ab" * 2000, ("x" * 23 + "y") * 10**4, "<think>" * 10**5]
    began_s = time.process_time()
    for text in nasty:
        judge.kinds(completion(text, "length"))
    assert time.process_time() - began_s < 0.5


@pytest.mark.parametrize(
    ("scripts", "text", "right"),
    [
        (("hangul",), KOREAN, True),
        (("hangul",), ENGLISH, False),
        (("latin",), KOREAN, False),
        (("latin", "hangul"), KOREAN + ENGLISH, True),
        (("kana", "han"), JAPANESE, True),
        (("hangul",), JAPANESE, False),
        (("hangul",), f"파이썬으로는 이렇게 씁니다.\n{PYTHON}", True),
        (("hangul",), f"파이썬으로는 이렇게 씁니다.\n{PYTHON[:-4]}", True),
        (("hangul",), "`grep --recursive` 명령을 씁니다", True),
        (("hangul",), "자세한 내용: https://example.com/a/very/long/address/in/latin/letters", True),
        (("hangul",), "1234567890 + 42 = 1234567932", True),
        (("hangul",), "B", True),
        (("hangul",), f"<thought>\n{ENGLISH * 3}\n</thought>\n\n{KOREAN}", True),
        (("hangul",), f"<think>{KOREAN}</think>{ENGLISH}", False),
        (("cyrillic",), "Быстрая лиса прыгает", True),
        (("arabic",), "مرحبا بالعالم كيف حالك", True),
    ],
)
def test_scripts(scripts: tuple[Script, ...], text: str, right: bool) -> None:
    assert is_written_in(scripts, text) is right


NAMES = {
    "han": "CJK UNIFIED IDEOGRAPH|CJK COMPATIBILITY IDEOGRAPH|IDEOGRAPHIC|VERTICAL IDEOGRAPHIC",
    "hangul": "HANGUL|HALFWIDTH HANGUL",
    "kana": "HIRAGANA|KATAKANA|HALFWIDTH KATAKANA|HENTAIGANA|MODIFIER LETTER .*KATAKANA|MODIFIER LETTER .*HIRAGANA",
    "latin": "LATIN|FULLWIDTH LATIN|FEMININE ORDINAL|MASCULINE ORDINAL|MODIFIER LETTER",
    "cyrillic": "CYRILLIC|MODIFIER LETTER CYRILLIC",
}


@functools.cache
def letters_and_names() -> list[tuple[str, str]]:
    """Every letter but the thousands of ideographs and syllables with numbers for names, but for a few of them."""
    kept = [*range(0x3500), *range(0x4DA0, 0x4E10), *range(0x9FE0, 0xAC10), *range(0xD790, 0x20010)]
    return [(chr(code), unicodedata.name(chr(code), "")) for code in kept if chr(code).isalpha()]


@pytest.mark.parametrize("script", _RANGES)
def test_ranges_are_those_of_unicodes_names(script: Script) -> None:
    """Letters of the basic plane and the ideographs beyond it, by the names that Unicode gives them."""
    inside, named = re.compile(f"[{_RANGES[script]}]"), re.compile(NAMES.get(script, script.upper()))
    wrong = [letter for letter, name in letters_and_names() if inside.match(letter) and not named.match(name)]
    assert not wrong
    named_so = [letter for letter, name in letters_and_names() if named.match(name)]
    missing = [letter for letter in named_so if ord(letter) < 0x10000 and not inside.match(letter)]
    # Phonetic and mathematical forms, and letters that several scripts use to modify others.
    assert len(missing) <= (0.25 if script == "latin" else 0.12) * len(named_so)
