"""Measuring decoders: records of runs, statistics, tables, reports, Spec-Bench files."""
