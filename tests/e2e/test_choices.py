"""Labelling by ``sampling.choices`` as a user runs it: scores against transformers itself, and what a kill leaves."""

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import batchinfer
from batchinfer.audit import verify_deep
from batchinfer.models.loading import load_model
from batchinfer.models.tokenizer import load_tokenizer
from tests.jobs import command, fake_job, job_values, prompts, read_dead_letters, read_rows, write_job_file

pytestmark = pytest.mark.usefixtures("ray_session")

CHOICES = [" yes", " no", " the quick one", " A", " AB", "[|endofturn|]"]


def plain_scores(model: Any, tokenizer: Any, prompt: str, choices: list[str]) -> list[tuple[float, int]]:
    """Sum of log-probabilities by one forward pass per choice, and its number of tokens."""
    begin = tokenizer(prompt)["input_ids"]
    scores = []
    for choice in choices:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([begin + ids])).logits[0, len(begin) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        scores.append((logprobs.sum().item(), len(ids)))
    return scores


@pytest.mark.parametrize("kind", ["continuous", pytest.param("padded", marks=pytest.mark.slow)])
def test_every_score_is_that_of_a_plain_forward_pass(tmp_path: Path, exaone: Path, kind: str) -> None:
    """Rows with the job's choices and rows with their own, some of them alike."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    texts = [*prompts(20), *prompts(6)]
    own = [{"choices": [" up", " down", " sideways"]} if number % 4 == 3 else None for number in range(len(texts))]
    kinds = pa.struct({"choices": pa.list_(pa.string())})
    table = pa.table({"id": range(len(texts)), "prompt": texts, "own": pa.array(own, kinds)})
    pq.write_table(table, inputs / "rows.parquet")
    values = job_values(
        exaone,
        inputs,
        tmp_path / "out",
        prompt={"sampling_column": "own"},
        sampling={"choices": CHOICES, "temperature": 0.5},
        engine={"kind": kind},
        output={"token_ids": True, "columns": ["id", "prompt"]},
        execution={"rows_per_unit": 7},
    )
    ended = command("run", write_job_file(tmp_path / "job.yaml", values))
    assert ended.exit_code == 0, ended.output
    assert verify_deep(str(tmp_path / "out")).findings == ()
    model = load_model(exaone, dtype="float32", device="cpu").model
    tokenizer = load_tokenizer(exaone)
    rows = pq.read_table(tmp_path / "out" / "completions").to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(len(texts)))
    for row in rows:
        choices = (own[row["id"]] or {"choices": CHOICES})["choices"]
        expected = plain_scores(model, tokenizer, row["prompt"], choices)
        found = row["choices"]
        assert [score["choice"] for score in found] == choices
        assert [score["num_tokens"] for score in found] == [count for _, count in expected]
        assert [score["logprob"] for score in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
        shares = torch.tensor([score for score, _ in expected]).softmax(-1).tolist()
        assert [score["probability"] for score in found] == pytest.approx(shares, abs=1e-4)
        best = max(range(len(choices)), key=lambda index: expected[index][0])
        assert row["completion"] == choices[best]
        assert row["num_completion_tokens"] == expected[best][1]


def kill_when_journaled(output: Path) -> None:
    """SIGKILL this Ray's replicas as soon as a journal has a segment."""
    until_s = time.monotonic() + 60
    while not list((output / "_job" / "journal").rglob("*.arrow")):
        assert time.monotonic() < until_s, "nothing was journaled"
        time.sleep(0.02)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray::Replica" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.parametrize(
    "sampling", [{"choices": CHOICES}, pytest.param({"n": 2}, marks=pytest.mark.slow)], ids=["choices", "twins"]
)
def test_a_replica_killed_among_choices_and_twins_costs_nothing(
    tmp_path: Path, exaone: Path, sampling: dict[str, Any]
) -> None:
    """1. Rows four times over. 2. SIGKILL when some are in the journal. 3. The rows are those of an undisturbed run."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    pq.write_table(pa.table({"id": range(120), "prompt": prompts(30) * 4}), inputs / "rows.parquet")
    blocks: dict[str, dict[str, Any]] = {
        "sampling": {"max_new_tokens": 20, "logprobs": 0, **sampling},
        "execution": {"rows_per_unit": 60, "journal_interval_s": 0.1},
    }
    whole = batchinfer.run(fake_job(exaone, inputs, tmp_path / "whole", **blocks))
    # Thirty rows are distinct, and two units may generate each: they are in flight at the same time.
    per_row = len(sampling.get("choices", [0]))
    num_sequences = 120 * (len(CHOICES) if "choices" in sampling else 2)
    assert num_sequences - 60 * per_row <= whole.num_shared_sequences <= num_sequences - 30 * per_row
    slow = {**blocks, "engine": {"fake": {"tokens_per_s": 300.0}}}
    killer = threading.Thread(target=kill_when_journaled, args=(tmp_path / "broken",))
    killer.start()
    broken = batchinfer.run(fake_job(exaone, inputs, tmp_path / "broken", **slow))
    killer.join()
    assert (broken.num_replicas_died, broken.outcome, whole.outcome) == (1, "complete", "complete")
    assert broken.num_resumed_tokens > 0
    assert broken.num_shared_sequences > 0
    columns = ("id", "sample", "completion", "finish_reason", "num_completion_tokens")
    assert read_rows(tmp_path / "broken", columns) == read_rows(tmp_path / "whole", columns)
    assert len(read_rows(tmp_path / "broken")) == 120 * (1 if "choices" in sampling else 2)
    for name in ("whole", "broken"):
        assert verify_deep(str(tmp_path / name)).findings == ()


@pytest.mark.slow
def test_twins_that_kill_their_replica_are_found_one_by_one(tmp_path: Path, exaone: Path) -> None:
    """1. Two like rows kill whatever generates them. 2. Each is convicted by its own death. 3. The rest commits."""
    texts = prompts(4)
    tokenize = load_tokenizer(exaone)
    poison_ids = set(tokenize("☠")["input_ids"]) - set(tokenize(" ".join(texts))["input_ids"])
    inputs = tmp_path / "in"
    inputs.mkdir()
    rows = [texts[0], "☠", texts[1], texts[0], "☠", texts[2]]
    pq.write_table(pa.table({"id": range(6), "prompt": rows}), inputs / "rows.parquet")
    poisoned = {"engine": {"fake": {"poison_token_id": min(poison_ids)}}}
    result = batchinfer.run(fake_job(exaone, inputs, tmp_path / "out", **poisoned))
    assert (result.exit_code, result.num_dead_letters, result.given_up) == (1, 2, ())
    assert [kind for _, kind in read_dead_letters(tmp_path / "out")] == ["killed_replica"] * 2
    assert [row[0] for row in read_rows(tmp_path / "out")] == [0, 2, 3, 5]
    assert result.num_shared_sequences == 1
    assert verify_deep(str(tmp_path / "out")).findings == ()
