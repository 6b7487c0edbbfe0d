from __future__ import annotations

import random

import numpy as np
import pytest

from polarkv_sglang.errors import PolarError
from polarkv_sglang.identity import NO_PARENT
from polarkv_sglang.pool.table import BlockTable


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.intp)


def add(table: BlockTable, key: bytes, parent: bytes, address: int, length: int, generation: int) -> int:
    return table.add([key], [parent], [address], length, generation, [0]).item()


def test_row_of_no_block_reads_as_zeros_whatever_is_done_to_it():
    table = BlockTable(4)
    row = add(table, key(1), NO_PARENT, 4096, 100, 7)
    table.use(rows(0, row, 0), 50)
    assert table.last_uses.tolist()[: row + 1] == [0, 49]
    assert table.places(rows(0, row)) == ([0, 4096], [0, 100], [0, 0], [0, 7])
    table.check_integrity([row])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_many_blocks_are_as_one_by_one(count: int):
    """Added, committed and discarded together; some in rows that were used before."""
    names = [key(number + 1) for number in range(count)]
    parents = [NO_PARENT, *names[:-1]]
    places = [4096 * (number + 1) for number in range(count)]
    tables = BlockTable(8), BlockTable(8)
    for table in tables:
        table.discard(table.add([key(98), key(99)], [NO_PARENT] * 2, [1, 2], 50, 1, [0, 0]))
    together, single = tables
    made = together.add(names, parents, places, 100, 7, [1] * (count - 1) + [0])
    alone = [add(single, *block, 100, 7 + number) for number, block in enumerate(zip(names, parents, places))]
    for row in alone[:-1]:
        single.children[row] = 1
    leaves = together.commit(made, list(range(count)), np.arange(60, 60 - count, -1, dtype=np.uint64))
    assert leaves.tolist() == made.tolist()[-1:]
    for number, row in enumerate(alone):
        single.commit(rows(row), [number], np.array([60 - number], np.uint64))
    for table, its in (together, made), (single, rows(*alone)):
        table.check_integrity(its.tolist())
        assert [table.keys[row] for row in its] == names
        assert [table.parents[row] for row in its] == parents
        assert table.places(its) == (places, [100] * count, list(range(count)), list(range(7, 7 + count)))
        assert [table.last_uses[row] for row in its] == list(range(60, 60 - count, -1))
        for row in its:
            table.children[row] = 0
        table.discard(its)
        table.check_integrity([])


def test_discarded_row_is_blank_and_given_to_another_block():
    table = BlockTable(2)
    first = add(table, key(1), key(9), 4096, 100, 7)
    second = add(table, key(2), key(1), 8192, 100, 8)
    table.discard(rows(first))
    table.check_integrity([second])
    assert table.places(rows(first)) == ([0], [0], [0], [0])
    assert add(table, key(3), key(2), 4096, 50, 9) == first
    assert (table.keys[first], table.parents[first]) == (key(3), key(2))
    assert (table.keys[second], table.parents[second]) == (key(2), key(1))


def test_every_lease_on_a_row_counts():
    table = BlockTable(2)
    row = add(table, key(1), NO_PARENT, 4096, 100, 7)
    table.lease(rows(row, row))
    table.lease(rows(row))
    table.release(rows(row, row))
    assert table.leases[row] == 1


@pytest.mark.parametrize("scan_rows", [1, 7, 64, 1000])
def test_oldest_leaves_are_the_first_ones_after_a_tick_in_order(scan_rows: int):
    rng = random.Random(scan_rows)
    for _ in range(100):
        blocks = rng.randrange(1, 200)
        table = BlockTable(blocks, scan_rows)
        leaves = []
        last_uses = rng.sample(range(1, 1000), blocks)
        if rng.random() < 0.5:
            last_uses.sort(reverse=rng.random() < 0.5)
        for number, last_use in enumerate(last_uses):
            row = add(table, key(number), NO_PARENT, 4096 * number, 1, number + 1)
            committed, continued = rng.random() < 0.8, rng.random() < 0.3
            table.last_uses[row] = last_use * committed
            table.children[row] = continued
            if committed and not continued:
                leaves.append((last_use, row))
        after, count = rng.randrange(1000), rng.randrange(1, 100)
        expected = sorted((last_use, row) for last_use, row in leaves if last_use > after)[:count]
        assert table.oldest_leaves(after, count) == expected


def test_integrity_check_notices_lost_rows_and_remains():
    table = BlockTable(4)
    row = add(table, key(1), NO_PARENT, 4096, 100, 7)
    with pytest.raises(PolarError, match="lost or used twice"):
        table.check_integrity([])
    table.leases[row] = 1
    table.discard(rows(row))
    with pytest.raises(PolarError, match="not blank"):
        table.check_integrity([])
