"""Demos and benchmarks; run them from the repository's root with `python -m examples.NAME`."""
