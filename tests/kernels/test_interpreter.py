"""The Triton kernels without a GPU: the tests of this folder once more, in Triton's interpreter."""

from __future__ import annotations

import re

import pytest

from tests.kernels.conftest import Interpreter
from tests.kernels.support import INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter already")
def test_kernels_keep_their_promises_in_the_interpreter(interpreter: Interpreter) -> None:
    code = interpreter.process.wait(110)
    output = interpreter.output.read_text()
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    assert int(passed[1]) > 50
