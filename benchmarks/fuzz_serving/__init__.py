"""The videos API against its own document; run as `python -m benchmarks.fuzz_serving`."""
