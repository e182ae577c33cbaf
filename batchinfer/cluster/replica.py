"""A replica: one copy of the model in one Ray actor, with threads that carry work units through it.

Every method answers with a value. A failure comes back as :class:`Failure`, because an exception of ours would
reach the driver wrapped in one of Ray's; an actor that dies is reported by Ray itself.
"""

import gc
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import ray
from ray.actor import ActorHandle

from batchinfer import grammar_rules
from batchinfer.cluster.engine_loading import load_engine
from batchinfer.cluster.engine_loop import EngineClosed, EngineFailed, EngineLoop
from batchinfer.cluster.idle_clock import IdleClock
from batchinfer.cluster.journal_keeper import JournalKeeper
from batchinfer.cluster.messages import (
    Assignment,
    Drained,
    Failure,
    ProbeResult,
    ReplicaProgress,
    ReplicaSetup,
    ReplicaStarted,
)
from batchinfer.cluster.retry_unit import UnitRetry
from batchinfer.cluster.texts import Texts
from batchinfer.cluster.unit_pipeline import UnitPipeline
from batchinfer.cluster.unit_spans import NO_UNIT_SPANS, UnitSpans
from batchinfer.detokenise import Detokenizer
from batchinfer.devices import processor_name
from batchinfer.errors import BatchinferError, InputError, JobError
from batchinfer.models.files import has_tokenizer
from batchinfer.models.locate import locate_model
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.prompts.columns import scores_choices
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.quality import CompletionJudge
from batchinfer.records import UnitResult
from batchinfer.storage.failures import RetryPolicy
from batchinfer.storage.filesystem import StorageOptions, download_tree, locate
from batchinfer.storage.shard_reader import ShardReader
from batchinfer.storage.writer import PartFormat
from batchinfer.tracing import NoSpans, Spans, open_spans

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Units one replica holds at most, and the calls it serves at once: those, questions for progress, and a drain.
MAX_UNITS_HELD = 64
MAX_CONCURRENCY = MAX_UNITS_HELD + 4
#: A drain's time for the engine's step and the journals; the run has 10 seconds in all.
DRAIN_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a started replica consists of."""

    engine_loop: EngineLoop
    pipeline: UnitPipeline
    #: Who carries units: the pipeline itself, or in a retry what stands in for it.
    units: UnitPipeline | UnitRetry
    journals: JournalKeeper


class Replica:
    """The actor's body. ``start`` is called once and answered before anything else is asked."""

    def __init__(self, setup: ReplicaSetup) -> None:
        self._setup = setup
        self._parts: _Parts | None = None
        self._unit_spans = NO_UNIT_SPANS
        faults = setup.chaos.of(setup.role, self._num_tokens_generated) if setup.chaos is not None else None
        self._policy = RetryPolicy(faults=faults)

    def start(self) -> ReplicaStarted | Failure:
        """Load tokenizer, model and engine; seconds to minutes."""
        started_s = time.monotonic()
        try:
            spans, parent = _spans(self._setup)
            self._unit_spans = UnitSpans(spans, parent)
            with spans.begin("start", parent):
                self._parts, started = _start(self._setup, self._policy, self._unit_spans, started_s)
            spans.flush()
        except JobError as error:
            return Failure("job", type(error).__name__, str(error))
        except Exception as error:
            # Whatever stopped the load (a busy GPU, a full disk) may not stop the next replica's: the driver decides.
            logger.exception("replica cannot start")
            return Failure("replica", type(error).__name__, str(error))
        _spare_garbage_collector()
        return started

    def generate(self, assignment: Assignment) -> UnitResult | Failure:
        """Carry one unit to its commit; blocks its thread, several run at once."""
        return self._carry(assignment, lambda units: units.run(assignment))

    def probe(self, assignment: Assignment) -> ProbeResult | Failure:
        """Generate and journal the rows at ``assignment.offsets``, which may be the death of this process."""
        return self._carry(assignment, lambda units: units.probe(assignment))

    def drain(self) -> Drained:
        """Journal what is in flight and generate nothing more; calls for units are answered as drained."""
        if self._parts is None:
            return Drained(0, 0)
        return self._parts.pipeline.drain(DRAIN_TIMEOUT_S)

    def progress(self) -> ReplicaProgress | Failure:
        """Counters so far; also how the driver notices an engine that broke with no unit in flight."""
        assert self._parts is not None
        engine_loop, pipeline = self._parts.engine_loop, self._parts.pipeline
        failure = engine_loop.failure
        # A unit in hand tells of it itself, once its journal is written: this answer is the end of the process.
        if failure is not None and not pipeline.num_in_hand:
            return Failure("replica", type(failure).__name__, str(failure))
        stats, journals = engine_loop.stats(), self._parts.journals
        return ReplicaProgress(
            stats,
            num_signs_of_life=stats.num_steps + pipeline.num_stages_done,
            idle_s_by_cause=engine_loop.idle_clock.seconds(),
            num_storage_retries=self._policy.retries.number,
            num_journal_flushes=journals.num_flushes,
            journal_s=journals.flush_s,
        )

    def _carry(self, assignment: Assignment, carry: Callable[[UnitPipeline | UnitRetry], Result]) -> Result | Failure:
        assert self._parts is not None
        try:
            with self._unit_spans.unit(assignment):
                return carry(self._parts.units)
        except EngineClosed as error:
            return Failure("drained", type(error).__name__, str(error))
        except EngineFailed as error:
            cause = error.__cause__ or error
            return Failure("replica", type(cause).__name__, str(cause))
        except BatchinferError as error:
            return Failure("unit", type(error).__name__, str(error))
        except Exception as error:
            # A mistake of ours must cost one unit's attempt, not the run; the log has the traceback.
            logger.exception("unit %s failed", assignment.unit.unit_id)
            return Failure("unit", type(error).__name__, str(error))

    def _num_tokens_generated(self) -> int:
        return 0 if self._parts is None else self._parts.engine_loop.stats().num_completion_tokens


def _spare_garbage_collector() -> None:
    """Have this process's collector look at new objects only, and seldom.

    With a thousand rows in flight a full collection stops the engine's thread for 0.2 s, and the small ones for a
    fifth of a millisecond each step. What is loaded by now stays to the end anyway.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def start_actor(setup: ReplicaSetup, name: str) -> "ActorHandle[Replica]":
    """Ask Ray for an actor with the replica's share; it waits for resources if it must.

    Ray's own restarts and retries are off: when and where a unit is tried again is the work queue's decision.
    """
    actor = ray.remote(Replica).options(
        name=name,
        num_cpus=setup.num_cpus,
        num_gpus=setup.num_gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=MAX_CONCURRENCY,
    )
    # Ray types options() as if it gave the class itself back.
    return cast("ActorHandle[Replica]", actor.remote(setup))


def _spans(setup: ReplicaSetup) -> tuple[Spans, str | None]:
    """Where this replica's spans go, and the span that they are children of."""
    if (tracing := setup.tracing) is None:
        return NoSpans(), None
    tracing.apply_environment()
    return open_spans(traces=True, run_id=setup.run_id, role=setup.role), tracing.parent


def _start(
    setup: ReplicaSetup, policy: RetryPolicy, spans: UnitSpans, started_s: float
) -> tuple[_Parts, ReplicaStarted]:
    spec = setup.spec
    fetch = partial(_fetch_model, storage_options=spec.model.storage_options, policy=policy)
    directory = locate_model(spec.model.path, setup.model_revision, fetch=fetch)
    # With token ids given, texts are a bonus that a directory without a tokenizer cannot give.
    wants_tokenizer = spec.prompt.token_ids is None or has_tokenizer(directory)
    tokenizer = load_tokenizer(directory) if wants_tokenizer else None
    detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
    engine = load_engine(setup, directory, detokenizer)
    renderer = PromptRenderer(
        spec.prompt,
        spec.sampling,
        tokenizer,
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        check_grammar=engine.grammars.problem if engine.grammars is not None else grammar_rules.refuse,
    )
    retry = setup.retry
    part = PartFormat(
        fingerprint=setup.fingerprint,
        run_id=setup.run_id,
        columns=setup.output_columns,
        n=spec.sampling.n,
        token_ids=spec.output.token_ids,
        # A request may ask for them; whether one will, its body says.
        logprobs=spec.sampling.logprobs is not None or spec.prompt.request is not None,
        choices=scores_choices(spec.prompt, spec.sampling, setup.schema),
        answers=spec.prompt.turns is not None,
        compression=spec.output.compression,
    )
    output = locate(spec.output.path, spec.output.storage_options, policy=policy)
    journal_fingerprint = setup.fingerprint if retry is None else retry.journal_fingerprint
    journals = JournalKeeper(output, journal_fingerprint, setup.run_id)
    idle_clock = IdleClock()
    pipeline = UnitPipeline(
        reader=ShardReader(
            partial(locate, storage_options=spec.input.storage_options, blames=InputError, policy=policy), setup.schema
        ),
        renderer=renderer,
        engine_loop=(engine_loop := EngineLoop(engine.engine, spec.execution.journal_interval_s, idle_clock)),
        idle_clock=idle_clock,
        texts=Texts(detokenizer, frozenset(engine.eos_token_ids)),
        output=output,
        part=part,
        journals=journals,
        judge=CompletionJudge(spec.quality.scripts, has_text=tokenizer is not None),
        spans=spans,
    )
    started = ReplicaStarted(
        capacity=engine.engine.capacity,
        engine=engine.name,
        device=engine.device,
        node=socket.gethostname(),
        node_id=ray.get_runtime_context().get_node_id(),
        start_s=time.monotonic() - started_s,
        device_name=_device_name(engine.device),
    )
    units = pipeline if retry is None else UnitRetry(pipeline, output, part, retry)
    return _Parts(engine_loop, pipeline, units, journals), started


def _device_name(device: str) -> str:
    """As ``nvidia-smi`` or the system calls it; empty for the fake engine, which has none."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return processor_name() if device == "cpu" else ""


def _fetch_model(uri: str, target: Path, storage_options: StorageOptions, policy: RetryPolicy) -> None:
    download_tree(uri, target, storage_options, policy=policy)
