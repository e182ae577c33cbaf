"""What a unit's journal costs: CPU per flush, bytes on disk, and the time to read it back.

    python tests/bench/bench_journal.py [--rows 256] [--tokens 1500] [--flushes 20] [--top 0]

Every flush finds ``--tokens`` new ones in each of ``--rows`` sequences in progress: 50 tokens/s for 30 s are 1,500.
``--top`` adds log-probabilities of so many tokens to each. Reading is what a resume waits for. CPU times are of this
process alone, so another one on the machine disturbs them little.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from batchinfer.records import TokenLogprobs
from batchinfer.storage.filesystem import locate
from batchinfer.storage.journal import JournaledSequence, JournalWriter, read_journal

UNIT = "0123456789abcdef-000000000-1024"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--flushes", type=int, default=20)
    parser.add_argument("--top", type=int, default=0)
    arguments = parser.parse_args()
    choices = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="bench-journal-") as folder:
        output = locate(f"{folder}/out")
        writer = JournalWriter(output, UNIT, "fingerprint", "20260101T000000-abcdef", 1)
        token_ids: list[tuple[int, ...]] = [()] * arguments.rows
        logprobs: list[tuple[TokenLogprobs, ...]] = [()] * arguments.rows
        flushes_s = []
        for _ in range(arguments.flushes):
            for row in range(arguments.rows):
                new = tuple(choices.randrange(102400) for _ in range(arguments.tokens))
                token_ids[row] += new
                if arguments.top:
                    top = tuple((rank, -0.5 * rank) for rank in range(arguments.top))
                    logprobs[row] += tuple(TokenLogprobs(token_id, -0.5, top) for token_id in new)
            sequences = [
                JournaledSequence(f"0123456789abcdef:{row}", 0, token_ids[row], logprobs[row])
                for row in range(arguments.rows)
            ]
            begun_s = time.process_time()
            writer.flush(sequences)
            flushes_s.append(time.process_time() - begun_s)
        files = list(Path(folder).rglob("*.arrow"))
        size_mb = sum(path.stat().st_size for path in files) / 1e6
        print(f"{writer.num_tokens:,} tokens in {len(files)} segments, {size_mb:.1f} MB")
        print(
            f"flush: median {sorted(flushes_s)[len(flushes_s) // 2] * 1e3:.0f} ms CPU, max {max(flushes_s) * 1e3:.0f}"
        )
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        journal = read_journal(output, UNIT, "fingerprint")
        print(f"read: {time.perf_counter() - begun_s:.2f} s, {time.process_time() - begun_cpu_s:.2f} s CPU")
        assert sum(len(sequence.token_ids) for sequence in journal.sequences.values()) == writer.num_tokens


if __name__ == "__main__":
    main()
