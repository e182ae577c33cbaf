"""The work queue at scale, in virtual time: processor time per unit, memory, idle replicas, the tail. Prints a table.

``python tests/bench/bench_queue.py [--units N] [--replicas N] [--deaths-per-hour SHARE]`` simulates a cluster whose
replicas die and join late; only the queue's own work is timed.
"""

import argparse
import resource
import time
from dataclasses import replace

from queue_simulation import Cluster, Course, Simulation

from batchinfer.cluster.queue_messages import ReplicaProgressed, ReplicaReady, ReplicasWanted
from batchinfer.cluster.queue_policy import QueuePolicy
from batchinfer.cluster.work_queue import WorkQueue
from batchinfer.records import WorkUnit

NUM_PROGRESS_EVENTS = 200_000


def main(clusters: list[Cluster]) -> None:
    print(
        f"{'units':>9} {'rows':>5} {'replicas':>8} {'deaths':>6} {'redone':>6} {'us/unit':>8} {'us/event':>8} "
        f"{'RSS MB':>7} {'idle %':>7} {'wait, units':>11} {'tail, units':>11}"
    )
    for cluster in clusters:
        course = Simulation(cluster).run()
        assert (course.outcome, course.num_commits) == ("done", cluster.num_units)
        print_line(cluster, course)
    per_event_us = progress_event_s() * 1e6
    print(f"one ReplicaProgressed among {clusters[0].num_replicas} replicas: {per_event_us:.2f} us")


def print_line(cluster: Cluster, course: Course) -> None:
    rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{cluster.num_units:>9} {cluster.rows_per_unit:>5} {cluster.num_replicas:>8} {course.num_deaths:>6} "
        f"{course.num_units_redone:>6} {course.queue_s / cluster.num_units * 1e6:>8.1f} "
        f"{course.queue_s / course.num_events * 1e6:>8.1f} {rss_mb:>7.0f} {100 * course.idle_share:>7.3f} "
        f"{course.longest_wait_s / cluster.unit_s:>11.1f} {course.tail_s / cluster.unit_s:>11.2f}",
        flush=True,
    )


def progress_event_s(num_replicas: int = 1000) -> float:
    """Processor time of one answer to a question for progress, of which there is one per replica and second."""
    queue = WorkQueue([WorkUnit("shard", row, 1) for row in range(4 * num_replicas)], QueuePolicy())
    queue.handle(ReplicasWanted(num_replicas, 0.0))
    for replica_id in range(num_replicas):
        queue.handle(ReplicaReady(replica_id, 1, 0.0))
    started_s = time.thread_time()
    for index in range(NUM_PROGRESS_EVENTS):
        queue.handle(ReplicaProgressed(index % num_replicas, index, index / num_replicas))
    return (time.thread_time() - started_s) / NUM_PROGRESS_EVENTS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=1_000)
    parser.add_argument("--deaths-per-hour", type=float, default=0.01, metavar="SHARE", help="of the replicas")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asked = Cluster(options.units, options.replicas, deaths_per_replica_hour=options.deaths_per_hour, seed=options.seed)
    bad_day = replace(asked, num_units=options.units // 10, deaths_per_replica_hour=30 * options.deaths_per_hour)
    main([asked, bad_day, replace(bad_day, rows_per_unit=16)])
