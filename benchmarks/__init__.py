"""Measurements; each module runs as `python -m benchmarks.NAME` and writes its numbers as JSON."""
