"""``prompt.sampling_column``: a row's own sampling values over the job's."""

import json
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from batchinfer import grammar_rules
from batchinfer.errors import RowRejected, SpecError
from batchinfer.prompts.columns import SAMPLING_TYPES
from batchinfer.records import SamplingParams
from batchinfer.spec import SamplingSpec

#: Distinct override combinations kept checked; a job has a handful, unless it varies the seed by row.
_MAX_CACHED = 4096
#: And characters of the schemas and patterns among them.
_MAX_CACHED_CHARS = 1 << 24
#: What a completion has to be; a row that says it takes the place of what the job says.
_FORMS = ("json_schema", "regex", "choices")

#: What is wrong with the grammar of some params, beginning with its key; empty = nothing.
CheckGrammar = Callable[[SamplingParams], str]


class RowSampling:
    """Checked sampling parameters of rows; equal overrides are checked once. Safe to share between threads.

    ``vocab_size`` bounds ``stop_token_ids`` (None = unchecked); without ``decodes`` there is no tokenizer to find stop
    strings with. ``check_grammar`` knows the engine's tokenizer where there is one. Raises SpecError if the job's own
    values break a rule.
    """

    def __init__(
        self,
        sampling: SamplingSpec,
        vocab_size: int | None,
        *,
        decodes: bool,
        check_grammar: CheckGrammar = grammar_rules.problem,
    ) -> None:
        self._job_values = sampling.model_dump()
        self._vocab_size = vocab_size
        self._decodes = decodes
        self._check_grammar = check_grammar
        self._cache: dict[tuple[tuple[str, object], ...], SamplingParams | RowRejected] = {}
        self._num_cached_chars = 0
        #: What rows without overrides use.
        self.job_params = sampling.params()
        problem = self._misfit(self.job_params)
        if problem:
            raise SpecError(f"sampling.{problem}")

    def params(self, override: Mapping[str, object] | None) -> SamplingParams:
        """The job's values with the non-null ones of ``override`` over them. Raises RowRejected("bad_sampling")."""
        if override is None:
            return self.job_params
        key = tuple((name, _hashable(value)) for name, value in override.items() if value is not None)
        if not key:
            return self.job_params
        found = self._cache.get(key)
        if found is None:
            found = self._checked(key)
            num_chars = sum(len(value) for _, value in key if isinstance(value, str))
            if len(self._cache) >= _MAX_CACHED or self._num_cached_chars + num_chars > _MAX_CACHED_CHARS:
                self._cache.clear()
                self._num_cached_chars = 0
            self._num_cached_chars += num_chars
            self._cache[key] = found
        if isinstance(found, RowRejected):
            raise RowRejected(found.error_type, found.error)
        return found

    def _checked(self, key: tuple[tuple[str, object], ...]) -> SamplingParams | RowRejected:
        values = {name: _as_spec_value(name, value) for name, value in key}
        try:
            job_values = self._job_values
            if not values.keys().isdisjoint(_FORMS):
                job_values = {name: value for name, value in job_values.items() if name not in _FORMS}
            params = SamplingSpec.model_validate({**job_values, **values}).params()
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            return RowRejected("bad_sampling", f"{where}: {message}" if where else message)
        problem = self._misfit(params)
        return RowRejected("bad_sampling", problem) if problem else params

    def _misfit(self, params: SamplingParams) -> str:
        if params.stop and not self._decodes:
            return "stop: stop strings need a tokenizer and the model has none; use stop_token_ids"
        if params.choices and not self._decodes:
            return "choices: choices are texts, and need a tokenizer; the model has none"
        if self._vocab_size is not None and params.stop_token_ids and max(params.stop_token_ids) >= self._vocab_size:
            return f"stop_token_ids: {max(params.stop_token_ids)} is outside the model's {self._vocab_size} token ids"
        if params.has_grammar and not self._decodes:
            return "json_schema and regex are about text, and need a tokenizer; the model has none"
        return self._check_grammar(params)


def _hashable(value: object) -> object:
    """A schema may come as an object; its members' order counts."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return tuple(value) if isinstance(value, list) else value


def _as_spec_value(name: str, value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and value.is_integer() and SAMPLING_TYPES.get(name) == "integer":
        return int(value)
    return value
