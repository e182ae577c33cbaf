"""``prompt.sampling_template``: a row's own sampling values, written by a template over its columns."""

import json
from collections.abc import Mapping

from pydantic_core import from_json

from batchinfer.errors import RowRejected
from batchinfer.prompts.template import RowTemplate

#: The output's shape follows from these; an input column may vary them, since its type says so before the run.
_OF_THE_JOB = ("n", "logprobs", "choices")


class SamplingTemplate:
    """A compiled template whose text is a JSON object of ``sampling`` fields. Raises SpecError as RowTemplate does."""

    def __init__(self, source: str) -> None:
        self._template = RowTemplate(source, key="prompt.sampling_template")
        #: Every column the template may read; sorted.
        self.columns = self._template.columns

    def override(self, row: Mapping[str, object]) -> Mapping[str, object]:
        """The fields of one row, their values still unchecked. Raises RowRejected("bad_sampling")."""
        try:
            values = from_json(self._template.render(row), allow_inf_nan=False)
        except RowRejected as error:
            raise RowRejected("bad_sampling", f"prompt.sampling_template: {error.error}") from None
        except ValueError as error:
            raise RowRejected("bad_sampling", f"prompt.sampling_template wrote no JSON: {error}") from None
        if not isinstance(values, dict):
            raise RowRejected("bad_sampling", "prompt.sampling_template wrote no JSON object")
        fixed = [name for name in _OF_THE_JOB if name in values]
        if fixed:
            raise RowRejected(
                "bad_sampling", f"prompt.sampling_template: {fixed[0]} is the same for every row of a job"
            )
        return {name: _flat(name, value) for name, value in values.items()}


def _flat(name: str, value: object) -> object:
    """As a column would bring it: scalars, lists of scalars, and an object (a JSON schema) as its text."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        raise RowRejected("bad_sampling", f"prompt.sampling_template: {name} holds lists or objects in a list")
    return value
