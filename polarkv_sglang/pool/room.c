/* Room for new blocks: what others must go for them. */

#include "index.h"

enum {
    MOST_EVICTED = 8192, /* bounds the work of one call; the next one carries on */
    CANDIDATES = 16,     /* segments of which one is emptied; others have to stay as they are */
    MOST_LOOKED_AT = 256,
};

static void drop(polar_index *index, uint32_t row) {
    unlink_row(index, row);
    discard(index, row);
    index->counted.blocks--;
    index->counted.evictions++;
}

/* Evicts the oldest leaves, of so many bytes or as many as are allowed; whether there were so many. */
static bool evict(polar_index *index, uint64_t wanted_bytes, uint32_t *allowed) {
    while (wanted_bytes && *allowed) {
        uint32_t row = next_leaf(&index->eviction, &index->table, index->tick);
        uint64_t slot_bytes = slot_bytes_of(row_of(index, row)->length);
        if (!row) return false;
        drop(index, row);
        --*allowed;
        wanted_bytes -= slot_bytes < wanted_bytes ? slot_bytes : wanted_bytes;
    }
    return true;
}

/* What it costs to empty a segment: each block counts for the less, the longer nobody has used it. Negative if one of
 * them has to stay. */
static double loss_of(polar_index *index, const struct segment *segment) {
    double loss = 0;
    for (uint32_t slot = 0; slot < segment->used; slot++) {
        const struct row *row = row_of(index, row_in(&index->slab, &index->table, segment, slot));
        if (row->state == UNUSED) continue;
        if (row->state != COMMITTED || row->leases) return -1;
        loss += (double)segment->slot_bytes / (double)(1 + index->tick - row->last_use);
    }
    return loss;
}

/* Makes a segment free at the least loss among some; whether one could be. Its heads may go before their tails. */
static bool empty_segment(polar_index *index) {
    struct slab *slab = &index->slab;
    struct segment *chosen = NULL;
    double least = 0;
    uint32_t most = slab->segment_count < MOST_LOOKED_AT ? slab->segment_count : MOST_LOOKED_AT;
    for (uint32_t looked = 0, found = 0; looked < most && found < CANDIDATES; looked++) {
        struct segment *segment = &slab->segments[slab->hand++ % slab->segment_count];
        double loss = loss_of(index, segment);
        if (loss < 0) continue;
        if (!found++ || loss < least) {
            chosen = segment;
            least = loss;
        }
    }
    for (uint32_t slot = 0; chosen && chosen->in_use; slot++) {
        uint32_t row = row_in(slab, &index->table, chosen, slot);
        if (row) drop(index, row);
    }
    return chosen;
}

static uint32_t give_slots(polar_index *index, const uint32_t *rows, uint32_t count, uint64_t length) {
    uint32_t given = 0;
    uint64_t address;
    while (given < count && (address = allocate_slot(&index->slab, length, rows[given]))) {
        struct row *row = row_of(index, rows[given++]);
        row->address = address;
        row->length = length;
    }
    return given;
}

uint32_t make_room(polar_index *index, const uint32_t *rows, uint32_t count, uint64_t length) {
    uint32_t got = give_slots(index, rows, count, length), allowed = MOST_EVICTED;
    uint64_t slot_bytes = slot_bytes_of(length);
    bool mixed = false; /* mostly slots of other lengths get free: the pool might be empty before a segment is */
    if (!fits(&index->slab, length)) return got;
    /* Where there is room and no slot there is no memory to count slots by. */
    while (got < count && (allowed || mixed) && !has_room(&index->slab, length)) {
        /* Not more at a time: a segment that gets free may be all that was missing. */
        uint64_t wanted_bytes = (count - got) * slot_bytes;
        uint32_t before = got;
        bool more;
        if (wanted_bytes > index->slab.segment_bytes) wanted_bytes = index->slab.segment_bytes;
        more = mixed ? empty_segment(index) : evict(index, wanted_bytes, &allowed);
        got += give_slots(index, rows + got, count - got, length);
        if (!more) break;
        mixed = mixed || 2 * (got - before) < wanted_bytes / slot_bytes;
    }
    return got;
}
