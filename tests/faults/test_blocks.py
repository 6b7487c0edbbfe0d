"""Blocks that change under their readers: what these get is right, or a miss."""

from __future__ import annotations

import random

import pytest

from polarkv_sglang.transport.columns import unpack_u64
from polarkv_sglang.transport.messages import Locate, Peek, Release, ReportCorrupt
from tests.faults.nodes import FaultyNode
from tests.faults.traffic import Load, Rank, Traffic, TrafficProcess
from tests.faults.ways import WAYS


@pytest.mark.parametrize("tls", WAYS)
def test_a_flipped_byte_under_traffic_is_a_miss_dropped_and_counted(tls: str | None) -> None:
    rng = random.Random(1)
    load = Load(prompts=4, ucx_tls=tls)
    with FaultyNode(tls=tls).start() as node, Traffic(load, node.address) as traffic:
        for flipped, head in enumerate(load.heads, 1):
            node.wait_for_blocks([head])
            assert node.flip(head, rng.randrange(load.block_bytes))
            assert node.wait_for("corrupt_total", flipped).corrupt_total == flipped
        node.wait_for_blocks(load.heads)
        traffic.wait_for_hits()
        assert traffic.tally().corrupt_blocks == node.statistics().corrupt_total == len(load.heads)


def test_who_reads_on_after_the_lease_has_ended_is_told_by_the_checksum() -> None:
    leased, others = Load(name="leased", prompts=1), Load(name="others")
    key = leased.heads[0]
    with FaultyNode("8MiB").start() as node, node.running.connect() as late:
        with Rank(leased, node.address) as rank:
            assert rank.put(0, 0, 1) == 1
        located = late.request(Locate(late.next_id(), key, 0.001), 5.0)
        address = int(unpack_u64(located.address_blob)[0])
        promised = node.read(address, leased.block_bytes)
        node.wait_for("expired_leases_total", 1)
        with Traffic(others, node.address):
            node.wait_until(
                lambda _: node.count([key]) == 0 and node.read(address, leased.block_bytes) != promised,
                "the slot is written again",
            )

        # Here the read would go on. What it finds is whole, committed, and not what the lease promised.
        now = late.request(Locate(late.next_id(), b"".join(others.all_keys), 5.0), 5.0)
        owner = unpack_u64(now.address_blob).tolist().index(address)
        assert unpack_u64(now.checksum_blob)[owner] != unpack_u64(located.checksum_blob)[0]
        # So the reader reports its block, and releases its lease: neither harms the block that is there now.
        for reported in (key, others.all_keys[owner]):
            late.send(ReportCorrupt(reported, located.generation_blob))
        late.send(Release(located.lease))
        assert late.request(Peek(late.next_id(), others.all_keys[owner]), 5.0).present == b"\1"
        assert node.statistics().corrupt_total == 0


@pytest.mark.parametrize("tls", WAYS)
def test_a_client_frozen_in_a_read_until_its_blocks_are_gone_takes_nothing_for_them(tls: str | None) -> None:
    reads = Load(name="reads", prompts=2, ucx_tls=tls, kinds=("get",), deadline_s=0.2, may_freeze=True)
    others = Load(name="others", ucx_tls=tls, kinds=("put",))

    def put() -> None:
        with Rank(reads, node.address) as writer:
            for prompt in range(reads.prompts):
                assert writer.put(prompt, 0, reads.pages) == reads.pages

    with FaultyNode("8MiB", tls=tls).start() as node, TrafficProcess(reads, node.address) as reader:
        put()
        reader.wait_for_hits()
        reader.freeze()
        # What is mapped is read without a lease: wherever the reader is then, it is likely to be in a read.
        while tls is not None and not node.statistics().leases:
            reader.thaw()
            reader.freeze()
        node.wait_until(lambda now: now.leases == 0, "its leases end")
        with Traffic(others, node.address):
            node.wait_until(lambda _: node.count(reads.heads) == 0, "its blocks are gone")
        reader.thaw()
        put()
        reader.wait_for_hits()
        reader.stop()
        # What it read late had a wrong checksum, but that was no fault of the blocks that are there now.
        assert node.statistics().corrupt_total == 0
