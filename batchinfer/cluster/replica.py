"""A replica: one copy of the model in one Ray actor, with threads that carry work units through it.

Every method answers with a value. A failure comes back as :class:`Failure`, because an exception of ours would
reach the driver wrapped in one of Ray's; an actor that dies is reported by Ray itself.
"""

import logging
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import ray
from ray.actor import ActorHandle

from batchinfer.cluster.engine_loading import load_engine
from batchinfer.cluster.engine_loop import EngineClosed, EngineFailed, EngineLoop
from batchinfer.cluster.messages import Assignment, Failure, ReplicaProgress, ReplicaSetup, ReplicaStarted
from batchinfer.cluster.unit_pipeline import Texts, UnitPipeline
from batchinfer.detokenise import Detokenizer
from batchinfer.errors import BatchinferError, InputError, JobError
from batchinfer.models.files import has_tokenizer
from batchinfer.models.locate import locate_model
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import UnitResult
from batchinfer.storage.filesystem import StorageOptions, download_tree, locate
from batchinfer.storage.reader import ParquetReader
from batchinfer.storage.writer import PartFormat

logger = logging.getLogger(__name__)

#: Units one replica holds at most, and the calls it serves at once: those, and a question for progress.
MAX_UNITS_HELD = 64
MAX_CONCURRENCY = MAX_UNITS_HELD + 2


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a started replica consists of."""

    engine_loop: EngineLoop
    pipeline: UnitPipeline


class Replica:
    """The actor's body. ``start`` is called once and answered before anything else is asked."""

    def __init__(self, setup: ReplicaSetup) -> None:
        self._setup = setup
        self._parts: _Parts | None = None

    def start(self) -> ReplicaStarted | Failure:
        """Load tokenizer, model and engine; seconds to minutes."""
        started_s = time.monotonic()
        try:
            self._parts, started = _start(self._setup, started_s)
        except JobError as error:
            return Failure("job", type(error).__name__, str(error))
        except Exception as error:
            # Whatever stopped the load (a busy GPU, a full disk) may not stop the next replica's: the driver decides.
            logger.exception("replica cannot start")
            return Failure("replica", type(error).__name__, str(error))
        return started

    def generate(self, assignment: Assignment) -> UnitResult | Failure:
        """Carry one unit to its commit; blocks its thread, several run at once."""
        assert self._parts is not None
        try:
            return self._parts.pipeline.run(assignment)
        except (EngineFailed, EngineClosed) as error:
            cause = error.__cause__ or error
            return Failure("replica", type(cause).__name__, str(cause))
        except BatchinferError as error:
            return Failure("unit", type(error).__name__, str(error))
        except Exception as error:
            # A mistake of ours must cost one unit's attempt, not the run; the log has the traceback.
            logger.exception("unit %s failed", assignment.unit.unit_id)
            return Failure("unit", type(error).__name__, str(error))

    def progress(self) -> ReplicaProgress | Failure:
        """Counters so far; also how the driver notices an engine that broke with no unit in flight."""
        assert self._parts is not None
        failure = self._parts.engine_loop.failure
        if failure is not None:
            return Failure("replica", type(failure).__name__, str(failure))
        return ReplicaProgress(self._parts.engine_loop.stats())


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


def _start(setup: ReplicaSetup, started_s: float) -> tuple[_Parts, ReplicaStarted]:
    spec = setup.spec
    fetch = partial(_fetch_model, storage_options=spec.model.storage_options)
    directory = locate_model(spec.model.path, setup.model_revision, fetch=fetch)
    # With token ids given, texts are a bonus that a directory without a tokenizer cannot give.
    wants_tokenizer = spec.prompt.token_ids is None or has_tokenizer(directory)
    tokenizer = load_tokenizer(directory) if wants_tokenizer else None
    detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
    engine = load_engine(setup, directory, detokenizer)
    renderer = PromptRenderer(
        spec.prompt, spec.sampling, tokenizer, max_model_len=engine.max_model_len, vocab_size=engine.vocab_size
    )
    pipeline = UnitPipeline(
        reader=ParquetReader(
            partial(locate, storage_options=spec.input.storage_options, blames=InputError), setup.schema
        ),
        renderer=renderer,
        engine_loop=(engine_loop := EngineLoop(engine.engine)),
        texts=Texts(detokenizer, frozenset(engine.eos_token_ids)),
        output=locate(spec.output.path, spec.output.storage_options),
        part=PartFormat(
            fingerprint=setup.fingerprint,
            run_id=setup.run_id,
            columns=setup.output_columns,
            n=spec.sampling.n,
            token_ids=spec.output.token_ids,
            logprobs=spec.sampling.logprobs is not None,
            compression=spec.output.compression,
        ),
    )
    started = ReplicaStarted(
        capacity=engine.engine.capacity,
        engine=engine.name,
        device=engine.device,
        node=socket.gethostname(),
        start_s=time.monotonic() - started_s,
    )
    return _Parts(engine_loop, pipeline), started


def _fetch_model(uri: str, target: Path, storage_options: StorageOptions) -> None:
    download_tree(uri, target, storage_options)
