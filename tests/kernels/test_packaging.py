"""Where Python finds kernels/ and what else has that name."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from polarkv_sglang.kernels import layout

ROOT = Path(__file__).parents[2]


def test_the_folder_of_the_source_tree_is_the_package() -> None:
    assert Path(layout.__file__).resolve() == ROOT / "kernels" / "layout.py"


def test_builds_contain_the_kernels() -> None:
    """What setuptools finds by pyproject.toml's rule."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools builds the package, tests do without")
    found = setuptools.find_namespace_packages(str(ROOT), include=["polarkv_sglang*"])
    assert {"polarkv_sglang.kernels", "polarkv_sglang.kernels.gpu"} <= set(found)


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="Hugging Face's kernels is not here")
def test_hugging_faces_package_of_the_same_name_is_not_shadowed() -> None:
    """Also with the repository's root first on the path, where demos and servers of a checkout start."""
    command = [sys.executable, "-c", "import kernels; print(kernels.__file__, kernels.get_kernel.__name__)"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert output.strip().endswith("get_kernel")
    assert not output.startswith(str(ROOT / "kernels"))
