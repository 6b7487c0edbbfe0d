"""A chatbot: histories of 3,000 tokens, 10 rounds; with and without PolarKV. See examples/README.md."""

from __future__ import annotations

import sys

from examples.multiturn.cli import main
from examples.multiturn.scenarios import CHATBOT

if __name__ == "__main__":
    sys.exit(main(CHATBOT))
