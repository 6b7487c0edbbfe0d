"""A crash of the test process shows where it was.

Libraries that SGLang imports take SIGSEGV for themselves, and print to where the output of tests is captured.
"""

from __future__ import annotations

import faulthandler
import os

import pytest

_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # nothing is captured yet


def pytest_runtest_setup(item: pytest.Item) -> None:
    faulthandler.disable()  # else the handlers count as being in place
    faulthandler.enable(item.config.stash[_STDERR])
