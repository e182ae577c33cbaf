"""What every judge's form is made from: one question with its answers, and who gave them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.errors import OutputError


@dataclass(frozen=True, slots=True)
class Generator:
    """Who answered: the name that the judge shows, when, and how it sampled."""

    name: str
    created_s: int
    fingerprint: str
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """One input row with the model's words."""

    row_id: str
    #: The input's columns that were passed through.
    question: Mapping[str, Any]
    #: Of each sample its answers, one per turn.
    samples: tuple[tuple[str, ...], ...]
    #: The tokens of each answer, by the model's own tokenizer.
    num_tokens: tuple[tuple[int, ...], ...]

    def column(self, name: str) -> Any:
        """Of the input. Raises OutputError where it was not passed through."""
        if name not in self.question:
            raise OutputError(
                f"the column {name!r} is not beside the completions, and the judge needs it; the output has "
                f"{', '.join(self.question)}. Name it in output.columns, or leave that key out"
            )
        return self.question[name]

    def answer_id(self, generator: Generator) -> str:
        """22 characters, the same in every export; the projects themselves draw random ones of that length."""
        return hashlib.sha256(f"{generator.fingerprint} {self.row_id}".encode()).hexdigest()[:22]


@dataclass(frozen=True, slots=True)
class Judge:
    """The form that one judge reads."""

    #: As ``--format`` has it.
    name: str
    #: Name of the file with a generator's answers; its name as a file name is the argument.
    file_name: Callable[[str], str]
    answer: Callable[[AnsweredQuestion, Generator], dict[str, Any]]
    #: One JSON array instead of a line per answer.
    is_array: bool = False
