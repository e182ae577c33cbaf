"""Which tokens a row may take next: packed as bits on the host, and unpacked on the device.

Shape suffixes: R rows of the batch, G rows with a mask, W words of 32 bits, V vocabulary.
"""

from dataclasses import dataclass

import torch

from batchinfer.engine.upload import upload

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Masks of some of the rows that are sampled."""

    #: Places of the rows among all of the step, each once, in rising order.
    rows: tuple[int, ...]
    #: int32 [G, W] in host memory: bit ``token_id % 32`` of word ``token_id // 32`` is set for what the row may take.
    words_GW: torch.Tensor

    def applied(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """A copy of the logits where what a row may not take is impossible; rows without a mask are as they were."""
        num_rows, vocab_size = logits_RV.shape
        allowed_GV = _unpacked(self.words_GW, vocab_size, logits_RV.device)
        impossible = logits_RV.new_full((), -torch.inf)
        if len(self.rows) == num_rows:
            return torch.where(allowed_GV, logits_RV, impossible)
        rows = upload(self.rows, torch.long, logits_RV.device)
        return logits_RV.index_copy(0, rows, torch.where(allowed_GV, logits_RV[rows], impossible))


def _unpacked(words_GW: torch.Tensor, vocab_size: int, device: torch.device) -> torch.Tensor:
    """bool [G, V] on the device, there once the device gets to it; ids beyond the last word are false."""
    bytes_N = words_GW.to(device, non_blocking=True).view(torch.uint8).reshape(-1)
    # Eight bools take the place of one int64: each byte is looked up whole, the lowest bit first in memory.
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    octets = bits.bool().view(torch.int64)[:, 0]
    allowed_GV = torch.index_select(octets, 0, bytes_N.int()).view(torch.bool).view(words_GW.shape[0], -1)
    return torch.nn.functional.pad(allowed_GV, (0, max(0, vocab_size - allowed_GV.shape[1])))[:, :vocab_size]
