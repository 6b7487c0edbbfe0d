"""Multi-turn benchmarks of SGLang with and without PolarKV on one machine; the scripts beside this folder."""
