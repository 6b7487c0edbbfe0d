"""``python -m polarkv_sglang.cli``, for where the scripts of the environment are not on the PATH."""

from __future__ import annotations

import sys

from polarkv_sglang.cli import main

sys.exit(main())
