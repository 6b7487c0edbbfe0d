"""Writers that die, and writers of the same blocks, beside readers of them."""

from __future__ import annotations

import contextlib
import sys
import threading

import msgspec
import pytest

from tests.faults.nodes import FaultyNode
from tests.faults.traffic import Load, Rank, Traffic, TrafficProcess
from tests.faults.ways import WAYS

# A memory node that keeps what is reserved for seconds, not for half a minute.
RESERVATION_S = 6.0
_HASTY = f"""
import sys
from polarkv_sglang.pool import index
from polarkv_sglang.cli import main
index.RESERVATION_S = {RESERVATION_S}
sys.argv = sys.argv[3:]
sys.exit(main())
"""


def test_writers_that_die_in_a_put_lose_their_slots_in_time_and_nobody_reads_half_a_block() -> None:
    """One for each way that bytes move; they wait for the end of their reservations side by side."""
    with contextlib.ExitStack() as stack:
        scenes = []
        for tls in WAYS:
            node = stack.enter_context(FaultyNode(tls=tls, launcher=[sys.executable, "-c", _HASTY]))
            load = Load(ucx_tls=tls, prompts=4, piece_bytes=128 << 10, pause_s=0.02)
            _die_in_a_put(node, load)
            traffic = stack.enter_context(Traffic(load, node.address))
            scenes.append((node, load, traffic))
            traffic.wait_for_hits()
            # What is streamed comes to nobody once its connection is gone: those slots may be free by now.
            assert node.statistics().reservations > 0 or tls == "tcp"
            assert node.count(load.all_keys) < len(load.all_keys), "what is reserved is there uncommitted"
        for node, load, traffic in scenes:
            if load.ucx_tls != "tcp":
                node.wait_for("expired_reservations_total", 1)
            node.wait_for_blocks(load.all_keys)  # the others write what the dead one did not
            traffic.wait_for_hits()
            traffic.stop()
            rest = node.statistics()
            assert rest.reservations == rest.leases == 0
            assert rest.used_bytes == rest.blocks * load.block_bytes


def _die_in_a_put(node: FaultyNode, load: Load) -> None:
    """Start the node, and have a client die with slots reserved and not committed."""
    writes = msgspec.structs.replace(load, kinds=("put",), pause_s=0.0)
    while True:
        node.start()
        with TrafficProcess(writes, node.address) as writer:
            node.wait_until(lambda now: now.reservations > 0 or now.blocks == len(load.all_keys), "it writes")
            writer.kill()
        # The commit may have been on its way.
        rest = node.wait_until(lambda now: now.connections == 1, "its connections end")
        # What is streamed frees its slots as the connection ends.
        if rest.reservations or (load.ucx_tls == "tcp" and rest.blocks < len(load.all_keys)):
            return
        node.kill()


@pytest.mark.parametrize("tls", WAYS)
def test_writers_of_the_same_blocks_make_one_of_each_and_readers_see_it_whole(tls: str | None) -> None:
    load = Load(prompts=16, ucx_tls=tls)
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(FaultyNode(tls=tls).start())
        reader = stack.enter_context(
            Traffic(Load(prompts=load.prompts, ucx_tls=tls, kinds=("get", "peek")), node.address)
        )
        writers = [stack.enter_context(Rank(load, node.address)) for _ in range(2)]
        together = threading.Barrier(len(writers))
        stored: list[int] = []

        def write(rank: Rank) -> None:
            for prompt in range(load.prompts):
                together.wait()
                stored.append(rank.put(prompt, 0, load.pages))

        threads = [threading.Thread(target=write, args=(rank,)) for rank in writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert stored == [load.pages] * 2 * load.prompts
        now = node.statistics()
        assert now.blocks == now.commits_total == load.prompts * load.pages
        assert now.reservations == 0
        reader.wait_for_hits()
        assert writers[0].get(load.prompts - 1, 0, load.pages) == load.pages
