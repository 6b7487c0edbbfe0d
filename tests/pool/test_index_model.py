"""The index against a model, step by step, with check_integrity after each."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.index import RESERVATION_S, Index
from polarkv_sglang.pool.slab import Slab
from polarkv_sglang.transport.messages import KeyState

BASE = 1 << 40
SEGMENT_BYTES = 4 * 4096
CAPACITY_BYTES = 3 * SEGMENT_BYTES
LENGTHS = (1, 4096, 4097, 8192, 12_288, SEGMENT_BYTES)

# A tree: every key has the parent that half its number names.
KEYS = [number.to_bytes(16, "big") for number in range(1, 41)]
PARENTS = {KEYS[i]: KEYS[(i + 1) // 2 - 1] if i else NO_PARENT for i in range(len(KEYS))}
OWNERS = st.integers(1, 2)
KEY_LISTS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=8)


@dataclass
class Written:
    """A reservation as the model knows it."""

    owner: int
    number: int
    length: int
    addresses: dict[bytes, int]  # by reserved key
    deadline: float


@dataclass
class Read:
    """A lease as the model knows it."""

    owner: int
    number: int
    deadline: float
    ranges: list[tuple[int, int]] = field(default_factory=list)  # address, length


class IndexMachine(RuleBasedStateMachine):
    writes = Bundle("writes")
    reads = Bundle("reads")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.index = Index(Slab(BASE, CAPACITY_BYTES, SEGMENT_BYTES), clock=lambda: self.now)
        self.committed: dict[bytes, tuple[int, int, int]] = {}  # key: address, length, checksum
        self.written: list[Written] = []
        self.read: list[Read] = []
        self.checksum = 0

    def present(self) -> set[bytes]:
        return {key for key, flag in zip(KEYS, self.index.peek(KEYS), strict=True) if flag}

    def expire(self) -> None:
        self.written = [write for write in self.written if write.deadline > self.now]
        self.read = [read for read in self.read if read.deadline > self.now]

    def held(self) -> list[tuple[int, int]]:
        """Memory that a transfer may be under way on."""
        ranges = [(address, write.length) for write in self.written for address in write.addresses.values()]
        return ranges + [held for read in self.read for held in read.ranges]

    @rule(target=writes, owner=OWNERS, keys=KEY_LISTS, length=st.sampled_from(LENGTHS))
    def reserve(self, owner: int, keys: list[bytes], length: int):
        before = self.present()
        assert before == set(self.committed)
        # Expiry happens at the latest when room is needed, so the model may be ahead of the index.
        self.index.expire()
        self.expire()
        busy = {key for write in self.written for key in write.addresses}
        result = self.index.reserve(owner, keys, [PARENTS[key] for key in keys], length)
        after = self.present()
        evicted = before - after
        leased = {start for read in self.read for start, _ in read.ranges}
        assert not any(self.committed[key][0] in leased for key in evicted), "a leased block was evicted"
        assert not any(PARENTS[key] in evicted for key in after), "a head was evicted before its tail"
        for key in evicted:
            del self.committed[key]
        reserved: dict[bytes, int] = {}
        for key, address, state in zip(keys, result.addresses, result.states, strict=True):
            assert (state == KeyState.RESERVED) == (address != 0)
            match KeyState(state):
                case KeyState.RESERVED:
                    assert key not in busy
                    # (A key further on may lose its head to the room that this one needs.)
                    assert reserved or PARENTS[key] not in evicted, "a block's own head was evicted for it"
                    for start, other in self.held():
                        assert address + length <= start or start + other <= address, "memory in use"
                    reserved[key] = address
                case KeyState.PRESENT:
                    assert key in self.committed or key in evicted
                case KeyState.BUSY:
                    assert key in busy or key in reserved
        assert (result.number == 0) == (not reserved)
        if not reserved:
            return multiple()
        write = Written(owner, result.number, length, reserved, self.now + RESERVATION_S)
        self.written.append(write)
        return write

    @rule(write=consumes(writes), mask_bits=st.integers(0, 255))
    def commit(self, write: Written, mask_bits: int) -> None:
        self.expire()
        self.index.expire()
        mask = bytes(mask_bits >> bit & 1 for bit in range(len(write.addresses)))
        checksums = [self.checksum + position for position in range(len(mask))]
        self.checksum += len(mask)
        count = self.index.commit(write.owner, write.number, mask, checksums)
        if write not in self.written:
            assert count == 0
            return
        self.written.remove(write)
        assert count == sum(mask)
        for (key, address), taken, checksum in zip(write.addresses.items(), mask, checksums, strict=True):
            if taken:
                self.committed[key] = (address, write.length, checksum)

    @rule(write=writes)
    def commit_by_another_is_nothing(self, write: Written) -> None:
        mask = b"\1" * len(write.addresses)
        assert self.index.commit(write.owner + 1, write.number, mask, [0] * len(mask)) == 0

    @rule(target=reads, owner=OWNERS, keys=KEY_LISTS, lease_s=st.sampled_from((1.0, 5.0, 1e9)))
    def locate(self, owner: int, keys: list[bytes], lease_s: float):
        lease = self.index.locate(owner, keys, lease_s)
        read = Read(owner, lease.number, self.now + min(lease_s, 60.0))
        columns = zip(keys, lease.addresses, lease.lengths, lease.checksums, strict=True)
        for key, address, length, checksum in columns:
            assert (address, length, checksum) == self.committed.get(key, (0, 0, 0))
            if address:
                read.ranges.append((address, length))
        assert (lease.number == 0) == (not read.ranges)
        if not read.ranges:
            return multiple()
        self.read.append(read)
        return read

    @rule(read=consumes(reads))
    def release(self, read: Read) -> None:
        self.index.release(read.owner + 1, read.number)  # not its lease
        self.index.release(read.owner, read.number)
        if read in self.read:
            self.read.remove(read)

    @rule(keys=KEY_LISTS, stale=st.booleans())
    def report_corrupt(self, keys: list[bytes], stale: bool) -> None:
        lease = self.index.locate(9, keys, 1.0)
        self.index.release(9, lease.number)
        generations = [generation + stale for generation in lease.generations]
        self.index.report_corrupt(keys, generations)
        if not stale:
            for key in keys:
                self.committed.pop(key, None)

    @rule(seconds=st.sampled_from((0.5, 2.0, 40.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.index.expire()
        self.expire()

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        statistics = self.index.statistics()
        assert statistics.used_bytes <= CAPACITY_BYTES
        assert statistics.blocks == len(self.committed)
        assert statistics.leases == len(self.read)
        assert statistics.reservations == len(self.written)


IndexMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestIndexAgreesWithModel = IndexMachine.TestCase
