"""``plan --probe``: the real engine, loaded on this machine, generates some of the job's rows for a minute."""

import dataclasses
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from pathlib import Path

from batchinfer.cluster.choices import sequences_of_choices
from batchinfer.cluster.engine_loading import load_engine
from batchinfer.cluster.messages import ReplicaSetup
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import Engine, Sequence
from batchinfer.errors import InputError, ModelError
from batchinfer.models.files import has_tokenizer
from batchinfer.models.locate import locate_model
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.records import Prompt, SamplingParams
from batchinfer.speeds import Speed
from batchinfer.storage.filesystem import download_tree
from batchinfer.survey.pool import worker_pool
from batchinfer.survey.windows import ROWS_PER_WINDOW
from batchinfer.survey.worker import Surveyor, Task, WorkerSetup

#: Seconds that reading and generating are looked at for; a step that takes longer is waited for.
PREFILL_S = 10.0
DECODE_S = 30.0
#: Reading the prompts of the second part may take so long.
_DECODE_PREFILL_S = 20.0
#: Sequences of the first batch, which is thrown away: kernels are compiled, caches filled.
_WARM_UP_SEQUENCES = 4
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class TrialSetup:
    """What the process needs: a replica's setup, the surveyor's, and the rows to try."""

    replica: ReplicaSetup
    worker: WorkerSetup
    task: Task
    model: str
    device_name: str


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured."""

    speed: Speed
    load_s: float
    #: Sequences that generated at once, and those the engine could hold.
    num_sequences: int
    capacity: int


def run_trial(setup: TrialSetup) -> Trial:
    """Load the engine in a process of its own and measure it there; minutes for a large model.

    Raises ModelError for a model that cannot be loaded here or rows that have no prompt, RunInterrupted when the
    process is killed, out of memory say.
    """
    killed = "the probe was killed while it loaded or ran the model (out of memory, perhaps); lower engine limits"
    with worker_pool(1, _no_start, None, killed) as pool:
        return pool.submit(_trial, setup).result()


def _no_start(setup: object, stop: Event) -> None:
    """Nothing to prepare."""


def _trial(setup: TrialSetup) -> Trial:
    spec = setup.replica.spec
    surveyor = Surveyor(setup.worker)
    prompts = surveyor.prompts(setup.task)
    if not prompts:
        raise InputError("--probe: none of the sampled rows has a prompt; see the dead letters above")
    # Neighbours are alike: the first ones used are of all windows.
    prompts = [prompt for first in range(ROWS_PER_WINDOW) for prompt in prompts[first::ROWS_PER_WINDOW]]
    started_s = time.monotonic()

    def fetch(uri: str, target: Path) -> None:
        download_tree(uri, target, spec.model.storage_options)

    directory = locate_model(spec.model.path, setup.replica.model_revision, fetch=fetch)
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    loaded = load_engine(setup.replica, directory, Detokenizer(tokenizer) if tokenizer is not None else None)
    load_s = time.monotonic() - started_s
    try:
        measured = measure(loaded.engine, prompts)
    finally:
        loaded.engine.close()
    speed = Speed(
        model=setup.model,
        device=setup.device_name,
        engine=loaded.name,
        dtype=spec.model.dtype,
        source="probe",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        job=setup.replica.fingerprint,
        replica_s=measured.elapsed_s,
        num_prompt_tokens=measured.num_prompt_tokens,
        num_completion_tokens=measured.num_completion_tokens,
        num_completions=measured.num_ended,
        mean_completion_tokens=measured.mean_completion_tokens,
        prefill_tokens_per_s=measured.prefill_tokens_per_s,
        decode_tokens_per_s=measured.decode_tokens_per_s,
    )
    return Trial(speed, load_s, measured.num_sequences, loaded.engine.capacity)


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates of one engine; times and tokens are of the part in which its batch was at least half full."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    elapsed_s: float
    num_prompt_tokens: int
    num_completion_tokens: int
    num_sequences: int
    num_ended: int
    #: None where not all sequences ended in time: those that did are the short ones.
    mean_completion_tokens: float | None


def measure(
    engine: Engine, prompts: SequenceOf[Prompt], *, prefill_s: float = PREFILL_S, decode_s: float = DECODE_S
) -> Measured:
    """Read prompts for ``prefill_s``, then generate as many at once as the engine holds for ``decode_s``.

    The prompts are used in their order, again from the first when all have been used. Raises ModelError when the
    engine gives nothing to measure.
    """
    rows = _Rows(prompts)
    _generate(engine, rows.next(_WARM_UP_SEQUENCES, max_new_tokens=_WARM_UP_TOKENS))
    prefill = _prefill_rate(engine, rows, prefill_s)
    mean_length = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    number = int(max(1, min(engine.capacity, len(prompts), _DECODE_PREFILL_S * prefill / mean_length)))
    sequences = rows.next(number)
    before, began_s = engine.stats(), time.perf_counter()
    engine.submit(sequences)
    num_new: list[int] = []
    full_s, full = 0.0, before
    while engine.num_unfinished and (now_s := time.perf_counter() - began_s) < decode_s + _DECODE_PREFILL_S:
        num_new += [len(generation.token_ids) for generation in engine.step() if generation.error is None]
        # The end, when a few long rows are left, is a small part of a long run.
        if not full_s or (engine.num_unfinished >= len(sequences) / 2 and now_s < decode_s):
            full_s, full = time.perf_counter() - began_s, engine.stats()
    has_ended = engine.num_unfinished == 0
    engine.abort(sequence.sequence_id for sequence in sequences)
    num_prompt_tokens = full.num_prompt_tokens - before.num_prompt_tokens
    num_completion_tokens = full.num_completion_tokens - before.num_completion_tokens
    if not num_completion_tokens:
        raise ModelError("--probe: the engine generated nothing from the sampled rows; run the job on a few rows first")
    # Prompts are read between the steps of generating; what is left of the time is generating. Rates are noisy, so
    # that a short generation might have no time left at all.
    decode_elapsed_s = max(full_s - num_prompt_tokens / prefill, full_s / 10)
    return Measured(
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=num_completion_tokens / decode_elapsed_s,
        elapsed_s=full_s,
        num_prompt_tokens=num_prompt_tokens,
        num_completion_tokens=num_completion_tokens,
        num_sequences=len(sequences),
        num_ended=len(num_new),
        mean_completion_tokens=sum(num_new) / len(num_new) if has_ended and num_new else None,
    )


def _prefill_rate(engine: Engine, rows: "_Rows", prefill_s: float) -> float:
    """Prompt tokens per second of sequences that want one token; in batches that grow while there is time."""
    num_tokens, elapsed_s, number = 0, 0.0, _WARM_UP_SEQUENCES
    while elapsed_s < prefill_s and rows.num_unused:
        before, began_s = engine.stats().num_prompt_tokens, time.perf_counter()
        _generate(engine, rows.next(min(number, engine.capacity), max_new_tokens=1))
        elapsed_s += time.perf_counter() - began_s
        num_tokens += engine.stats().num_prompt_tokens - before
        number *= 2
    if not num_tokens:
        raise ModelError("--probe: too few of the sampled rows have a prompt to measure anything; raise --sample")
    return num_tokens / elapsed_s


def _generate(engine: Engine, sequences: SequenceOf[Sequence]) -> None:
    engine.submit(sequences)
    while engine.num_unfinished:
        engine.step()


class _Rows:
    """Prompts as sequences, each time under another row id."""

    def __init__(self, prompts: SequenceOf[Prompt]) -> None:
        self._prompts = prompts
        self._num_used = 0

    @property
    def num_unused(self) -> int:
        return max(0, len(self._prompts) - self._num_used)

    def next(self, number: int, max_new_tokens: int | None = None) -> list[Sequence]:
        """One sequence each of the next prompts; ``max_new_tokens`` greedy ones in place of the job's sampling."""
        sequences: list[Sequence] = []
        for _ in range(number):
            prompt = self._prompts[self._num_used % len(self._prompts)]
            prompt = dataclasses.replace(prompt, row_id=f"probe:{self._num_used}", conversation=None)
            self._num_used += 1
            if max_new_tokens is not None:
                sampling = SamplingParams(max_new_tokens=max_new_tokens)
                sequences.append(Sequence(dataclasses.replace(prompt, sampling=sampling, choice_token_ids=())))
            elif prompt.choice_token_ids:
                sequences += sequences_of_choices(prompt)
            else:
                sequences.append(Sequence(prompt))
        return sequences
