"""A replica's engine: weights on its device, or the fake engine without a model."""

import logging
from pathlib import Path

from batchinfer.cluster.messages import ReplicaSetup
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.engine import LoadedEngine
from batchinfer.engine.fake import FakeBehaviour, FakeEngine
from batchinfer.models.files import max_model_len, read_config

logger = logging.getLogger(__name__)

_FAKE_VOCAB_SIZE = 32000
_FAKE_ROWS = 256


def load_engine(setup: ReplicaSetup, directory: Path, detokenizer: Detokenizer | None) -> LoadedEngine:
    """The engine the job asks for, on the replica's device; seconds to minutes.

    Raises ModelError when directory, family, device or memory do not do.
    """
    spec = setup.spec
    kind = spec.engine.kind
    if kind == "fake":
        return _load_fake(setup, directory, detokenizer)
    # They import torch, which the fake engine does without.
    from batchinfer.engine.build import build_engine
    from batchinfer.engine.threads import settle_num_threads

    device = "cuda" if spec.model.device == "cuda" or (spec.model.device == "auto" and setup.num_gpus) else "cpu"
    if device == "cpu":
        logger.info("the model uses %d threads", settle_num_threads())
    return build_engine(
        kind,
        directory,
        dtype=spec.model.dtype,
        device=device,
        max_model_len=spec.model.max_model_len,
        decode=detokenizer.decode if detokenizer is not None else None,
        tokenizer_json=detokenizer.to_json if detokenizer is not None and detokenizer.has_json else None,
        max_batch_rows=spec.engine.max_batch_rows,
        max_batch_tokens=spec.engine.max_batch_tokens,
    )


def fake_vocabulary(detokenizer: Detokenizer | None) -> tuple[int, int]:
    """(number of token ids, ids below which special tokens lie) of the fake engine."""
    return detokenizer.plain_ids() if detokenizer is not None else (_FAKE_VOCAB_SIZE, 0)


def _load_fake(setup: ReplicaSetup, directory: Path, detokenizer: Detokenizer | None) -> LoadedEngine:
    fake = setup.spec.engine.fake
    vocab_size, num_reserved = fake_vocabulary(detokenizer)
    behaviour = FakeBehaviour(
        tokens_per_s=fake.tokens_per_s,
        start_s=fake.start_s,
        error_rate=fake.error_rate,
        crash_rate=fake.crash_rate,
        poison_token_id=fake.poison_token_id,
        fault_seed=setup.fault_seed,
    )
    engine = FakeEngine(
        behaviour, vocab_size=vocab_size, reserved=num_reserved, capacity=setup.spec.engine.max_batch_rows or _FAKE_ROWS
    )
    limit = max_model_len(read_config(directory), setup.spec.model.max_model_len)
    return LoadedEngine(engine, "fake", "none", (), vocab_size, limit)
