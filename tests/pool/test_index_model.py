"""The index against a model and a memory, step by step, with check_integrity after each.

Writers scribble over their slots as soon as they have them, so a reader that could ever see anything but
the block it asked for, or a writer whose slot is given away, is noticed at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.pages import SharedMemory
from polarkv_sglang.pool.slab import PAGE_BYTES, Slab
from polarkv_sglang.transport.messages import MAX_LEASE_S, RESERVATION_S, KeyState
from tests.pool.listed import ListedIndex
from tests.pool.rings import OFFERED, READ, WRITTEN, Ring

BASE = 1 << 40
SEGMENT_BYTES = 4 * PAGE_BYTES
CAPACITY_BYTES = 3 * SEGMENT_BYTES
LENGTHS = st.sampled_from((1, 4096, 4096, 4096, 4097, 8192, 12_288, SEGMENT_BYTES))

# A tree: every key has the parent that half its number names.
KEYS = [number.to_bytes(16, "big") for number in range(1, 25)]
PARENTS = {KEYS[i]: KEYS[(i + 1) // 2 - 1] if i else NO_PARENT for i in range(len(KEYS))}


def prefix(key: bytes) -> list[bytes]:
    """The blocks from the root to this one."""
    return [*prefix(PARENTS[key]), key] if key != NO_PARENT else []


OWNERS = st.integers(1, 2)
PREFIXES = st.sampled_from(KEYS).map(prefix)
KEY_LISTS = PREFIXES | st.lists(st.sampled_from(KEYS), min_size=1, max_size=8)
LEASES = st.sampled_from((1.0, 5.0, 1e9))


@dataclass
class Stored:
    """A committed block as the model knows it."""

    address: int
    length: int
    checksum: int  # never the same twice
    last_use: int


@dataclass
class Written:
    """A reservation as the model knows it."""

    owner: int
    number: int
    length: int
    addresses: dict[bytes, int]  # by reserved key
    deadline: float
    filled: bool = False


@dataclass
class Read:
    """A lease as the model knows it."""

    owner: int
    number: int
    deadline: float
    blocks: dict[bytes, Stored]
    generations: dict[bytes, int]


@dataclass
class Granted:
    """Slots that a writer has ahead, as the model knows them."""

    length: int
    addresses: list[int]
    deadline: float


class IndexMachine(RuleBasedStateMachine):
    writes = Bundle("writes")
    reads = Bundle("reads")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.directory = SharedMemory("directory", PAGE_BYTES)
        self.index = ListedIndex(
            Slab(BASE, CAPACITY_BYTES, SEGMENT_BYTES),
            directory=self.directory,
            eviction_batch=2,  # so that it has to look again and again
            most_granted=4 * PAGE_BYTES,
            clock=lambda: self.now,
        )
        self.rings = {owner: Ring() for owner in (1, 2)}
        for owner, ring in self.rings.items():
            self.index.open_ring(owner, ring.memory)
        self.granted: dict[int, Granted] = {}  # by owner
        self.committed: dict[bytes, Stored] = {}
        self.written: list[Written] = []  # until the index has noticed that they expired
        self.read: list[Read] = []
        self.memory: dict[int, object] = {}  # what was last written to a page, by its address
        self.generations: dict[int, int] = {}  # checksum, by generation
        self.checksum = 0
        self.tick = 0
        self.serial = 0

    @initialize(mixed=st.booleans())
    def choose_lengths(self, mixed: bool) -> None:
        self.mixed = mixed  # else all slots are of one size, and eviction is strict

    def present(self) -> set[bytes]:
        return {key for key, flag in zip(KEYS, self.index.peek(KEYS), strict=True) if flag}

    def expire(self) -> None:
        self.index.expire()
        self.written = [write for write in self.written if write.filled or write.deadline > self.now]
        self.read = [read for read in self.read if read.deadline > self.now]
        self.granted = {owner: slots for owner, slots in self.granted.items() if slots.deadline > self.now}

    def write_pages(self, address: int, length: int, content: object) -> None:
        for page in range(address, address + length, PAGE_BYTES):
            self.memory[page] = content

    def pages(self, address: int, length: int) -> set[object]:
        return {self.memory[page] for page in range(address, address + length, PAGE_BYTES)}

    def use(self, keys: Iterable[bytes]) -> None:
        """Heads are fresher than tails."""
        keys = list(keys)
        self.tick += len(keys)
        for position, key in enumerate(keys):
            if key in self.committed:
                self.committed[key].last_use = self.tick - position

    def idle_leaves(self) -> set[bytes]:
        """What may be evicted."""
        here = {*self.committed, *(key for write in self.written for key in write.addresses)}
        continued = {PARENTS[key] for key in here}
        leased = {stored.address for read in self.read for stored in read.blocks.values()}
        return {k for k, s in self.committed.items() if k not in continued and s.address not in leased}

    @rule(target=writes, owner=OWNERS, keys=KEY_LISTS, length=LENGTHS)
    def reserve(self, owner: int, keys: list[bytes], length: int):
        write = self.begin(owner, keys, length)
        return write if write is not None else multiple()

    @rule(owner=OWNERS, keys=PREFIXES, length=LENGTHS)
    def put(self, owner: int, keys: list[bytes], length: int) -> None:
        write = self.begin(owner, keys, length)
        if write is not None:
            self.end(write, b"\1" * len(write.addresses))

    @rule(write=consumes(writes), mask_bits=st.integers(0, 255))
    def commit(self, write: Written, mask_bits: int) -> None:
        self.end(write, bytes(mask_bits >> bit & 1 for bit in range(len(write.addresses))))

    def begin(self, owner: int, keys: list[bytes], length: int) -> Written | None:
        """Reserve, and scribble over what was reserved."""
        # Expiry happens at the latest when room is needed.
        self.expire()
        length = length if self.mixed else min(length, PAGE_BYTES)
        idle = self.idle_leaves()
        busy = {key for write in self.written for key in write.addresses}
        result = self.index.reserve(owner, keys, [PARENTS[key] for key in keys], length)
        evicted = self.evicted(idle, keys)
        after = self.committed.keys() - evicted
        reserved: dict[bytes, int] = {}
        for key, address, state in zip(keys, result.addresses, result.states, strict=True):
            assert (state == KeyState.RESERVED) == (address != 0)
            match KeyState(state):
                case KeyState.RESERVED:
                    assert key not in busy
                    # (A key further on may lose its head to the room that this one needs.)
                    spoiled = PARENTS[key] in evicted and not self.mixed
                    assert reserved or not spoiled, "a block's own head was evicted for it"
                    reserved[key] = address
                case KeyState.PRESENT:
                    assert key in self.committed
                case KeyState.BUSY:
                    assert key in busy or key in reserved
                case KeyState.NO_ROOM:
                    assert key not in after
                    assert key not in busy
        self.use(keys)
        for key in evicted:
            del self.committed[key]
        assert (result.number == 0) == (not reserved)
        if not reserved:
            return None
        write = Written(owner, result.number, length, reserved, self.now + RESERVATION_S)
        self.written.append(write)
        for key, address in reserved.items():
            self.write_pages(address, length, (write.number, key))
        return write

    def evicted(self, idle: set[bytes], keys: Sequence[bytes]) -> set[bytes]:
        """The blocks that a request of these keys has evicted."""
        after = self.present()
        evicted = self.committed.keys() - after
        assert after <= self.committed.keys(), "a block is visible before it was committed"
        leased = {stored.address for read in self.read for stored in read.blocks.values()}
        assert not any(self.committed[key].address in leased for key in evicted), "a leased block was evicted"
        if not self.mixed:
            assert not any(PARENTS[key] in evicted for key in after), "a head was evicted before its tail"
            # Neither used nor continued by this request.
            spared = (idle & after) - {*keys, *(PARENTS[key] for key in keys)}
            newest = max((self.committed[key].last_use for key in evicted.difference(keys)), default=0)
            assert all(self.committed[key].last_use > newest for key in spared), "an older leaf was spared"
        return evicted

    @rule(owner=OWNERS, length=LENGTHS, slots=st.integers(1, 4))
    def grant(self, owner: int, length: int, slots: int) -> None:
        self.expire()
        length = length if self.mixed else min(length, PAGE_BYTES)
        idle = self.idle_leaves()
        addresses = self.index.grant(owner, length, slots)
        assert len(addresses) in (0, slots)
        assert len(addresses) * -(-length // PAGE_BYTES) <= 4
        for key in self.evicted(idle, ()):
            del self.committed[key]
        for address in addresses:
            self.write_pages(address, length, ("granted", owner, address))
        self.granted[owner] = Granted(length, addresses, self.now + RESERVATION_S)

    @rule(owner=OWNERS, key=st.sampled_from(KEYS), which=st.integers(0, 2))
    def tell_of_a_write(self, owner: int, key: bytes, which: int) -> None:
        """Of a slot that the owner has ahead, or of one that is another's."""
        granted = self.granted.get(owner)
        ours = granted.addresses if granted is not None else []
        address = ours[which] if which < len(ours) else BASE + which * PAGE_BYTES
        self.checksum += 1
        self.rings[owner].tell(WRITTEN, key, PARENTS[key], address, self.checksum)
        late = self.index.statistics().late_commits_total
        if granted is None or address not in ours:
            return
        assert self.index.statistics().late_commits_total == late
        ours.remove(address)
        if key in self.committed or any(key in write.addresses for write in self.written):
            return
        self.tick += 1
        self.committed[key] = Stored(address, granted.length, self.checksum, self.tick)
        self.write_pages(address, granted.length, self.checksum)

    @rule(owner=OWNERS, keys=KEY_LISTS, kind=st.sampled_from((READ, OFFERED)))
    def tell_of_use(self, owner: int, keys: list[bytes], kind: int) -> None:
        hits = self.index.statistics().hits_total
        for key in reversed(keys):
            self.rings[owner].tell(kind, key)
        self.use(keys)
        assert self.index.statistics().hits_total == hits + (len(keys) if kind == READ else 0)

    @rule(owner=OWNERS)
    def connect_anew(self, owner: int) -> None:
        """What the owner has ahead is nobody's until its time is over."""
        self.index.close_ring(owner)
        self.rings[owner].close()
        self.rings[owner] = Ring()
        self.index.open_ring(owner, self.rings[owner].memory)
        if owner in self.granted:
            self.serial += 1
            self.granted[-self.serial] = self.granted.pop(owner)

    def end(self, write: Written, mask: bytes) -> None:
        """Commit what the mask says, and abort the rest."""
        self.expire()
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
                self.committed[key] = Stored(address, write.length, checksum, 0)
                self.write_pages(address, write.length, checksum)
        self.use(write.addresses)

    @rule(write=writes)
    def fill(self, write: Written) -> None:
        assert self.index.fill(write.owner + 1, write.number) is None
        slots = self.index.fill(write.owner, write.number)
        if write not in self.written:
            assert slots is None
            return
        write.filled = True
        assert slots == ([*write.addresses.values()], write.length, write.deadline - self.now)

    @rule(write=consumes(writes))
    def give_up(self, write: Written) -> None:
        self.index.give_up(write.owner + 1, write.number)  # not its reservation
        self.index.give_up(write.owner, write.number)
        if write in self.written:
            self.written.remove(write)

    @rule(write=writes)
    def commit_by_another_is_nothing(self, write: Written) -> None:
        mask = b"\1" * len(write.addresses)
        assert self.index.commit(write.owner + 1, write.number, mask, [0] * len(mask)) == 0

    @rule(target=reads, owner=OWNERS, keys=KEY_LISTS, lease_s=LEASES)
    def locate(self, owner: int, keys: list[bytes], lease_s: float):
        lease = self.index.locate(owner, keys, lease_s)
        self.use(keys)
        read = Read(owner, lease.number, self.now + min(lease_s, MAX_LEASE_S), {}, {})
        columns = zip(keys, *lease[1:], strict=True)
        for key, address, length, checksum, generation in columns:
            stored = self.committed.get(key)
            if stored is None:
                assert (address, length, checksum, generation) == (0, 0, 0, 0)
                continue
            assert (address, length, checksum) == (stored.address, stored.length, stored.checksum)
            assert generation > 0
            assert self.generations.setdefault(generation, checksum) == checksum, "a generation came again"
            read.blocks[key] = stored
            read.generations[key] = generation
        assert (lease.number == 0) == (not read.blocks)
        if not read.blocks:
            return multiple()
        self.read.append(read)
        return read

    @rule(target=reads, owner=OWNERS, keys=KEY_LISTS, lease_s=LEASES)
    def hold(self, owner: int, keys: list[bytes], lease_s: float):
        leased = {s.address: s.length for read in self.read for s in read.blocks.values()}
        blocks = {key: self.committed[key] for key in keys if key in self.committed}
        with_these = leased | {stored.address: stored.length for stored in blocks.values()}
        number, present = self.index.hold(owner, keys, lease_s)
        assert [bool(flag) for flag in present] == [key in blocks for key in keys]
        assert (number > 0) == (bool(blocks) and sum(with_these.values()) <= CAPACITY_BYTES / 2)
        if not number:
            return multiple()
        generations = dict(zip(blocks, self.index.generations(list(blocks))))
        read = Read(owner, number, self.now + min(lease_s, MAX_LEASE_S), blocks, generations)
        self.read.append(read)
        return read

    @rule(read=reads, lease_s=LEASES)
    def renew(self, read: Read, lease_s: float) -> None:
        assert not self.index.renew(read.owner + 1, read.number, lease_s)
        holds = read in self.read and read.deadline > self.now
        assert self.index.renew(read.owner, read.number, lease_s) == holds
        if holds:
            read.deadline = self.now + min(lease_s, MAX_LEASE_S)

    @rule(read=consumes(reads))
    def release(self, read: Read) -> None:
        self.index.release(read.owner + 1, read.number)  # not its lease
        self.index.release(read.owner, read.number)
        if read in self.read:
            self.read.remove(read)

    @rule(read=reads, stale=st.booleans())
    def report_corrupt(self, read: Read, stale: bool) -> None:
        """By a reader that may be late: the block may have been replaced meanwhile."""
        self.index.report_corrupt(
            list(read.generations), [g + stale * 10**9 for g in read.generations.values()]
        )
        for key, stored in read.blocks.items():
            if not stale and key in self.committed and self.committed[key].checksum == stored.checksum:
                del self.committed[key]

    @rule(keys=KEY_LISTS)
    def describe(self, keys: list[bytes]) -> None:
        stored = [self.committed.get(key) for key in keys]
        parents, lengths = self.index.describe(keys)
        assert parents == [PARENTS[key] if s else NO_PARENT for key, s in zip(keys, stored)]
        assert lengths == [s.length if s else 0 for s in stored]

    @rule(seconds=st.sampled_from((0.5, 2.0, 40.0)), noticed=st.booleans())
    def wait(self, seconds: float, noticed: bool) -> None:
        self.now += seconds
        if noticed:
            self.expire()

    @rule(keys=KEY_LISTS)
    def read_from_directory(self, keys: list[bytes]) -> None:
        hits = self.index.statistics().hits_total
        self.index.use(keys)
        self.use(keys)
        assert self.index.statistics().hits_total == hits + len(keys)

    def teardown(self) -> None:
        self.directory.close()
        for ring in self.rings.values():
            ring.close()

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        assert self.present() == set(self.committed)
        statistics = self.index.statistics()
        assert statistics.used_bytes <= CAPACITY_BYTES
        assert statistics.blocks == len(self.committed)
        assert statistics.leases == len(self.read)
        assert statistics.reservations == len(self.written)
        granted = [slots.length for slots in self.granted.values() for _ in slots.addresses]
        assert statistics.granted_bytes == sum(-(-length // PAGE_BYTES) * PAGE_BYTES for length in granted)

    @invariant()
    def nobody_wrote_to_what_is_held(self) -> None:
        for stored in [*self.committed.values(), *(s for read in self.read for s in read.blocks.values())]:
            assert self.pages(stored.address, stored.length) == {stored.checksum}, (
                "a reader sees another block"
            )
        for write in self.written:
            for key, address in write.addresses.items():
                assert self.pages(address, write.length) == {(write.number, key)}, "a slot has two writers"
        for slots in self.granted.values():
            for address in slots.addresses:
                writers = {(kind, at) for kind, _, at in self.pages(address, slots.length)}
                assert writers == {("granted", address)}, "a slot has two writers"


@pytest.mark.parametrize("examples", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_index_agrees_with_model(examples: int) -> None:
    steps = settings(max_examples=examples, stateful_step_count=50, deadline=None)
    run_state_machine_as_test(IndexMachine, settings=steps)
