"""Everything decided before a GPU is taken: is the job right, what does its output hold, which units are left.

Only reads. ``plan`` stops here; ``run`` goes on from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from batchinfer import grammar_rules
from batchinfer.cluster.messages import RetryScope
from batchinfer.cluster.part_types import refuse_other_types
from batchinfer.cluster.tally import Tally
from batchinfer.errors import FingerprintMismatch, ModelError, SpecError
from batchinfer.fingerprint import Fingerprint, diff, fingerprint
from batchinfer.models.files import check_config_files, has_chat_template, max_model_len, read_config
from batchinfer.models.identity import tokenizer_identity
from batchinfer.models.locate import Preflight, locate_model, preflight
from batchinfer.planner import (
    InputPlan,
    check_output_apart,
    columns_to_read,
    merge_plans,
    plan_input,
    refuse_mixed_columns,
)
from batchinfer.prompts.columns import (
    NO_CHAT_TEMPLATE,
    check_schema,
    columns_to_deliver,
    expected_types,
    json_text_columns,
    required_columns,
    scores_choices,
)
from batchinfer.records import ANSWERS, CHOICES, Plan, WorkUnit
from batchinfer.spec import JobSpec
from batchinfer.storage.dead_letters import look_at_dead_letters
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import download_tree, locate
from batchinfer.storage.layout import COMPLETIONS, ERRORS, check_usable, parse_unit_id, parts, read_job, read_plan
from batchinfer.storage.leftovers import has_leftovers
from batchinfer.storage.location import Location


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What follows from job file, model and input alone, whatever the output holds."""

    spec: JobSpec
    model: Preflight
    fingerprint: Fingerprint
    max_model_len: int
    input: InputPlan
    #: Columns to read with their types, and those of them that are passed through.
    schema: pa.Schema
    output_columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retry:
    """What makes a preparation one of dead letters: its pending units are committed ones."""

    scope: RetryScope
    #: The output's own, which its parts keep.
    fingerprint: Fingerprint
    #: Limits that are not those of the output's job: fingerprint part to old and new value.
    changed: Mapping[str, tuple[str, str]]
    #: Dead letters of the pending units.
    num_dead_letters: int
    #: Units that were never committed; they are a run's business, and so are their journals.
    uncommitted: tuple[WorkUnit, ...]


@dataclass(frozen=True, slots=True)
class Preparation:
    """A job held against its output. ``plan`` is what the output is to hold after this run."""

    facts: JobFacts
    output: Location
    plan: Plan
    #: plan.parquet is missing or says something else.
    plan_changed: bool
    #: The output holds no job yet.
    is_new: bool
    #: Committed units of shards that have changed since; their parts leave the product.
    superseded: tuple[str, ...]
    pending: tuple[WorkUnit, ...]
    num_units_committed: int
    num_rows_committed: int
    num_dead_letters: int
    #: Committed units whose errors part tells of other rows than those their completions part lacks.
    unfit_errors: tuple[WorkUnit, ...] = ()
    #: Nothing is left to generate, but a crash left a lease, a journal or unfinished bytes behind.
    has_leftovers: bool = False
    retry: Retry | None = None

    @property
    def is_settled(self) -> bool:
        """Whether a run would have nothing to generate and nothing to write."""
        return not (self.pending or self.plan_changed or self.unfit_errors or self.has_leftovers)

    @property
    def spec(self) -> JobSpec:
        return self.facts.spec

    @property
    def fingerprint(self) -> Fingerprint:
        """What parts are written under."""
        return self.facts.fingerprint if self.retry is None else self.retry.fingerprint

    @property
    def units_to_resume(self) -> tuple[WorkUnit, ...]:
        """Units whose journals are of use, now or to the next run."""
        return self.pending if self.retry is None else self.pending + self.retry.uncommitted

    def tally(self) -> Tally:
        """A count that starts from what the output holds."""
        return Tally(
            num_rows=self.plan.num_rows,
            num_units=len(self.plan.units),
            num_rows_before=self.num_rows_committed,
            num_units_before=self.num_units_committed,
            num_dead_letters_before=self.num_dead_letters,
            samples_per_row=len(self.spec.sampling.choices) or self.spec.sampling.n,
        )


def prepare(spec: JobSpec, policy: RetryPolicy | None = None) -> Preparation:
    """Check the job from every side that needs no GPU, and find what is left to do. Writes nothing to the output.

    ``policy`` is how storage is called, from here on to the end of the run (None = the usual way).

    Raises:
        JobError: job file, model, input or output are wrong; says where and the way out.
        StorageUnavailable: input or output cannot be reached just now.
    """
    check_output_apart(spec.input.paths, spec.output.path)
    output = locate(spec.output.path, spec.output.storage_options, policy=policy)
    check_usable(output)
    return compare_with_output(look_at_job(spec, policy), output)


def look_at_job(spec: JobSpec, policy: RetryPolicy | None = None) -> JobFacts:
    """Model and input of a job; reads the model's small files and the shards' footers."""
    _check_grammar(spec)
    model = _look_at_model(spec, policy)
    if spec.prompt.applies_chat_template and not has_chat_template(model.directory):
        raise ModelError(f"{model.directory}: {NO_CHAT_TEMPLATE}")
    found = _look_at_input(spec, policy)
    for each in found.schemas:
        check_schema(spec.prompt, spec.sampling, each.schema, f"shard {each.example.path}")
    has_choices = any(scores_choices(spec.prompt, spec.sampling, each.schema) for each in found.schemas)
    needed = columns_to_deliver(spec.prompt, (each.schema for each in found.schemas))
    added = [name for name, adds in ((CHOICES, has_choices), (ANSWERS, spec.prompt.turns is not None)) if adds]
    schema, output_columns = columns_to_read(found.schemas, needed, spec.output.columns, added)
    return JobFacts(
        spec=spec,
        model=model,
        fingerprint=fingerprint(spec, model.identity),
        max_model_len=_limit(spec, model.directory),
        input=found,
        schema=schema,
        output_columns=output_columns,
    )


def _look_at_input(spec: JobSpec, policy: RetryPolicy | None) -> InputPlan:
    found = plan_input(
        spec.input.paths,
        spec.input.storage_options,
        spec.execution.rows_per_unit,
        policy,
        spec.input.format,
        json_text_columns(spec.prompt),
        expected_types(spec.prompt),
    )
    refuse_mixed_columns(found.schemas, required_columns(spec.prompt))
    return found


def compare_with_output(facts: JobFacts, output: Location) -> Preparation:
    """Hold a job against what its output holds at this moment.

    Raises:
        FingerprintMismatch: the output was begun by a job that generates something else; lists the differences.
    """
    job = read_job(output)
    if job is not None:
        _refuse_other_job(facts.fingerprint, job, output)
    committed = parts(output, COMPLETIONS)
    before = read_plan(output)
    merged = merge_plans(before, facts.input.plan, committed)
    staying = committed.keys() - set(merged.superseded_units)
    dead_letters = look_at_dead_letters(output, committed, parts(output, ERRORS))
    done: list[WorkUnit] = []
    pending: list[WorkUnit] = []
    for unit in merged.plan.units:
        (done if unit.unit_id in committed else pending).append(unit)
    is_jsonl = any(shard.lines is not None for shard in merged.plan.shards)
    if is_jsonl and pending and staying:
        written, columns = min(staying), [facts.schema.field(name) for name in facts.output_columns]
        refuse_other_types(output, written, committed[written], pa.schema(columns))
    return Preparation(
        facts=facts,
        output=output,
        plan=merged.plan,
        plan_changed=job is None or before is None or _shape(before) != _shape(merged.plan),
        is_new=job is None,
        superseded=merged.superseded_units,
        pending=tuple(pending),
        num_units_committed=len(done),
        num_rows_committed=sum(unit.num_rows for unit in done),
        num_dead_letters=dead_letters.of(staying),
        unfit_errors=tuple(
            found for name in dead_letters.unfit if name in staying and (found := parse_unit_id(name)) is not None
        ),
        has_leftovers=job is not None and not pending and has_leftovers(output),
    )


def _check_grammar(spec: JobSpec) -> None:
    check = grammar_rules.problem if spec.engine.kind != "fake" else grammar_rules.refuse
    problem = check(spec.sampling.params())
    if problem:
        raise SpecError(f"sampling.{problem}")


def _look_at_model(spec: JobSpec, policy: RetryPolicy | None) -> Preflight:
    fetch = partial(_fetch, spec, policy)
    needs_tokenizer = spec.prompt.token_ids is None
    if spec.engine.kind != "fake":
        return preflight(spec.model.path, spec.model.revision, needs_tokenizer=needs_tokenizer, fetch=fetch)
    # The fake engine needs a tokenizer at most, so a directory without weights will do.
    directory = locate_model(spec.model.path, spec.model.revision, fetch=fetch)
    check_config_files(directory, needs_tokenizer=needs_tokenizer)
    return Preflight(directory, None, tokenizer_identity(directory))


def _fetch(spec: JobSpec, policy: RetryPolicy | None, uri: str, target: Path) -> None:
    download_tree(uri, target, spec.model.storage_options, policy=policy)


def _limit(spec: JobSpec, directory: Path) -> int:
    limit = max_model_len(read_config(directory), spec.model.max_model_len)
    if spec.sampling.min_new_tokens >= limit:
        raise ModelError(
            f"sampling.min_new_tokens {spec.sampling.min_new_tokens} leaves no room for a prompt in the model's "
            f"{limit} tokens; lower it"
        )
    return limit


def _refuse_other_job(ours: Fingerprint, job: dict[str, object], output: Location) -> None:
    if job.get("fingerprint") == ours.digest:
        return
    parts = job.get("fingerprint_parts")
    theirs = {str(name): str(value) for name, value in parts.items()} if isinstance(parts, dict) else {}
    differences = "\n".join(f"  {line}" for line in diff(theirs, ours.parts))
    raise FingerprintMismatch(
        f"{output} was begun by a job that generates something else:\n{differences}\n"
        "Change the job back, or choose another output.path."
    )


def _shape(plan: Plan) -> tuple[object, ...]:
    """What plan.parquet must say; uris may differ, since an input may move."""
    return (
        tuple((shard.shard_id, shard.rows_per_unit) for shard in plan.shards),
        tuple((shard.shard_id, shard.rows_per_unit) for shard in plan.retired),
        tuple((shard.path, shard.size_bytes) for shard in plan.unreadable),
    )
