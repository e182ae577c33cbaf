"""Answers to benchmarks in the form that each benchmark's own judge reads; one file per form, each a pure function."""

from batchinfer.export.judges.alpaca_eval import ALPACA_EVAL
from batchinfer.export.judges.answered import Judge
from batchinfer.export.judges.arena_hard import ARENA_HARD
from batchinfer.export.judges.logickor import LOGICKOR
from batchinfer.export.judges.mt_bench import MT_BENCH
from batchinfer.export.judges.wildbench import WILDBENCH

__all__ = ["JUDGES", "Judge"]

JUDGES = {judge.name: judge for judge in (MT_BENCH, LOGICKOR, ARENA_HARD, WILDBENCH, ALPACA_EVAL)}
