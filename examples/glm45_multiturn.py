"""GLM-4.5: histories of 10K tokens, 10 rounds; with and without PolarKV. See examples/README.md."""

from __future__ import annotations

import sys

from examples.multiturn.cli import main
from examples.multiturn.scenarios import GLM45

if __name__ == "__main__":
    sys.exit(main(GLM45))
