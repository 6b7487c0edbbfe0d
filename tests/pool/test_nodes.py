"""A list of memory nodes that is edited while ranks use it."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

import pytest

from polarkv_sglang.errors import ConfigError
from polarkv_sglang.pool.nodes import NodeList, read_nodes
from tests.pool.rank import a_rank, prompt, wait_until_live
from tests.support import running_nodes


def test_a_file_holds_one_node_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    file.write_text("# rack 4\n10.0.0.4:7411\n\n  [fd00::5]:7411  # spare\n")
    assert read_nodes(file) == ("10.0.0.4:7411", "[fd00::5]:7411")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a:1\nnonsense\n", "line 2.*nonsense"), ("a:1\nb:2\na:1\n", "line 3.*a:1 is there twice")],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "nodes"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_nodes(file)


def test_a_file_that_goes_wrong_leaves_the_list_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "nodes"
    file.write_text("a:1\n")
    nodes = NodeList((), file)
    file.write_text("a:1\nwrong\n")
    with caplog.at_level(logging.ERROR):
        assert not nodes.reload()
    assert "line 2" in caplog.text
    assert nodes.addresses == ("a:1",)
    file.unlink()
    assert not nodes.reload()
    file.write_text("a:1\nb:2\n")
    assert nodes.reload()
    assert nodes.addresses == ("a:1", "b:2")
    assert not nodes.reload()


def test_nodes_join_and_leave_while_a_rank_runs(tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    with contextlib.ExitStack() as stack:
        first, second = stack.enter_context(running_nodes(2))
        file.write_text(f"{first.address}\n")
        rank = stack.enter_context(a_rank(nodes_file=file))
        blocks = prompt("follows the list", 64)
        before = rank.memory.copy()
        assert rank.put(blocks) == [True] * 64

        file.write_text(f"{first.address}\n{second.address}\n")
        wait_until_live(rank, 2)
        kept = rank.client.peek(blocks)
        assert rank.put(blocks) == [True] * 64
        assert 0 < second.statistics().blocks < 64, "only the newcomer's share moves"
        assert kept < 64
        assert rank.get(blocks) == [True] * 64
        assert (rank.memory == before).all()

        file.write_text(f"{second.address}\n")
        wait_until_live(rank, 1)
        assert set(rank.client.membership.live) == {second.address}
        assert rank.put(blocks) == [True] * 64
        assert rank.get(blocks) == [True] * 64
        assert (rank.memory == before).all()
        end = time.monotonic() + 5
        while first.statistics().connections > 1:  # our own, to ask
            assert time.monotonic() < end, "the rank still holds connections to a node that left"
            time.sleep(0.05)
