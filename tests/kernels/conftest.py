"""Where the tests of this folder compute."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.support import INTERPRETED


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    INTERPRETED or not torch.cuda.is_available(),
                    reason="no GPU that Triton could compile for",
                ),
            ],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, which with TRITON_INTERPRET=1 means Triton's interpreter (test_interpreter.py); and a GPU."""
    return torch.device(request.param)
