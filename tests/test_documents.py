"""Documents name nothing that is not there: links, headings, flags, variables, metrics."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from polarkv_sglang.cli import main
from polarkv_sglang.config import ENV_PREFIX, OTHER_VARIABLES, SETTINGS, add_flags
from polarkv_sglang.metrics import engine_metrics
from polarkv_sglang.pool.metrics import _COUNTERS, _GAUGES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("benchmarks/*.md"),
    *ROOT.glob("examples/*.md"),
]
COMMANDS = ("node", "status", "doctor", "bench", "blend-check")

_LINK = re.compile(r"\[[^]]*\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+[a-z]")
_COMMAND = re.compile(r"\bpolarkv ([\w-]+)((?:[^\n`#\\]|\\\n)*)")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@each_document
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target, anchor in _LINK.findall(document.read_text(encoding="utf-8")):
        file = document.parent / target if target else document
        assert file.exists(), f"{target} is not there"
        if anchor:
            assert anchor in set(_anchors(file)), f"{target} has no heading #{anchor}"


@each_document
def test_engine_flags_and_variables_are_known(document: Path) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    known = set(parser.format_help().split())
    text = document.read_text(encoding="utf-8")
    assert {flag for flag in _FLAG.findall(text) if "polarkv" in flag} <= known
    variables = {f"{ENV_PREFIX}{name.upper()}" for name in SETTINGS} | OTHER_VARIABLES
    assert set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]*[A-Z]\b", text)) - variables <= TYPING_ERRORS


# Named as what doctor says of them.
TYPING_ERRORS = {"POLARKV_NODE"}


@each_document
def test_flags_of_our_commands_are_known(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, rest in _COMMAND.findall(document.read_text(encoding="utf-8")):
        if command in COMMANDS:
            with pytest.raises(SystemExit):
                main([command, "--help"])
            known = set(_FLAG.findall(capsys.readouterr().out))
            assert set(_FLAG.findall(rest)) <= known, f"polarkv {command}"


@each_document
def test_metrics_are_there(document: Path) -> None:
    node = {f"polarkv_node_{name}" for name in _GAUGES}
    node |= {f"polarkv_node_{name}_total" for name in (*_COUNTERS, "refused")}
    engine = {"polarkv_prompt_tokens_total", "polarkv_live_nodes"}
    engine |= {f"polarkv_pool_{name}_total" for name in engine_metrics()._pool}
    named = set(
        re.findall(
            r"\bpolarkv_(?:node|pool|prompt|live)_[a-z_]*[a-z]\b", document.read_text(encoding="utf-8")
        )
    )
    assert named <= node | engine


def test_translation_has_the_sections_flags_and_links_of_the_original() -> None:
    original, translation = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
    )
    assert translation.count("\n## ") == original.count("\n## ")
    assert set(_FLAG.findall(translation)) == set(_FLAG.findall(original))
    languages = {"README.md", "README.zh-CN.md"}
    links = [{target for target, _ in _LINK.findall(text)} for text in (original, translation)]
    assert links[0] - languages == links[1] - languages
    assert links[0] & languages == {"README.zh-CN.md"}
    assert links[1] & languages == {"README.md"}


def _anchors(document: Path) -> Iterator[str]:
    """As GitHub makes them."""
    for line in document.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#+ (.+)", line):
            yield re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
