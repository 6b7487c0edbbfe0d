"""Comparisons with other stores; run them from the repository's root with `python -m benchmarks.NAME`."""
