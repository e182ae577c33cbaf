from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.stopping import StopMatcher, cut_text, find_stop

# A byte-level vocabulary: ids 0..255 are bytes, the next ones are longer pieces, one of them cut inside 한.
HAN = "한".encode()
PIECES = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"###", b" stop", HAN + b"\n", HAN[1:] + HAN[:1], b""]
EMPTY = len(PIECES) - 1


def decode(token_ids: Sequence[int]) -> str:
    return b"".join(PIECES[token_id] for token_id in token_ids).decode("utf-8", errors="replace")


TOKENS = st.lists(
    st.one_of(st.sampled_from([ord(c) for c in "abc#\n "]), st.integers(256, EMPTY), st.sampled_from(list(HAN))),
    max_size=120,
)
STOPS = st.lists(st.sampled_from(["ab", "abc", "###", "c\n", "한한", "a한", " stop", "bcab#"]), min_size=1, max_size=3)


def fires_at(tokens: Sequence[int], stops: Sequence[str], num_ignored: int = 0) -> int | None:
    matcher = StopMatcher(stops, decode, num_ignored)
    return next((count for count, token in enumerate(tokens, 1) if matcher.feed(token)), None)


def naively_fires_at(tokens: Sequence[int], stops: Sequence[str], num_ignored: int = 0) -> int | None:
    ignored = len(decode(tokens[:num_ignored]))
    for count in range(num_ignored + 1, len(tokens) + 1):
        text = decode(tokens[:count])
        if any(text.find(stop, max(0, ignored - len(stop) + 1)) >= 0 for stop in stops):
            return count
    return None


@settings(max_examples=300, deadline=None)
@given(TOKENS, STOPS)
def test_matcher_fires_where_decoding_everything_would(tokens: list[int], stops: list[str]) -> None:
    assert fires_at(tokens, stops) == naively_fires_at(tokens, stops)


@settings(max_examples=200, deadline=None)
@given(TOKENS, STOPS, st.integers(0, 40))
def test_ignored_tokens_stop_nothing_that_ends_in_them(tokens: list[int], stops: list[str], num_ignored: int) -> None:
    assert fires_at(tokens, stops, num_ignored) == naively_fires_at(tokens, stops, num_ignored)


def test_matcher_sees_a_stop_string_after_a_long_text_of_split_characters() -> None:
    tokens = list(HAN) * 400 + [ord(c) for c in " stop"]
    assert fires_at(tokens, ["한 stop"]) == len(tokens)


def test_matcher_decodes_a_bounded_tail() -> None:
    longest = 0

    def watched(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids)

    matcher = StopMatcher(["###END"], watched)
    assert not any(matcher.feed(token) for token in [*list(HAN) * 500, *[EMPTY] * 500, *[0xE3] * 500])
    assert longest <= 16 * (len("###END") + 8)


def test_cut_text_ends_before_the_earliest_stop_string() -> None:
    assert cut_text("one two three", [" three", " two"]) == "one"
    assert cut_text("one two", ["###"]) == "one two"
    assert cut_text("", ["x"]) == ""


def test_cut_text_skips_stop_strings_that_were_ignored() -> None:
    assert cut_text("a##b##c", ["##"], num_ignored_characters=3) == "a##b"
    assert cut_text("a##b##c", ["##"], num_ignored_characters=2) == "a"
    assert find_stop("a##", ["##"], 3) is None
