"""What the driver's loop costs a unit: scripted replicas that answer at once, no Ray, the record on disk.

python tests/bench/bench_driver.py --units 100000 --replicas 1000
python tests/bench/bench_driver.py --ray 3000      # calls through Ray itself, beside so many that never answer
"""

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from batchinfer.cluster.prepare import prepare
from tests.jobs import fake_job, model_without_weights
from tests.scripted_replicas import run_scripted


def cost_of_units(num_units: int, num_replicas: int, profile: bool) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as monkeypatch:
        root = Path(directory)
        (root / "in").mkdir()
        pq.write_table(pa.table({"prompt": ["x"] * num_units}), root / "in" / "rows.parquet")
        spec = fake_job(
            model_without_weights(root / "model"), root / "in", root / "out", execution={"rows_per_unit": 1}
        )
        preparation = prepare(spec)
        profiler = cProfile.Profile()
        began_s = time.process_time()
        if profile:
            profiler.enable()
        result = run_scripted(monkeypatch, preparation, {}, num_replicas=num_replicas)
        profiler.disable()
        spent_s = time.process_time() - began_s
        assert result.num_units_committed == num_units
        print(f"{num_units:,} units on {num_replicas:,} replicas: {spent_s / num_units * 1e6:.0f} us of CPU a unit")
        if profile:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


def cost_of_calls(num_awaited: int) -> None:
    """An actor's answers through the pool, while ``num_awaited`` others are outstanding."""
    import ray

    from batchinfer.cluster.ray_cluster import connected
    from batchinfer.cluster.replica_pool import Answer, ReplicaPool
    from batchinfer.spec import ClusterSpec

    class Echo:
        def answer(self, number: int) -> int:
            return number

        def never(self) -> None:
            time.sleep(10_000)

    with connected(ClusterSpec()):
        pool = ReplicaPool()
        actor = ray.remote(Echo).options(max_concurrency=4).remote()
        pool._actors[0] = actor
        pool._await(actor.never.remote(), lambda value: Answer("progress", 0, value))
        stuck = ray.remote(Echo).remote()
        for _ in range(num_awaited):
            pool._await(stuck.never.remote(), lambda value: Answer("progress", 0, value))
        for num_calls in (100, 2000):
            began_s = time.process_time()
            for _ in range(num_calls):
                pool._await(actor.answer.remote(1), lambda value: Answer("progress", 0, value))
            num_answers = 0
            while num_answers < num_calls:
                num_answers += len(pool.answers(1.0))
            spent_s = time.process_time() - began_s
        print(f"{num_calls:,} calls beside {num_awaited:,} awaited: {spent_s / num_calls * 1e6:.0f} us of CPU a call")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--ray", type=int, metavar="AWAITED", help="measure calls through Ray instead")
    arguments = parser.parse_args()
    if arguments.ray is not None:
        cost_of_calls(arguments.ray)
    else:
        cost_of_units(arguments.units, arguments.replicas, arguments.profile)
