"""How much a step may carry on a device that ran out of memory: half at once, twice as much by and by.

Pure Python. A lack of memory may pass (another process took it, or one long row did and is gone), so limits rise
again after a while without one. Where that was too early the while doubles, so a device that is just smaller than
expected fails a number of times that grows with the logarithm of its steps.
"""

__all__ = ["StepLimits"]

#: Steps that must fit before more is tried for the first time.
_FIRST_PATIENCE = 64


class StepLimits:
    """Rows and tokens of a step: at most what was given, and less for as long as it does not fit."""

    def __init__(self, max_rows: int, max_step_tokens: int) -> None:
        self.max_rows = max_rows
        self.max_step_tokens = max_step_tokens
        self._most_rows = max_rows
        self._most_step_tokens = max_step_tokens
        self._patience = _FIRST_PATIENCE
        self._num_fitting = 0
        self._has_risen = False

    def step_failed(self, num_tokens: int) -> None:
        """A step of so many tokens did not fit: from now on half of it. Rows are spared as long as tokens can go."""
        if self._has_risen:
            self._patience *= 2
            self._has_risen = False
        self._num_fitting = 0
        self._set(max(1, num_tokens // 2))

    def step_fitted(self) -> bool:
        """A step was launched; true if the limits have risen with it."""
        if self.max_step_tokens == self._most_step_tokens:
            return False
        self._num_fitting += 1
        if self._num_fitting < self._patience:
            return False
        self._num_fitting = 0
        self._has_risen = True
        self._set(2 * self.max_step_tokens)
        return True

    def _set(self, num_tokens: int) -> None:
        self.max_step_tokens = min(num_tokens, self._most_step_tokens)
        self.max_rows = min(self._most_rows, self.max_step_tokens)
