"""Measurements: `python -m benchmarks.NAME`. Results that matter are in benchmarks/records/."""
