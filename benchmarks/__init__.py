"""Measurements by name: `python -m benchmarks.NAME [--quick]`; their results are committed JSON, one file a machine."""
