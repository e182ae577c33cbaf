"""Completions that are JSON of a schema or match a pattern, by construction: which tokens may come next.

A grammar is compiled once per text (``Grammars``); each row then has a matcher that follows its tokens
(``RowGrammar``), and before a token is drawn the rows' masks are computed together (``Grammars.masks``) and applied
to the logits by the sampler. What a row may say depends on its grammar and its own tokens alone, whatever else is in
the batch and however often the row is begun anew.

Shape suffixes: G rows with a grammar, W words of 32 bits.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchinfer import grammar_rules
from batchinfer.engine.token_masks import WORD_BITS, TokenMasks
from batchinfer.records import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

#: Compiled grammars kept for rows to come; each holds what its rows have taught it, up to some tens of megabytes.
_MAX_COMPILED = 256
#: A few masks take less time than waking a thread for them.
_MIN_ROWS_FOR_THREADS = 8
_MAX_THREADS = 8


class GrammarFailed(Exception):
    """A grammar cannot be compiled for this tokenizer; the text says why."""


@dataclass(slots=True, eq=False)
class RowGrammar:
    """One row's grammar and how far its tokens have come in it."""

    grammars: "Grammars"
    params: SamplingParams
    #: End the row; possible where the grammar may end, and nowhere else.
    stop_ids: frozenset[int]
    #: The row's own list, which grows by the tokens it takes.
    generated: list[int]
    #: Why the row cannot go on; empty while it can.
    problem: str = ""
    _matcher: "LLMatcher | None" = None
    #: The first tokens of ``generated``, which the matcher has read.
    _num_read: int = 0

    def ends(self) -> bool:
        """Whether the row ends with its newest token. To be asked behind each; false where there is a ``problem``."""
        num_tokens = len(self.generated)
        if self.generated[-1] in self.stop_ids:
            # Drawn ones are there by the mask's leave; an earlier try's may be another row's.
            matcher = self._behind(num_tokens - 1)
            if matcher is not None and not matcher.is_accepting():
                self.problem = "it ends before its grammar may"
            return not self.problem
        matcher = self._behind(num_tokens)
        if matcher is None or not matcher.is_stopped():
            return False
        if not matcher.is_accepting():
            self.problem = "nothing continues what the completion has so far"
        return not self.problem

    def matcher(self) -> "LLMatcher | None":
        """The matcher behind all tokens so far; None where there is a ``problem``."""
        return self._behind(len(self.generated))

    def anew(self) -> "LLMatcher | None":
        """As :meth:`matcher`, when that one cannot give its mask.

        Matchers of a grammar share what they learn, and a limit on that may end one that is innocent: a matcher that
        fails is made anew, alone, and only if that one fails too, it is the row's own matter.
        """
        return self._anew(len(self.generated))

    def _behind(self, num_tokens: int) -> "LLMatcher | None":
        """The matcher behind so many tokens, no fewer than it has read."""
        if self.problem:
            return None
        if self._matcher is None:
            try:
                self._matcher = self.grammars.matcher(self.params)
            except GrammarFailed as error:
                self.problem = str(error)
                return None
        return self._matcher if self._reads(self._matcher, num_tokens) else self._anew(num_tokens)

    def _anew(self, num_tokens: int) -> "LLMatcher | None":
        self._num_read = 0
        try:
            self._matcher = self.grammars.fresh_matcher(self.params)
        except GrammarFailed as error:
            self.problem = str(error)
            return None
        if not self._reads(self._matcher, num_tokens):
            self.problem = grammar_rules.shown(self._matcher.get_error())
            return None
        self.grammars.forget(self.params)
        return self._matcher

    def _reads(self, matcher: "LLMatcher", num_tokens: int) -> bool:
        unread = self.generated[self._num_read : num_tokens]
        self._num_read = num_tokens
        return not unread or matcher.consume_tokens(unread)


class Grammars:
    """The grammars of one model's tokenizer. Threads may share it; masks are the engine's thread's alone.

    ``tokenizer_json`` gives the text of a tokenizer.json, and is asked when the first grammar is wanted: reading it
    takes up to a second. ``eos_token_ids`` are the model's. Masks ``for_gpu`` lie where a GPU can fetch them by itself.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], eos_token_ids: Collection[int], *, for_gpu: bool = False
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos_token_ids = sorted(eos_token_ids)
        self._for_gpu = for_gpu
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | GrammarFailed | None = None
        #: What rows' matchers are copied from, or why there is none; the least recently used first.
        self._compiled: OrderedDict[tuple[str | None, str | None], LLMatcher | GrammarFailed] = OrderedDict()
        self._executor: LLExecutor | None = None

    def problem(self, params: SamplingParams) -> str:
        """What is wrong with the params' grammar, beginning with its key; empty when nothing is, or there is none.

        Compiles it, so that the engine finds it ready: milliseconds as a rule, half a second at worst.
        """
        if not params.has_grammar:
            return ""
        try:
            self.matcher(params)
        except GrammarFailed as error:
            return str(error)
        return ""

    def begin(self, params: SamplingParams, stop_ids: frozenset[int], generated: list[int]) -> RowGrammar:
        """The grammar of a row whose tokens so far, and from now on, are in ``generated``."""
        return RowGrammar(self, params, stop_ids, generated)

    def matcher(self, params: SamplingParams) -> "LLMatcher":
        """A matcher at its beginning. Raises GrammarFailed."""
        key = (params.json_schema, params.regex)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is not None:
                self._compiled.move_to_end(key)
        if compiled is None:
            try:
                compiled = self.fresh_matcher(params)
            except GrammarFailed as error:
                compiled = error
            with self._lock:
                self._compiled[key] = compiled
                while len(self._compiled) > _MAX_COMPILED:
                    self._compiled.popitem(last=False)
        if isinstance(compiled, GrammarFailed):
            raise GrammarFailed(str(compiled))
        return compiled.deep_copy()

    def fresh_matcher(self, params: SamplingParams) -> "LLMatcher":
        """As :meth:`matcher`, sharing nothing with any other. Raises GrammarFailed."""
        found = grammar_rules.problem(params)
        if found:
            raise GrammarFailed(found)
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer(), grammar_rules.grammar(params), log_level=0, limits=grammar_rules.limits())
        if not matcher.is_error():
            # A grammar that allows nothing at all, or is too large, shows with its first mask.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarFailed(f"{grammar_rules.key_of(params)}: {grammar_rules.shown(matcher.get_error())}")
        return matcher

    def forget(self, params: SamplingParams) -> None:
        """Compile the params' grammar anew for rows to come: what its rows have taught it has filled it."""
        with self._lock:
            self._compiled.pop((params.json_schema, params.regex), None)

    def tokenizer(self) -> "LLTokenizer":
        """The tokenizer as llguidance has it. Raises GrammarFailed for one that it does not know."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = LLTokenizer(self._tokenizer_json(), eos_token=self._eos_token_ids or None)
                except ValueError as error:
                    reason = grammar_rules.shown(str(error))
                    self._tokenizer = GrammarFailed(
                        f"json_schema and regex do not work with this model's tokenizer: {reason}"
                    )
            tokenizer = self._tokenizer
        if isinstance(tokenizer, GrammarFailed):
            raise GrammarFailed(str(tokenizer))
        return tokenizer

    def masks(self, rows: SequenceOf[tuple[int, RowGrammar]]) -> TokenMasks:
        """What each of these rows may take next. A row that may take nothing has a ``problem`` from now on."""
        tokenizer = self.tokenizer()
        num_words = -(-tokenizer.vocab_size // WORD_BITS)
        words_GW = torch.zeros(len(rows), num_words, dtype=torch.int32, pin_memory=self._for_gpu)
        self._fill(rows, words_GW)
        masks = TokenMasks(tuple(place for place, _ in rows), words_GW)
        for index in torch.nonzero(~words_GW.any(dim=1))[:, 0].tolist():
            row = rows[index][1]
            row.problem = row.problem or "no token of the model continues what the completion has so far"
        return masks

    def _fill(self, rows: SequenceOf[tuple[int, RowGrammar]], words_GW: torch.Tensor) -> None:
        matchers = [(matcher, index) for index, (_, row) in enumerate(rows) if (matcher := row.matcher()) is not None]
        self._compute(matchers, words_GW)
        for matcher, index in matchers:
            if matcher.is_error():
                words_GW[index] = 0
                again = rows[index][1].anew()
                if again is not None:
                    self._compute([(again, index)], words_GW)
                    if again.is_error():
                        words_GW[index] = 0
                        rows[index][1].problem = grammar_rules.shown(again.get_error())
        self._allow_ends(rows, words_GW)

    def _compute(self, matchers: "list[tuple[LLMatcher, int]]", words_GW: torch.Tensor) -> None:
        num_bytes = words_GW.shape[1] * words_GW.element_size()
        start = words_GW.data_ptr()
        if len(matchers) < _MIN_ROWS_FOR_THREADS:
            for matcher, index in matchers:
                matcher.unsafe_compute_mask_ptr(start + index * num_bytes, num_bytes)
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(min(torch.get_num_threads(), _MAX_THREADS))
        self._executor.unsafe_compute_mask_ptr(matchers, start, num_bytes, words_GW.shape[0])

    def _allow_ends(self, rows: SequenceOf[tuple[int, RowGrammar]], words_GW: torch.Tensor) -> None:
        """Make the rows' stop ids possible where their grammars may end, and no other end of sequence."""
        tokenizer = self.tokenizer()
        known = frozenset(tokenizer.eos_tokens)
        words = words_GW.numpy().view(np.uint32)
        for index, (_, row) in enumerate(rows):
            if row.stop_ids == known:
                continue
            matcher = row.matcher()
            for token_id in known | row.stop_ids:
                if token_id >= tokenizer.vocab_size:
                    continue
                word, bit = divmod(token_id, WORD_BITS)
                words[index, word] &= np.uint32(~(1 << bit) & 0xFFFFFFFF)
                if token_id in row.stop_ids and matcher is not None and matcher.is_accepting():
                    words[index, word] |= np.uint32(1 << bit)
