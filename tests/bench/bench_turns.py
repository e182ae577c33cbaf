"""What keeping KV between the turns of conversations spares: the same conversations with it and without.

    python tests/bench/bench_turns.py [--questions FILE] [--rows 8] [--new-tokens 64] [--threads 1] [--places N]

``--questions`` is a Parquet file with a column ``turns``, MT-Bench's say; without it the demo's prompts are put
together to conversations of ``--turns`` turns. Every turn is asked as soon as the one before it has ended, in this
process, by the continuous engine in float32; without keeping, what was kept is dropped before the next turn is
submitted. Seconds are processor time of the engine's steps; the tokens must be the same. ``--places`` makes the KV
cache small, so that kept KV has to make room.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from batchinfer.cluster.conversations import Conversations
from batchinfer.cluster.texts import Texts
from batchinfer.detokenise import Detokenizer
from batchinfer.engine.build import build_engine
from batchinfer.engine.engine import LoadedEngine, Sequence
from batchinfer.models.tokenizer import load_tokenizer
from batchinfer.prompts.renderer import PromptRenderer
from batchinfer.records import Prompt
from batchinfer.spec import PromptSpec, SamplingSpec

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Measured:
    """One way through all conversations."""

    answers: dict[tuple[str, int], tuple[int, ...]]
    num_prompt_tokens: int
    num_read_tokens: int
    num_completion_tokens: int
    num_hits: int
    num_dead: int
    cpu_s: float


def conversations(options: argparse.Namespace) -> pa.Table:
    """Rows with a column ``turns``."""
    if options.questions is not None:
        return pq.read_table(options.questions, columns=["turns"]).slice(0, options.rows)
    chats = ds.dataset(REPOSITORY / "jobs" / "prompts").to_table(columns=["prompt"]).column("prompt").to_pylist()
    size = options.turns
    turns = [[chats[(size * row + turn) % len(chats)] for turn in range(size)] for row in range(options.rows)]
    return pa.table({"turns": pa.array(turns, pa.list_(pa.string()))})


def run(engine: LoadedEngine, asking: Conversations, first: list[Sequence], *, keeps: bool) -> Measured:
    before = engine.engine.stats()
    measured = Measured({}, sum(len(it.prompt.token_ids) for it in first), 0, 0, 0, 0, 0.0)
    engine.engine.submit(first)
    while engine.engine.num_unfinished:
        began_s = time.process_time()
        ends = engine.engine.step()
        measured.cpu_s += time.process_time() - began_s
        for end in ends:
            measured.answers[(end.sequence.prompt.row_id, end.sequence.turn)] = tuple(end.token_ids)
            if not end.is_followed:
                continue
            following = asking.next_turn(end)
            if not keeps or not isinstance(following, Sequence):
                engine.engine.abort([end.sequence.sequence_id])
            if isinstance(following, Sequence):
                measured.num_prompt_tokens += len(following.prompt.token_ids)
                engine.engine.submit([following])
            else:
                measured.num_dead += 1
    after = engine.engine.stats()
    measured.num_read_tokens = after.num_prompt_tokens - before.num_prompt_tokens
    measured.num_completion_tokens = after.num_completion_tokens - before.num_completion_tokens
    measured.num_hits = after.num_kept_hits - before.num_kept_hits
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "demo-model")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--places", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    tokenizer = load_tokenizer(options.model)
    detokenizer = Detokenizer(tokenizer)
    engine = build_engine(
        "continuous",
        options.model,
        dtype="float32",
        device="cpu",
        decode=detokenizer.decode,
        max_batch_tokens=options.places,
    )
    sampling = SamplingSpec(max_new_tokens=options.new_tokens)
    renderer = PromptRenderer(
        PromptSpec(turns="turns"), sampling, tokenizer, engine.max_model_len, vocab_size=engine.vocab_size
    )
    rows = conversations(options)
    rendered = renderer.render(rows, [f"row:{number}" for number in range(rows.num_rows)])
    first = [Sequence(prompt) for prompt in rendered if isinstance(prompt, Prompt)]
    asking = Conversations(renderer, Texts(detokenizer, frozenset(engine.eos_token_ids)))
    run(engine, asking, first[:1], keeps=True)

    print(f"{len(first)} conversations, {options.new_tokens} tokens per answer, torch {torch.__version__}, float32")
    print(f"{'':10} {'prompt tokens':>14} {'of them read':>13} {'hits':>5} {'new tokens':>11} {'CPU s':>8}")
    found = {}
    for keeps in (False, True):
        it = found[keeps] = run(engine, asking, first, keeps=keeps)
        print(
            f"{'keeping' if keeps else 'without':10} {it.num_prompt_tokens:14,} {it.num_read_tokens:13,} "
            f"{it.num_hits:5} {it.num_completion_tokens:11,} {it.cpu_s:8.2f}"
        )
    without, keeping = found[False], found[True]
    same = sum(without.answers[key] == answer for key, answer in keeping.answers.items())
    saved = 1 - keeping.num_read_tokens / without.num_read_tokens
    print(f"read less: {saved:.1%}; processor time {keeping.cpu_s / without.cpu_s:.2f} of that without")
    print(f"same answers: {same} of {len(without.answers)}")


if __name__ == "__main__":
    main()
