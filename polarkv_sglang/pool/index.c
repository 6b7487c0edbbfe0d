/* What a memory node holds: blocks by key, reservations of writers, leases of readers. index.py says what each
 * call promises. */

#include <stdlib.h>
#include <string.h>

#include "index.h"

int polar_abi(void) {
    return POLAR_ABI;
}

polar_index *polar_index_new(const polar_index_settings *settings) {
    polar_index *index = calloc(1, sizeof(*index));
    if (!index) return NULL;
    pthread_mutex_init(&index->lock, NULL);
    index->settings = *settings;
    index->generation = 1;
    index->reservations.earliest_ns = index->leases.earliest_ns = INT64_MAX;
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
    free_neighbours(index);
    holdings_close(&index->reservations);
    holdings_close(&index->leases);
    eviction_close(&index->eviction);
    table_close(&index->table);
    slab_close(&index->slab);
    pthread_mutex_destroy(&index->lock);
    free(index);
}

/* ---- Blocks and those that they continue. */

/* A block will continue `parent`. */
void join(polar_index *index, struct key parent) {
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

/* Lets everybody find a block that has its key, its slot and its bytes. */
void make_visible(polar_index *index, uint32_t row, uint64_t checksum, uint64_t last_use) {
    struct row *block = row_of(index, row);
    block->state = COMMITTED;
    block->checksum = checksum;
    block->last_use = last_use;
    publish(index, block);
    add_leaf(&index->eviction, index->table.rows, row);
    index->counted.blocks++;
    index->counted.commits++;
}

/* Lets nobody find a block any more. What continues it has a row of its own then that stands for it. */
void unlink_row(polar_index *index, uint32_t row) {
    struct row *block = row_of(index, row);
    if (block->state == COMMITTED) withdraw(index, block);
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

/* Gives the slot and the row of a block that nobody can find to others. */
void discard(polar_index *index, uint32_t row) {
    if (row_of(index, row)->address) free_slot(&index->slab, row_of(index, row)->address);
    free_row(&index->table, row);
}

static uint32_t committed_row(polar_index *index, struct key key) {
    uint32_t row = find_row(&index->table, key);
    return row_of(index, row)->state == COMMITTED ? row : 0;
}

/* Looks for the keys' blocks, which are the found ones until the next call; how many there are. */
uint32_t find(polar_index *index, const uint8_t *keys, uint32_t count) {
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
void use(polar_index *index, uint32_t count) {
    index->tick += count;
    for (uint32_t i = 0; i < count; i++)
        if (index->found[i]) row_of(index, index->found[i])->last_use = index->tick - i;
}

static void expire_leases(polar_index *index, int64_t now_ns) {
    struct holdings *leases = &index->leases;
    if (now_ns < leases->earliest_ns) return;
    leases->earliest_ns = INT64_MAX;
    for (uint32_t place = 0; place < leases->used; place++) {
        struct holding *lease = leases->places[place];
        if (!lease) continue;
        if (lease->deadline_ns > now_ns) {
            set_deadline(leases, lease, lease->deadline_ns);
        } else {
            index->counted.expired_leases++;
            end_lease(index, lease);
        }
    }
}

static void expire_reservations(polar_index *index, int64_t now_ns) {
    struct holdings *reservations = &index->reservations;
    if (now_ns < reservations->earliest_ns) return;
    reservations->earliest_ns = INT64_MAX;
    for (uint32_t place = 0; place < reservations->used; place++) {
        struct holding *reservation = reservations->places[place];
        if (!reservation || reservation->flag) continue;
        if (reservation->deadline_ns > now_ns) {
            set_deadline(reservations, reservation, reservation->deadline_ns);
        } else {
            index->counted.expired_reservations++;
            abort_reservation(index, reservation);
        }
    }
}

void expire(polar_index *index, int64_t now_ns) {
    expire_leases(index, now_ns);
    expire_reservations(index, now_ns);
    expire_granted(index, now_ns);
}

/* ---- Calls. */

void polar_report_corrupt(polar_index *index, const uint8_t *keys, const uint64_t *generations, uint32_t count) {
    enter(index);
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
    enter(index);
    find(index, keys, count);
    for (uint32_t i = 0; i < count; i++) present[i] = index->found[i] > 0;
    pthread_mutex_unlock(&index->lock);
}

void polar_describe(polar_index *index, const uint8_t *keys, uint32_t count, uint8_t *parents, uint64_t *lengths) {
    enter(index);
    find(index, keys, count);
    for (uint32_t i = 0; i < count; i++) {
        const struct row *row = row_of(index, index->found[i]);
        memcpy(parents + (size_t)i * KEY_BYTES, &row->parent, KEY_BYTES);
        lengths[i] = row->length;
    }
    pthread_mutex_unlock(&index->lock);
}

void polar_expire(polar_index *index, int64_t now_ns) {
    enter(index);
    expire(index, now_ns);
    pthread_mutex_unlock(&index->lock);
}

void polar_statistics(polar_index *index, polar_index_statistics *statistics) {
    enter(index);
    *statistics = index->counted;
    statistics->capacity_bytes = index->slab.capacity_bytes;
    statistics->used_bytes = index->slab.used_bytes - index->granted_bytes;
    statistics->granted_bytes = index->granted_bytes;
    statistics->reservations = index->reservations.count;
    statistics->leases = index->leases.count;
    pthread_mutex_unlock(&index->lock);
}
