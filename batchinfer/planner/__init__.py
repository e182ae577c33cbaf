"""Input paths to a plan: which shards there are, how many rows they hold, and how they are cut into work units.

``listing`` finds the files, ``shards`` looks into them, ``columns`` makes their schemas one, ``merging`` compares with
an earlier plan, ``apart`` keeps the output out of the input. Rows are read by replicas.
"""

from batchinfer.planner.apart import check_output_apart
from batchinfer.planner.columns import InputSchema, columns_to_read, plain_type, refuse_mixed_columns
from batchinfer.planner.merging import MergedPlan, merge_plans
from batchinfer.planner.shards import InputPlan, plan_input

__all__ = [
    "InputPlan",
    "InputSchema",
    "MergedPlan",
    "check_output_apart",
    "columns_to_read",
    "merge_plans",
    "plain_type",
    "plan_input",
    "refuse_mixed_columns",
]
