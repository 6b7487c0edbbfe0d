"""SGLang with PolarKV beside the same SGLang without it; see `python -m examples.demo --help`."""
