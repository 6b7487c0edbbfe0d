"""Finds SGLang's surfaces in its source, without importing it: that takes torch and half a minute."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeGuard

from polarkv_sglang.compat import Surface

_MAX_HOPS = 20  # re-exports and base classes on the way to a definition

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef | ast.Assign  # of a value, which has no parameters


def not_seen(surfaces: Iterable[Surface]) -> list[Surface]:
    """Those that the source does not plainly show. They may still be there, made in some dynamic way."""
    return [surface for surface in surfaces if not _is_seen(surface)]


def _is_seen(surface: Surface) -> bool:
    parts = surface.path.split(".")
    # The longest prefix that is a file is the module.
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if _source_file(module) is not None:
            found = _find(module, parts[end:], _MAX_HOPS)
            return found is not None and _takes(found, surface.parameters)
    return False


def _takes(found: _Definition, parameters: tuple[str, ...]) -> bool:
    """Of a class: its own constructor, or the fields of a struct."""
    if isinstance(found, ast.Assign):
        return not parameters
    if isinstance(found, ast.ClassDef):
        constructor = [s for s in _statements(found) if isinstance(s, _Function) and s.name == "__init__"]
        if not constructor:
            return _fields(found).issuperset(parameters)
        found = constructor[0]
    arguments = found.args
    names = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    return names.issuperset(parameters)


def _fields(owner: ast.ClassDef) -> set[str]:
    annotated = (statement for statement in _statements(owner) if isinstance(statement, ast.AnnAssign))
    return {statement.target.id for statement in annotated if isinstance(statement.target, ast.Name)}


def _find(module: str, names: list[str], hops: int) -> _Definition | None:
    """The definition of ``names``, one inside the other, seen from a module."""
    tree = _parse(module)
    if tree is None or hops == 0:
        return None
    for statement in _statements(tree):
        if isinstance(statement, _Function | ast.ClassDef) and statement.name == names[0]:
            return statement if len(names) == 1 else _find_member(module, statement, names[1:], hops)
        if len(names) == 1 and _assigns(statement, names[0]):
            return statement
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == names[0]:
                    origin = _absolute(module, statement)
                    return _find(origin, [alias.name, *names[1:]], hops - 1)
    return None


def _assigns(statement: ast.stmt, name: str) -> TypeGuard[ast.Assign]:
    return isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == name for target in statement.targets
    )


def _find_member(module: str, owner: _Definition, names: list[str], hops: int) -> _Definition | None:
    if not isinstance(owner, ast.ClassDef) or len(names) != 1:
        return None
    for statement in _statements(owner):
        if isinstance(statement, _Function) and statement.name == names[0]:
            return statement
        if _assigns(statement, names[0]):
            return statement
    for base in owner.bases:
        name = base.value if isinstance(base, ast.Subscript) else base  # Base[T]
        if isinstance(name, ast.Name):
            found = _find(module, [name.id, *names], hops - 1)
            if found is not None:
                return found
    return None


def _statements(parent: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Its own statements, and those under its ``if`` and ``try``."""
    pending = list(parent.body)
    while pending:
        statement = pending.pop(0)
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            pending += [*statement.body, *statement.orelse]


def _absolute(module: str, statement: ast.ImportFrom) -> str:
    """The module that a ``from ... import`` names."""
    if not statement.level:
        return statement.module or ""
    package = module.split(".")
    file = _source_file(module)
    if file is None or file.name != "__init__.py":
        package.pop()
    package = package[: len(package) - statement.level + 1]
    return ".".join([*package, *([statement.module] if statement.module else [])])


@functools.cache
def _parse(module: str) -> ast.Module | None:
    file = _source_file(module)
    if file is None:
        return None
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _source_file(module: str) -> Path | None:
    top, _, rest = module.partition(".")
    spec = importlib.util.find_spec(top)  # of a top-level package: imports nothing
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(root, *rest.split(".")) if rest else Path(root)
        for file in (path.with_name(path.name + ".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None
