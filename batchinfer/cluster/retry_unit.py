"""The way of a committed unit through a replica once more: only its dead letters are generated."""

import time
from collections import Counter

from batchinfer.cluster.journal_keeper import UnitJournal
from batchinfer.cluster.messages import Assignment, ProbeResult, RetryScope
from batchinfer.cluster.unit_pipeline import Outcome, UnitPipeline, Work, journaled
from batchinfer.records import UnitResult
from batchinfer.storage.layout import errors_part
from batchinfer.storage.location import Location
from batchinfer.storage.republish import lacking_rows, republish_unit
from batchinfer.storage.writer import REASON_LOST, PartFormat, read_reasons


class UnitRetry:
    """Stands in for the pipeline's own ``run`` and ``probe`` in a retry. Any number of threads may call at once."""

    def __init__(self, pipeline: UnitPipeline, output: Location, part: PartFormat, scope: RetryScope) -> None:
        self._pipeline = pipeline
        self._output = output
        self._part = part
        self._error_types = frozenset(scope.error_types)

    def run(self, assignment: Assignment) -> UnitResult:
        """Generate the unit's dead letters and publish it again with what came of them. May be repeated at any time.

        Raises what ``UnitPipeline.carry`` does. A crash at any moment leaves a unit in which every row is completed
        or a dead letter: the part as it was, or as it is to be.
        """
        return self._pipeline.carry(assignment, lambda it: self._pipeline.prepare(it, self._offsets(it)), self._publish)

    def probe(self, assignment: Assignment) -> ProbeResult:
        """Generate those dead letters of the unit that are at ``assignment.offsets`` and journal them."""
        tried = assignment.offsets
        return self._pipeline.carry(
            assignment,
            lambda it: self._pipeline.prepare(it, [offset for offset in self._offsets(it) if offset in tried]),
            journaled,
        )

    def _offsets(self, assignment: Assignment) -> list[int]:
        """Rows to generate: what the committed part lacks now, whatever an interrupted retry has added to it."""
        unit = assignment.unit
        lacking: list[int] = lacking_rows(self._output, unit).tolist()
        if not self._error_types:
            return lacking
        reasons = read_reasons(errors_part(self._output, unit.unit_id))
        types = {row_id: error.error_type for row_id, error in reasons.items()}
        return [offset for offset in lacking if types.get(unit.row_id(offset), REASON_LOST) in self._error_types]

    def _publish(self, work: Work, outcome: Outcome, journal: UnitJournal) -> UnitResult:
        unit = work.assignment.unit
        # A crash before or inside leaves the journal, from which the next retry takes what was generated.
        published = republish_unit(self._output, unit, work.rows, outcome.completions, outcome.errors, self._part)
        # A crash here leaves the journal of a unit that is done. Its rows are completed or have their reasons, so
        # nobody reads it; the next run or retry removes it.
        journal.remove()
        return UnitResult(
            unit_id=unit.unit_id,
            num_rows=unit.num_rows,
            num_completions=published.num_new_completions,
            num_dead_letters=published.num_dead_letters,
            num_prompt_tokens=sum(it.num_prompt_tokens for it in outcome.completions if it.sample == 0),
            num_completion_tokens=sum(len(it.token_ids) for it in outcome.completions),
            elapsed_s=time.monotonic() - work.started_s,
            num_resumed_tokens=outcome.num_resumed_tokens,
            num_shared_sequences=outcome.num_shared_sequences,
            dead_letters_by_type=dict(Counter(error.error_type for error in outcome.errors)),
            quality=self._pipeline.quality(outcome),
        )
