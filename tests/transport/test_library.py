"""Each case has a process of its own: what the loader has once mapped stays."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import libucx
import pytest
from xxhash import _xxhash

from polarkv_sglang import pool, transport

pytestmark = pytest.mark.timeout(60)

WHEEL = Path(libucx.__file__).parent / "lib"
NO_XXHASH = "import sys; sys.modules['xxhash'] = None\n"
REPORT = """
from polarkv_sglang.transport import Context, load_library
from polarkv_sglang.errors import TransportError
import sys
try:
    library = load_library(*sys.argv[1:])
    Context(library).close()
    print(library.source, library.path, *library.version)
except TransportError as error:
    print("refused:", error)
"""


def report(*arguments: str, search: Path | None = None, before: str = "") -> str:
    environment = os.environ | {"LD_LIBRARY_PATH": "" if search is None else str(search)}
    command = [sys.executable, "-c", before + REPORT, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=True)
    return done.stdout.strip()


def old_library(folder: Path) -> Path:
    """A folder with a libucp.so.0 that says it is UCX 1.13.1."""
    source = folder / "old.c"
    source.write_text("void ucp_get_version(unsigned *a, unsigned *b, unsigned *c) { *a = *c = 1; *b = 13; }")
    flags = ["-shared", "-fPIC", "-Wl,-soname,libucp.so.0"]
    subprocess.run(["cc", *flags, source, "-o", folder / "libucp.so.0"], check=True, timeout=50)
    return folder


@pytest.mark.parametrize(
    ("package", "known"),
    [(transport, "e003d2c219c1a6fb"), (pool, "7ca419ed2e819df2")],
    ids=["transport", "pool"],
)
def test_abi_number_changes_with_the_file(package: ModuleType, known: str):
    digest = hashlib.sha256(Path(package.__path__[0], "abi.h").read_bytes()).hexdigest()[:16]
    assert digest == known, "abi.h has changed: raise its POLAR_ABI, and put its digest here"


@pytest.mark.parametrize("function", ["", "int polar_abi(void) { return 0; }"], ids=["old", "another"])
def test_helper_of_another_abi_is_refused(tmp_path: Path, function: str):
    source, built = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text(function)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", built], check=True, timeout=50)
    before = f"""
import importlib.util
from types import SimpleNamespace
find = importlib.util.find_spec
old = SimpleNamespace(origin={str(built)!r})
importlib.util.find_spec = lambda name, *more: old if name.endswith("._batch") else find(name, *more)
"""
    error = report(before=before)
    assert error.startswith(f"refused: {built} was built of another abi.h; install the package")


def test_xxh3_comes_from_the_system_where_the_package_has_none(tmp_path):
    shutil.copy(_xxhash.__file__, tmp_path / "libxxhash.so.0")
    assert report(search=tmp_path, before=NO_XXHASH).startswith("wheel ")


def test_an_xxh3_that_hashes_otherwise_is_refused(tmp_path):
    source = tmp_path / "old.c"
    source.write_text("unsigned long XXH3_64bits(const void *input, unsigned long length) { return length; }")
    flags = ["-shared", "-fPIC", "-Wl,-soname,libxxhash.so.0"]
    subprocess.run(["cc", *flags, source, "-o", tmp_path / "libxxhash.so.0"], check=True, timeout=50)
    error = report(search=tmp_path, before=NO_XXHASH)
    assert error.startswith("refused: no usable XXH3")
    assert "before 0.8" in error
    assert "install xxhash" in error


def test_an_explicit_path_comes_first(tmp_path):
    explicit = WHEEL / "libucp.so.0"
    assert report(str(explicit), search=old_library(tmp_path)).startswith(f"explicit {explicit} 1 ")


def test_the_systems_library_comes_before_the_wheel():
    assert report(search=WHEEL).startswith(f"system {WHEEL / 'libucp.so.0'} 1 ")


def test_an_old_system_library_is_passed_over(tmp_path):
    assert report(search=old_library(tmp_path)).startswith(f"wheel {WHEEL / 'libucp.so.0'} 1 ")


def test_an_explicit_path_is_never_replaced_by_another(tmp_path):
    missing = report(str(tmp_path / "libucp.so"))
    assert missing.startswith("refused:")
    assert str(tmp_path / "libucp.so") in missing
    old = report(str(old_library(tmp_path) / "libucp.so.0"))
    assert "1.13.1" in old
    assert "1.17.0 or later" in old


def test_without_any_library_the_error_names_all_that_was_tried(tmp_path):
    no_wheel = "import sys; sys.modules['libucx'] = None\n"
    assert "1.13.1" in (error := report(search=old_library(tmp_path), before=no_wheel))
    assert all(word in error for word in ("refused:", "system", "wheel", "libucx-cu13"))


def test_parts_of_two_builds_are_refused(tmp_path):
    """As when another package of the process has opened its own UCX before."""
    for name in ("libucs.so.0", "libucm.so.0"):
        shutil.copy(WHEEL / name, tmp_path)
    foreign = tmp_path / "libucs.so.0"
    error = report(before=f"import ctypes; ctypes.CDLL({str(foreign)!r})\n")
    assert error.startswith("refused:")
    assert str(foreign) in error
