"""Measuring decoders: records of runs, statistics, tables, reports, Spec-Bench files."""

from specjax.evaluation.records import VANILLA, MethodRun, TurnRecord
from specjax.evaluation.report import write_report
from specjax.evaluation.results import read_results, result_row, write_results
from specjax.evaluation.spec_bench import (
    answers_name,
    compare_answers,
    read_answers,
    speed,
    write_answers,
)
from specjax.evaluation.tables import markdown_table, print_table

__all__ = [
    "VANILLA",
    "MethodRun",
    "TurnRecord",
    "answers_name",
    "compare_answers",
    "markdown_table",
    "print_table",
    "read_answers",
    "read_results",
    "result_row",
    "speed",
    "write_answers",
    "write_report",
    "write_results",
]
