"""The audit of API requests: each row has as many samples as its own body asks for."""

from pathlib import Path

import pytest

from batchinfer.audit import verify, verify_deep
from tests.unit.export.batches import CHAT, line, said, write_output


def test_requests_may_ask_for_different_numbers_of_samples(tmp_path: Path) -> None:
    rows = [line("a", CHAT), line("b", {**CHAT, "n": 3}), line("c", {**CHAT, "n": 1})]
    output, _ = write_output(tmp_path, rows, {0: said("x"), 1: said("x", "y", "z"), 2: said("x")})
    assert verify(str(output)).verdict == "complete"
    assert verify_deep(str(output)).findings == ()


@pytest.mark.parametrize("number", [None, 3])
def test_a_row_with_another_number_of_samples_is_found(tmp_path: Path, number: int | None) -> None:
    rows = [line("a", CHAT), line("b", {**CHAT, "n": number} if number else CHAT)]
    output, plan = write_output(tmp_path, rows, {0: said("x"), 1: said("x", "y")})
    ((kind, named),) = [(found.kind, found.rows) for found in verify_deep(str(output)).findings]
    assert (kind, named) == ("wrong_samples", (plan.units[0].row_id(1),))
