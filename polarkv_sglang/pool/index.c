/* What a memory node holds: blocks by key, reservations of writers, leases of readers. index.py says what each
 * call promises. */

#include <stdlib.h>
#include <string.h>

#include "index.h"

enum {
    LEASE_ROWS = 32, /* a lease itself takes about as much memory as so many rows */
    /* Bounds the work of one call where blocks of another length must go until a segment is free; the next one
     * carries on. */
    MOST_SUGGESTIONS = 8192,
};

int polar_abi(void) {
    return POLAR_ABI;
}

polar_index *polar_index_new(const polar_index_settings *settings) {
    polar_index *index = calloc(1, sizeof(*index));
    if (!index) return NULL;
    pthread_mutex_init(&index->lock, NULL);
    index->settings = *settings;
    index->generation = 1;
    if (!slab_open(&index->slab, settings->base, settings->capacity_bytes, settings->segment_bytes) ||
        !table_open(&index->table, index->slab.capacity_bytes / SLOT_BYTES) ||
        !eviction_open(&index->eviction, settings->eviction_batch)) {
        polar_index_free(index);
        return NULL;
    }
    return index;
}

void polar_index_free(polar_index *index) {
    for (uint32_t bucket = 0; bucket < OWNER_BUCKETS; bucket++)
        while (index->owners[bucket]) {
            struct owner *owner = index->owners[bucket];
            index->owners[bucket] = owner->next;
            free(owner);
        }
    holdings_close(&index->reservations);
    holdings_close(&index->leases);
    eviction_close(&index->eviction);
    table_close(&index->table);
    slab_close(&index->slab);
    pthread_mutex_destroy(&index->lock);
    free(index);
}

/* ---- Blocks and those that they continue. */

static struct row *row_of(polar_index *index, uint32_t row) {
    return &index->table.rows[row];
}

/* A block will continue `parent`. */
static void join(polar_index *index, struct key parent) {
    uint32_t row;
    if (is_none(parent)) return;
    row = find_row(&index->table, parent);
    if (!row) row = add_row(&index->table, parent, ABSENT);
    row_of(index, row)->children++;
}

/* A block that continued `parent` is gone. */
static void leave(polar_index *index, struct key parent) {
    uint32_t row;
    if (is_none(parent)) return;
    row = find_row(&index->table, parent);
    if (--row_of(index, row)->children) return;
    if (row_of(index, row)->state == ABSENT) {
        take_out(&index->table, row);
        free_row(&index->table, row);
    } else {
        add_leaf(&index->eviction, index->table.rows, row);
    }
}

/* Lets nobody find a block any more. What continues it has a row of its own then that stands for it. */
static void unlink_row(polar_index *index, uint32_t row) {
    struct row *block = row_of(index, row);
    if (block->children) {
        uint32_t absent = new_row(&index->table);
        *row_of(index, absent) = (struct row){
            .key = block->key,
            .state = ABSENT,
            .children = block->children,
            .queued = row_of(index, absent)->queued,
        };
        put_in_place(&index->table, absent, row);
        block->children = 0;
    } else {
        take_out(&index->table, row);
    }
    block->state = DROPPED;
    leave(index, block->parent);
}

/* Gives the slot and the row of an unlinked block to others. */
static void discard(polar_index *index, uint32_t row) {
    if (row_of(index, row)->address) free_slot(&index->slab, row_of(index, row)->address);
    free_row(&index->table, row);
}

static uint32_t committed_row(polar_index *index, struct key key) {
    uint32_t row = find_row(&index->table, key);
    return row_of(index, row)->state == COMMITTED ? row : 0;
}

/* Looks for the keys' blocks, which are the found ones until the next call; how many there are. */
static uint32_t find(polar_index *index, const uint8_t *keys, uint32_t count) {
    uint32_t present = 0;
    find_rows(&index->table, keys, count, index->found);
    for (uint32_t i = 0; i < count; i++) {
        if (row_of(index, index->found[i])->state == COMMITTED)
            present++;
        else
            index->found[i] = 0;
    }
    return present;
}

/* Of the found blocks heads are used later than their tails. */
static void use(polar_index *index, uint32_t count) {
    index->tick += count;
    for (uint32_t i = 0; i < count; i++)
        if (index->found[i]) row_of(index, index->found[i])->last_use = index->tick - i;
}

/* ---- Leases. */

static struct owner **owner_of(polar_index *index, uint64_t number) {
    struct owner **owner = &index->owners[number % OWNER_BUCKETS];
    while (*owner && (*owner)->owner != number) owner = &(*owner)->next;
    return owner;
}

/* Counts rows against what an owner may have; false if that is too much. */
static bool charge(polar_index *index, uint64_t number, uint64_t rows) {
    struct owner **owner = owner_of(index, number);
    if ((*owner ? (*owner)->rows : 0) + rows > index->settings.most_leased_rows) return false;
    if (!*owner) {
        *owner = calloc(1, sizeof(**owner));
        if (!*owner) return false;
        (*owner)->owner = number;
    }
    (*owner)->rows += rows;
    return true;
}

static void refund(polar_index *index, uint64_t number, uint64_t rows) {
    struct owner **place = owner_of(index, number), *owner = *place;
    owner->rows -= rows;
    if (owner->rows) return;
    *place = owner->next;
    free(owner);
}

static void end_lease(polar_index *index, struct holding *lease) {
    for (uint32_t i = 0; i < lease->count; i++) {
        struct row *row = row_of(index, lease->rows[i]);
        if (--row->leases) continue;
        index->counted.leased_bytes -= row->length;
        if (row->state != DROPPED) continue;
        index->counted.quarantined_blocks--;
        discard(index, lease->rows[i]);
    }
    refund(index, lease->owner, LEASE_ROWS + lease->count);
    end_holding(&index->leases, lease);
}

/* A lease on the found blocks, of which there are `present` under so many keys; NULL if there is none, or it may
 * not be. */
static struct holding *begin_lease(polar_index *index, uint64_t owner, uint32_t count, uint32_t present,
                                   int64_t deadline_ns) {
    struct holding *lease;
    uint32_t at = 0;
    if (!present || !charge(index, owner, LEASE_ROWS + present)) return NULL;
    lease = new_holding(&index->leases, owner, present);
    if (!lease) {
        refund(index, owner, LEASE_ROWS + present);
        return NULL;
    }
    lease->deadline_ns = deadline_ns;
    for (uint32_t i = 0; i < count; i++) {
        struct row *row = row_of(index, index->found[i]);
        if (!index->found[i]) continue;
        lease->rows[at++] = index->found[i];
        if (!row->leases++) index->counted.leased_bytes += row->length;
    }
    return lease;
}

static int64_t lease_deadline(const polar_index *index, int64_t lease_ns, int64_t now_ns) {
    int64_t longest_ns = index->settings.longest_lease_ns;
    return now_ns + (lease_ns < longest_ns ? lease_ns : longest_ns);
}

/* ---- Reservations. */

/* Undoes the reservation of a block. */
static void abort_row(polar_index *index, uint32_t row) {
    unlink_row(index, row);
    discard(index, row);
}

static void abort_reservation(polar_index *index, struct holding *reservation) {
    for (uint32_t i = 0; i < reservation->count; i++) abort_row(index, reservation->rows[i]);
    end_holding(&index->reservations, reservation);
}

static void expire(polar_index *index, int64_t now_ns) {
    for (uint32_t place = 0; place < index->leases.used; place++) {
        struct holding *lease = index->leases.places[place];
        if (!lease || lease->deadline_ns > now_ns) continue;
        index->counted.expired_leases++;
        end_lease(index, lease);
    }
    for (uint32_t place = 0; place < index->reservations.used; place++) {
        struct holding *reservation = index->reservations.places[place];
        if (!reservation || reservation->flag || reservation->deadline_ns > now_ns) continue;
        index->counted.expired_reservations++;
        abort_reservation(index, reservation);
    }
}

/* Evicts blocks of so many bytes that nobody writes, reads or continues; whether there were any. */
static bool evict(polar_index *index, uint64_t wanted_bytes, uint32_t *suggestions) {
    bool any = false;
    while (wanted_bytes && *suggestions) {
        uint32_t row = next_leaf(&index->eviction, &index->table);
        uint64_t slot_bytes = slot_bytes_of(row_of(index, row)->length);
        if (!row) break;
        --*suggestions;
        if (row_of(index, row)->leases) continue;
        unlink_row(index, row);
        discard(index, row);
        index->counted.blocks--;
        index->counted.evictions++;
        wanted_bytes -= slot_bytes < wanted_bytes ? slot_bytes : wanted_bytes;
        any = true;
    }
    return any;
}

/* Slots for new blocks, as far as there is room or can be made; how many. */
static uint32_t make_room(polar_index *index, uint64_t length, uint32_t count, uint64_t *addresses) {
    uint32_t got = allocate_slots(&index->slab, length, count, addresses), suggestions = MOST_SUGGESTIONS;
    if (got == count || !fits(&index->slab, length)) return got;
    while (got < count) {
        /* Not more at a time: a segment that gets free may be all that was missing. */
        uint64_t wanted_bytes = (count - got) * slot_bytes_of(length);
        if (wanted_bytes > index->slab.segment_bytes) wanted_bytes = index->slab.segment_bytes;
        if (!evict(index, wanted_bytes, &suggestions)) break;
        got += allocate_slots(&index->slab, length, count - got, addresses + got);
    }
    end_suggestions(&index->eviction, &index->table);
    return got;
}

/* Makes rows of those keys that are neither here nor being written, and says of the others what they are; NO_ROOM
 * of those that are named once more. How many. */
static uint32_t add_new(polar_index *index, const uint8_t *keys, const uint8_t *parents, uint32_t count,
                        uint32_t *rows, uint8_t *states) {
    uint64_t first = index->generation;
    uint32_t added = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = find_row(&index->table, key_at(keys, i));
        struct row *row = row_of(index, number);
        if (row->state == COMMITTED) {
            states[i] = POLAR_PRESENT;
        } else if (row->state == RESERVED) {
            states[i] = row->generation >= first ? POLAR_NO_ROOM : POLAR_BUSY;
        } else {
            states[i] = POLAR_RESERVED;
            if (!number) number = add_row(&index->table, key_at(keys, i), RESERVED);
            row = row_of(index, number);
            row->state = RESERVED;
            row->generation = index->generation++;
            row->parent = key_at(parents, i);
            rows[added++] = number;
        }
    }
    /* Before anything is evicted for them. */
    for (uint32_t i = 0; i < added; i++) join(index, row_of(index, rows[i])->parent);
    return added;
}

static uint64_t reserve(polar_index *index, uint64_t owner, const uint8_t *keys, const uint8_t *parents,
                        uint32_t count, uint64_t length, bool fill, int64_t now_ns, uint64_t *addresses,
                        uint8_t *states) {
    struct holding *reservation;
    uint32_t added, got, at = 0;
    if (!has_room(&index->slab, length)) expire(index, now_ns);
    /* Before any eviction, which relies on later uses having later ticks. */
    find(index, keys, count);
    use(index, count);
    reservation = table_has_room(&index->table, 2 * count) ? new_holding(&index->reservations, owner, count) : NULL;
    if (!reservation) {
        memset(states, POLAR_NO_ROOM, count);
        return 0;
    }
    added = add_new(index, keys, parents, count, reservation->rows, states);
    got = make_room(index, length, added, addresses);
    for (uint32_t i = 0; i < got; i++) {
        row_of(index, reservation->rows[i])->address = addresses[i];
        row_of(index, reservation->rows[i])->length = length;
    }
    for (uint32_t i = added; i-- > got;) abort_row(index, reservation->rows[i]);
    /* Addresses move from where they were put, at the front, to their keys' places. */
    for (uint32_t i = 0; i < count; i++) at += states[i] == POLAR_RESERVED;
    for (uint32_t i = count; i--;) {
        if (states[i] == POLAR_RESERVED) {
            addresses[i] = --at < got ? addresses[at] : 0;
            if (!addresses[i]) states[i] = POLAR_NO_ROOM;
        } else {
            addresses[i] = 0;
            /* One that is named once more, and was reserved. */
            if (states[i] == POLAR_NO_ROOM && find_row(&index->table, key_at(keys, i)) &&
                row_of(index, find_row(&index->table, key_at(keys, i)))->state == RESERVED)
                states[i] = POLAR_BUSY;
        }
    }
    if (!got) {
        end_holding(&index->reservations, reservation);
        return 0;
    }
    reservation->count = got;
    reservation->deadline_ns = now_ns + index->settings.reservation_ns;
    reservation->flag = fill;
    return reservation->number;
}

static void count_refused(polar_index *index, const uint8_t *states, uint32_t count, uint64_t length) {
    uint64_t refused = 0;
    for (uint32_t i = 0; i < count; i++) refused += states[i] == POLAR_NO_ROOM;
    if (fits(&index->slab, length)) {
        index->counted.no_room += refused;
    } else if (refused) {
        index->counted.too_long += refused;
        if (length > index->counted.longest) index->counted.longest = length;
    }
}

/* ---- Calls. */

uint64_t polar_reserve(polar_index *index, uint64_t owner, const uint8_t *keys, const uint8_t *parents,
                       uint32_t count, uint64_t length, int fill, int64_t now_ns, uint64_t *addresses,
                       uint8_t *states) {
    uint64_t number;
    pthread_mutex_lock(&index->lock);
    number = reserve(index, owner, keys, parents, count, length, fill, now_ns, addresses, states);
    count_refused(index, states, count, length);
    pthread_mutex_unlock(&index->lock);
    return number;
}

static uint32_t commit(polar_index *index, struct holding *reservation, const uint8_t *mask,
                       const uint64_t *checksums) {
    uint32_t committed = 0;
    index->tick += reservation->count;
    for (uint32_t i = 0; i < reservation->count; i++) {
        struct row *row = row_of(index, reservation->rows[i]);
        if (!mask[i]) {
            abort_row(index, reservation->rows[i]);
            continue;
        }
        row->state = COMMITTED;
        row->checksum = checksums[i];
        row->last_use = index->tick - i;
        add_leaf(&index->eviction, index->table.rows, reservation->rows[i]);
        committed++;
    }
    index->counted.blocks += committed;
    index->counted.commits += committed;
    end_holding(&index->reservations, reservation);
    return committed;
}

int64_t polar_commit(polar_index *index, uint64_t owner, uint64_t number, const uint8_t *mask,
                     const uint64_t *checksums, uint32_t count) {
    struct holding *reservation;
    int64_t committed = 0;
    pthread_mutex_lock(&index->lock);
    reservation = find_holding(&index->reservations, owner, number);
    if (!reservation)
        for (uint32_t i = 0; i < count; i++) index->counted.late_commits += mask[i] != 0;
    else if (reservation->count != count)
        committed = -(int64_t)reservation->count;
    else
        committed = commit(index, reservation, mask, checksums);
    pthread_mutex_unlock(&index->lock);
    return committed;
}

uint32_t polar_fill(polar_index *index, uint64_t owner, uint64_t number, int64_t now_ns, uint64_t *addresses,
                    uint64_t *length, int64_t *left_ns) {
    struct holding *reservation;
    uint32_t count = 0;
    pthread_mutex_lock(&index->lock);
    reservation = find_holding(&index->reservations, owner, number);
    if (reservation) {
        reservation->flag = true;
        for (; count < reservation->count; count++)
            addresses[count] = row_of(index, reservation->rows[count])->address;
        *length = row_of(index, reservation->rows[0])->length;
        *left_ns = reservation->deadline_ns - now_ns;
    }
    pthread_mutex_unlock(&index->lock);
    return count;
}

void polar_give_up(polar_index *index, uint64_t owner, uint64_t number, int64_t now_ns) {
    struct holding *reservation;
    pthread_mutex_lock(&index->lock);
    reservation = find_holding(&index->reservations, owner, number);
    if (reservation) {
        index->counted.expired_reservations += reservation->deadline_ns <= now_ns;
        abort_reservation(index, reservation);
    }
    pthread_mutex_unlock(&index->lock);
}

uint64_t polar_locate(polar_index *index, uint64_t owner, const uint8_t *keys, uint32_t count, int64_t lease_ns,
                      int counted, int64_t now_ns, const polar_places *places) {
    struct holding *lease;
    uint64_t number = 0;
    uint32_t present;
    pthread_mutex_lock(&index->lock);
    present = find(index, keys, count);
    if (counted) {
        use(index, count);
        index->counted.hits += present;
        index->counted.misses += count - present;
    }
    lease = begin_lease(index, owner, count, present, lease_deadline(index, lease_ns, now_ns));
    for (uint32_t i = 0; i < count; i++) {
        const struct row *row = row_of(index, lease ? index->found[i] : 0);
        places->addresses[i] = row->address;
        places->lengths[i] = row->length;
        places->checksums[i] = row->checksum;
        places->generations[i] = row->generation;
    }
    if (lease) number = lease->number;
    pthread_mutex_unlock(&index->lock);
    return number;
}

uint64_t polar_hold(polar_index *index, uint64_t owner, const uint8_t *keys, uint32_t count, int64_t lease_ns,
                    int64_t now_ns, uint8_t *present) {
    struct holding *lease;
    uint64_t number = 0;
    pthread_mutex_lock(&index->lock);
    lease = begin_lease(index, owner, count, find(index, keys, count), lease_deadline(index, lease_ns, now_ns));
    for (uint32_t i = 0; i < count; i++) present[i] = index->found[i] > 0;
    if (lease) {
        lease->flag = true;
        number = lease->number;
        if (index->counted.leased_bytes > index->settings.most_held_bytes) {
            end_lease(index, lease);
            number = 0;
        }
    }
    pthread_mutex_unlock(&index->lock);
    return number;
}

int polar_renew(polar_index *index, uint64_t owner, uint64_t number, int64_t lease_ns, int64_t now_ns) {
    struct holding *lease;
    bool lasts;
    pthread_mutex_lock(&index->lock);
    lease = find_holding(&index->leases, owner, number);
    lasts = lease && lease->deadline_ns > now_ns;
    if (lasts) lease->deadline_ns = lease_deadline(index, lease_ns, now_ns);
    pthread_mutex_unlock(&index->lock);
    return lasts;
}

void polar_release(polar_index *index, uint64_t owner, uint64_t number) {
    struct holding *lease;
    pthread_mutex_lock(&index->lock);
    lease = find_holding(&index->leases, owner, number);
    if (lease) end_lease(index, lease);
    pthread_mutex_unlock(&index->lock);
}

void polar_end_holds(polar_index *index, uint64_t owner) {
    pthread_mutex_lock(&index->lock);
    for (uint32_t place = 0; place < index->leases.used; place++) {
        struct holding *lease = index->leases.places[place];
        if (lease && lease->owner == owner && lease->flag) end_lease(index, lease);
    }
    pthread_mutex_unlock(&index->lock);
}

void polar_report_corrupt(polar_index *index, const uint8_t *keys, const uint64_t *generations, uint32_t count) {
    pthread_mutex_lock(&index->lock);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t row = committed_row(index, key_at(keys, i));
        if (!row || row_of(index, row)->generation != generations[i]) continue;
        index->counted.corrupt++;
        index->counted.blocks--;
        unlink_row(index, row);
        if (row_of(index, row)->leases)
            index->counted.quarantined_blocks++;
        else
            discard(index, row);
    }
    pthread_mutex_unlock(&index->lock);
}

void polar_peek(polar_index *index, const uint8_t *keys, uint32_t count, uint8_t *present) {
    pthread_mutex_lock(&index->lock);
    find(index, keys, count);
    for (uint32_t i = 0; i < count; i++) present[i] = index->found[i] > 0;
    pthread_mutex_unlock(&index->lock);
}

void polar_describe(polar_index *index, const uint8_t *keys, uint32_t count, uint8_t *parents, uint64_t *lengths) {
    pthread_mutex_lock(&index->lock);
    find(index, keys, count);
    for (uint32_t i = 0; i < count; i++) {
        const struct row *row = row_of(index, index->found[i]);
        memcpy(parents + (size_t)i * KEY_BYTES, &row->parent, KEY_BYTES);
        lengths[i] = row->length;
    }
    pthread_mutex_unlock(&index->lock);
}

void polar_expire(polar_index *index, int64_t now_ns) {
    pthread_mutex_lock(&index->lock);
    expire(index, now_ns);
    pthread_mutex_unlock(&index->lock);
}

void polar_statistics(polar_index *index, polar_index_statistics *statistics) {
    pthread_mutex_lock(&index->lock);
    *statistics = index->counted;
    statistics->capacity_bytes = index->slab.capacity_bytes;
    statistics->used_bytes = index->slab.used_bytes;
    statistics->reservations = index->reservations.count;
    statistics->leases = index->leases.count;
    pthread_mutex_unlock(&index->lock);
}
