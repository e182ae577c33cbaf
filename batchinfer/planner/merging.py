"""What a resume makes of an earlier plan and the input as it is now. Pure."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from batchinfer.records import Plan, Shard


@dataclass(frozen=True, slots=True)
class MergedPlan:
    """What an output is to hold after this run, and what has to leave it first."""

    plan: Plan
    #: Shards of the earlier plan whose file has changed; their rows are generated anew under another shard id.
    superseded: tuple[Shard, ...]
    #: Committed units that no shard of the plan has: move their parts with ``layout.set_aside`` before the plan
    #: is written, so that a crash between leaves the earlier plan and the next run finds the same again.
    superseded_units: tuple[str, ...]


def merge_plans(previous: Plan | None, current: Plan, committed: Collection[str]) -> MergedPlan:
    """The plan of an output that may hold committed units of an earlier one.

    A shard id known before keeps its rows_per_unit, so that a changed setting cannot cut rows twice. A shard whose
    path now has another id is superseded; one whose path is gone (or unreadable) is retired, and what is committed
    of it stays. ``committed`` are the ids of units committed in the output.
    """
    known = {shard.shard_id: shard for shard in (*previous.shards, *previous.retired)} if previous else {}
    shards = tuple(
        replace(shard, rows_per_unit=known[shard.shard_id].rows_per_unit) if shard.shard_id in known else shard
        for shard in current.shards
    )
    present_ids = {shard.shard_id for shard in shards}
    present_paths = {shard.path for shard in shards}
    gone = [shard for shard in known.values() if shard.shard_id not in present_ids]
    superseded = tuple(shard for shard in gone if shard.path in present_paths)
    retired = tuple(shard for shard in gone if shard.path not in present_paths)
    plan = Plan(shards, tuple(unit for shard in shards for unit in shard.units), current.unreadable, retired)

    expected = {unit.unit_id for unit in plan.units} | {unit.unit_id for shard in retired for unit in shard.units}
    return MergedPlan(plan, superseded, tuple(sorted(unit_id for unit_id in committed if unit_id not in expected)))
