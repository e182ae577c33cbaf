"""The padded engine's KV cache: one rectangle per layer, written in place, its rows aligned at the right.

``transformers`` concatenates a new tensor per layer and step; here a step writes one column. The rectangle is
a *window* of larger buffers::

              0        first           end      columns allocated
        row 0 |  dead  | .. pad | KV KV |  free  |
        row 1 |  dead  | KV  KV   KV KV |  free  |
        row 2 |            free                  |

All rows end at ``end``. A group of new rows is prefilled straight into the free rows below, with its last
token in column ``end - 1``, and is then part of the batch: nothing is merged. When a row leaves, the last row
moves into its place. When columns or rows run out, the live rectangle moves to larger buffers.

Every layer keeps all columns: where a layer attends to a sliding window only, the model's mask cuts it.
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

#: Columns are allocated in multiples of this, and at least a quarter of the width ahead.
_COLUMN_CHUNK = 64


class _Window:
    """Where the next forward pass reads and writes; shared by all layers."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.first = 0
        self.end = 0
        self.num_allocated_rows = 0
        self.num_allocated_columns = 0


class _WindowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's buffers ``[rows, heads, columns, head_dim]``; allocated when the first states show their shape.

    Presents itself as a full-attention layer of ``end - first`` tokens, which is all that masks ask for.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, window: _Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states behind the window; return the window with them. The window itself does not move."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._window
        end = window.end + key_states.shape[-2]
        self.keys[window.rows, :, window.end : end] = key_states
        self.values[window.rows, :, window.end : end] = value_states
        return self.keys[window.rows, :, window.first : end], self.values[window.rows, :, window.first : end]

    def get_seq_length(self) -> int:
        return self._window.end - self._window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def relocate(self, num_rows: int, old: slice, new: slice) -> None:
        """New buffers of the window's allocated size, with ``num_rows`` rows of the old columns at the new ones."""
        if self.is_initialized:
            for name in ("keys", "values"):
                states = getattr(self, name)
                fresh = self._allocate(states)
                fresh[:num_rows, :, new] = states[:num_rows, :, old]
                setattr(self, name, fresh)

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros, since attention multiplies masked values by 0 and leftovers could be NaN."""
        shape = (self._window.num_allocated_rows, like.shape[1], self._window.num_allocated_columns, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


class PaddedCache(Cache):
    """KV of the batch. ``num_rows`` rows are live, in columns ``end - width`` to ``end``.

    After an out-of-memory error in any method or forward pass the content is undefined: :meth:`release` it.
    """

    def __init__(self, num_layers: int, max_rows: int, max_tokens: int) -> None:
        """Buffers hold some reserve, but for its sake no more than these rows and rows times columns."""
        self._window = _Window()
        super().__init__(layers=[_WindowLayer(self._window) for _ in range(num_layers)])
        self._max_rows = max_rows
        self.max_tokens = max_tokens
        self.num_rows = 0
        self._end = 0

    def open_prefill(self, num_new: int, num_to_prefill: int, width: int, old_width: int) -> None:
        """The next forward pass prefills ``num_to_prefill`` rows of ``width`` columns below the live rows.

        Room is made for ``num_new`` rows, among them copies (see :meth:`close_prefill`). ``old_width`` is the
        live rows' width.
        """
        if self.num_rows == 0:
            self._end = width
        self._make_room(self.num_rows + num_new, max(width, old_width), old_width)
        first = self._end - width
        for layer in self._allocated_layers():
            layer.keys[self.num_rows : self.num_rows + num_new, :, :first] = 0
            layer.values[self.num_rows : self.num_rows + num_new, :, :first] = 0
        self._window.rows = slice(self.num_rows, self.num_rows + num_to_prefill)
        self._window.first = self._window.end = first

    def close_prefill(self, num_prefilled: int, copies_of: Sequence[int]) -> None:
        """The prefilled rows are live, followed by copies of some of them (indices into the prefilled)."""
        start = self.num_rows + num_prefilled
        if copies_of:
            for layer in self._allocated_layers():
                for states in (layer.keys, layer.values):
                    sources = torch.tensor([self.num_rows + index for index in copies_of], device=states.device)
                    states[start : start + len(copies_of), :, : self._end] = states[sources, :, : self._end]
        self.num_rows = start + len(copies_of)

    def open_decode(self, width: int) -> None:
        """The next forward pass adds one column to the live rows, whose width is ``width`` before it."""
        self._make_room(self.num_rows, width, width)
        self._window.rows = slice(0, self.num_rows)
        self._window.first, self._window.end = self._end - width, self._end

    def close_decode(self) -> None:
        """The column is live."""
        self._end += 1

    def remove_rows(self, moves: Sequence[tuple[int, int]], num_left: int) -> None:
        """``num_left`` rows stay; ``moves`` (to, from) bring those beyond into the places that became free."""
        if moves:
            for layer in self._allocated_layers():
                for states in (layer.keys, layer.values):
                    targets = torch.tensor([target for target, _ in moves], device=states.device)
                    sources = torch.tensor([source for _, source in moves], device=states.device)
                    states[targets, :, : self._end] = states[sources, :, : self._end]
        self.num_rows = num_left

    def release(self) -> None:
        """Give the buffers back."""
        for index in range(len(self.layers)):
            self.layers[index] = _WindowLayer(self._window)
        self._window.num_allocated_rows = self._window.num_allocated_columns = 0
        self.num_rows = self._end = 0

    def _allocated_layers(self) -> list[_WindowLayer]:
        return [layer for layer in self.layers if isinstance(layer, _WindowLayer) and layer.is_initialized]

    def _make_room(self, num_rows: int, width: int, old_width: int) -> None:
        """At least ``num_rows`` rows, ``width`` columns left of the end and one right of it."""
        window = self._window
        has_rows = num_rows <= window.num_allocated_rows
        if has_rows and width <= self._end < window.num_allocated_columns:
            return
        ahead = max(_COLUMN_CHUNK, width // 4)
        num_columns = -(-(width + ahead) // _COLUMN_CHUNK) * _COLUMN_CHUNK
        window.num_allocated_rows = max(num_rows, min(2 * num_rows, self._max_rows, self.max_tokens // num_columns))
        window.num_allocated_columns = num_columns
        old, new = slice(self._end - old_width, self._end), slice(width - old_width, width)
        for layer in self._allocated_layers():
            layer.relocate(self.num_rows, old, new)
        self._end = width
