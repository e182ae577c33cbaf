"""All that ``plan`` tells beyond counting units: put together from workers, the speeds that are known, and a probe."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event

from batchinfer.cluster.messages import ReplicaSetup
from batchinfer.cluster.prepare import Preparation
from batchinfer.cluster.share import NodeSize, ReplicaShare, replica_share
from batchinfer.cluster.speed_meter import SPEED_EVENTS, last_speed
from batchinfer.devices import Gpu, local_gpus, num_cores, processor_name
from batchinfer.errors import SpecError
from batchinfer.speeds import Speed, model_key, read_speeds, remember_speed, speeds_file
from batchinfer.storage.events import read_events
from batchinfer.survey.estimate import Estimate, Lengths, Workload, fitting_speeds, replica_seconds
from batchinfer.survey.memory import MemoryFit, devices_of, fit_memory
from batchinfer.survey.pool import worker_pool
from batchinfer.survey.prompts import OnProgress, PromptSurvey, survey_prompts, task_of
from batchinfer.survey.trial import Trial, TrialSetup, run_trial
from batchinfer.survey.windows import sample_windows
from batchinfer.survey.worker import WorkerSetup

#: Rows that a probe draws its prompts from.
_PROBE_ROWS = 1024


@dataclass(frozen=True, slots=True)
class SurveyOptions:
    """What to look at: ``num_rows`` of the rows left (None = all of them, 0 = none)."""

    num_rows: int | None
    probe: bool = False
    device_memory_gib: float | None = None
    price_per_gpu_hour: float | None = None


@dataclass(frozen=True, slots=True)
class PlanSurvey:
    """What was found; None = not looked at, or nothing known."""

    prompts: PromptSurvey | None
    memory: MemoryFit | None
    trial: Trial | None
    estimate: Estimate | None
    #: Why there is no estimate.
    unknown: str

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "prompts": None if self.prompts is None else self.prompts.as_json(),
            "memory": None if self.memory is None else self._memory_json(self.memory),
            "probe": None if self.trial is None else asdict(self.trial),
            "estimate": None if self.estimate is None else self.estimate.as_json(),
            "estimate_unknown": self.unknown or None,
        }

    def _memory_json(self, memory: MemoryFit) -> dict[str, object]:
        lengths = self.lengths
        return {
            "engine": memory.engine,
            "dtype": memory.dtype,
            "weights_bytes": memory.weights_bytes,
            "kv_bytes_per_token": memory.kv_bytes_per_token,
            "devices": [
                {
                    "name": fit.device.name,
                    "kind": fit.device.kind,
                    "count": fit.device.count,
                    "fits": fit.fits,
                    "num_kv_tokens": fit.num_tokens,
                    "num_sequences_of_mean_length": fit.num_sequences(lengths[0]) if lengths else None,
                    "num_sequences_of_greatest_length": fit.num_sequences(lengths[1]) if lengths else None,
                }
                for fit in memory.fits
            ],
        }

    @property
    def lengths(self) -> tuple[float, float] | None:
        """Tokens of a sequence, prompt and completion as long as it may be: on average, and of the longest prompt."""
        if self.prompts is None or not self.prompts.num_completions:
            return None
        new_tokens = self.prompts.max_new_tokens / self.prompts.num_completions
        return self.prompts.mean_length + new_tokens, self.prompts.longest + new_tokens


def survey_plan(
    preparation: Preparation,
    options: SurveyOptions,
    on_progress: OnProgress,
    on_found: Callable[[PlanSurvey], None] = lambda found: None,
) -> PlanSurvey:
    """Look at what is left of a job. Writes nothing but the probe's speed into the user's cache.

    ``on_found`` is given what is known of prompts and memory before the probe, which takes minutes, and the estimate.

    Raises JobError for what would end the run too (a template that does not parse, a model no engine runs),
    StorageUnavailable, RunInterrupted when a worker process is killed, and SpecError for a probe without a model.
    """
    spec = preparation.spec
    if options.probe and spec.engine.kind == "fake":
        raise SpecError("--probe: the fake engine has no model whose speed could be measured; set engine.kind")
    gpus = local_gpus()
    with _memory_fit(preparation, gpus, options.device_memory_gib) as fit:
        prompts = None
        if options.num_rows != 0 and preparation.pending:
            prompts = survey_prompts(
                worker_setup(preparation),
                preparation.plan.shards,
                preparation.pending,
                num_rows=options.num_rows,
                on_progress=on_progress,
            )
        memory = None if fit is None else fit.result()
    on_found(PlanSurvey(prompts, memory, None, None, ""))
    trial = None
    if options.probe and preparation.pending:
        trial = _probe(preparation, gpus)
        remember_speed(trial.speed, speeds_file())
    estimate = None if prompts is None else _estimate(preparation, options, prompts, trial, gpus)
    return PlanSurvey(prompts, memory, trial, estimate, "" if estimate is not None else _unknown(preparation, prompts))


def worker_setup(preparation: Preparation) -> WorkerSetup:
    """What worker processes need of a job."""
    facts = preparation.facts
    return WorkerSetup(facts.spec, facts.model.directory, facts.max_model_len, facts.schema)


@contextmanager
def _memory_fit(
    preparation: Preparation, gpus: tuple[Gpu, ...], asked_gib: float | None
) -> Iterator["Future[MemoryFit] | None"]:
    """The fit, computed beside what goes on in the block; None for the fake engine, which has no model."""
    facts, spec = preparation.facts, preparation.spec
    if spec.engine.kind == "fake":
        yield None
        return
    devices = devices_of(gpus, asked_gib, on_cpu=spec.model.device == "cpu")
    killed = "the process that reads the model's configuration was killed; run plan again"
    with worker_pool(1, _no_start, None, killed) as pool:
        yield pool.submit(
            fit_memory, facts.model.directory, spec.model.dtype, spec.engine, facts.max_model_len, devices
        )


def _no_start(setup: object, stop: Event) -> None:
    """Nothing to prepare."""


def _uses_cpu(preparation: Preparation, gpus: tuple[Gpu, ...]) -> bool:
    spec = preparation.spec
    if spec.model.device != "auto":
        return spec.model.device == "cpu"
    # Of a cluster's machines nothing is known here.
    return spec.cluster.num_gpus == 0 or (not gpus and spec.cluster.address is None)


def _share(preparation: Preparation, gpus: tuple[Gpu, ...]) -> ReplicaShare:
    """As if the job ran on this machine."""
    num_gpus = 0 if _uses_cpu(preparation, gpus) else max(1, len(gpus))
    return replica_share(preparation.spec.cluster, [NodeSize(num_gpus, num_cores())])


def _probe(preparation: Preparation, gpus: tuple[Gpu, ...]) -> Trial:
    facts, share = preparation.facts, _share(preparation, gpus)
    uses_cpu = _uses_cpu(preparation, gpus)
    windows = sample_windows(preparation.pending, _PROBE_ROWS)
    replica = ReplicaSetup(
        spec=facts.spec,
        model_revision=facts.model.revision,
        fingerprint=preparation.fingerprint.digest,
        run_id="probe",
        schema=facts.schema,
        output_columns=facts.output_columns,
        num_gpus=0.0 if uses_cpu else share.num_gpus,
        num_cpus=share.num_cpus,
        fault_seed="probe",
    )
    return run_trial(
        TrialSetup(
            replica=replica,
            worker=worker_setup(preparation),
            task=task_of(windows, preparation.plan.shards),
            model=model_key(facts.model.identity),
            device_name=processor_name() if uses_cpu or not gpus else gpus[0].name,
        )
    )


def _estimate(
    preparation: Preparation,
    options: SurveyOptions,
    prompts: PromptSurvey,
    trial: Trial | None,
    gpus: tuple[Gpu, ...],
) -> Estimate | None:
    spec, job = preparation.spec, preparation.fingerprint.digest
    model = model_key(preparation.facts.model.identity)
    events = () if preparation.is_new else read_events(preparation.output, SPEED_EVENTS)
    last = last_speed(events, model=model, dtype=spec.model.dtype, job=job)
    devices = None
    if spec.cluster.address is None and options.device_memory_gib is None:
        devices = {processor_name()} if _uses_cpu(preparation, gpus) else {gpu.name for gpu in gpus}
    known = fitting_speeds(
        read_speeds(speeds_file()), model=model, dtype=spec.model.dtype, engine=spec.engine.kind, devices=devices
    )
    of_job = [speed for speed in ((last[0],) if last else ()) + known if speed.job == job and speed.source == "run"]
    candidates = [*([trial.speed] if trial else []), *of_job, *known]
    if not candidates:
        return None
    speed = candidates[0]
    probe = next((each for each in known if each.source == "probe" and each.device == speed.device), None)
    share = _share(preparation, gpus)
    num_replicas: int | None = share.num_replicas
    if spec.cluster.replicas == "auto" and spec.cluster.address is not None:
        num_replicas = last[1] if last else None
    work = workload(prompts, of_job[0] if of_job else None, trial.speed if trial else None)
    return Estimate(
        work=work,
        speed=speed,
        replica_s=replica_seconds(work, speed, job, probe),
        num_replicas=num_replicas,
        gpus_per_replica=share.num_gpus or 1.0,
        price_per_gpu_hour=options.price_per_gpu_hour,
    )


def workload(prompts: PromptSurvey, of_job: Speed | None, probed: Speed | None) -> Workload:
    """What is left, its completions as long as a run of the same job made them, or a probe, or at most as allowed."""
    num_completions, at_most = prompts.num_completions * prompts.scale, prompts.max_new_tokens * prompts.scale
    num_new_tokens = at_most
    lengths: Lengths = "max_new_tokens"
    if prompts.new_tokens_are_exact:
        lengths = "given choices"
    elif of_job is not None and of_job.mean_completion_tokens:
        num_new_tokens, lengths = of_job.mean_completion_tokens * num_completions, "a run of this job"
    elif probed is not None and probed.mean_completion_tokens:
        num_new_tokens, lengths = probed.mean_completion_tokens * num_completions, "probe"
    return Workload(
        num_prompt_tokens=prompts.num_tokens_to_read * prompts.scale,
        num_completion_tokens=min(at_most, num_new_tokens),
        num_completions=num_completions,
        lengths=lengths,
    )


def _unknown(preparation: Preparation, prompts: PromptSurvey | None) -> str:
    if not preparation.pending:
        return "nothing is left to generate"
    if prompts is None:
        return "no rows were looked at"
    if preparation.spec.engine.kind == "fake":
        return "the fake engine's speed is the job file's"
    return "no run or probe of this model on this device is known; run plan with --probe on the machine"
