"""The server against its peers under one load; run as `python -m benchmarks.serving`."""
