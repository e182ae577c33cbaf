"""Token ids of completions as the texts that rows are given."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Generation
from batchinfer.engine.stopping import cut_text


@dataclass(frozen=True, slots=True)
class Texts:
    """How token ids of a completion become its text; ``detokenizer`` is None for a model without a tokenizer."""

    detokenizer: Detokenizer | None
    eos_token_ids: frozenset[int]

    def of(self, generations: SequenceOf[Generation]) -> list[str]:
        """One text each, without the id or the string that stopped it; empty without a tokenizer."""
        detokenizer = self.detokenizer
        if detokenizer is None:
            return [""] * len(generations)
        texts = detokenizer.decode_batch([self._without_stop_id(generation) for generation in generations])
        return [self._cut(text, generation) for text, generation in zip(texts, generations, strict=True)]

    def _without_stop_id(self, generation: Generation) -> SequenceOf[int]:
        token_ids = generation.token_ids
        if generation.finish_reason != "stop" or not token_ids:
            return token_ids
        is_stop_id = token_ids[-1] in self.eos_token_ids or (
            token_ids[-1] in generation.sequence.prompt.sampling.stop_token_ids
        )
        return token_ids[:-1] if is_stop_id else token_ids

    def _cut(self, text: str, generation: Generation) -> str:
        sampling = generation.sequence.prompt.sampling
        if not sampling.stop or generation.finish_reason != "stop" or self.detokenizer is None:
            return text
        ignored = generation.token_ids[: sampling.min_new_tokens]
        return cut_text(text, sampling.stop, len(self.detokenizer.decode(ignored)) if ignored else 0)
