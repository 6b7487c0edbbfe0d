/* Clients on this host, which need not ask: they are granted slots ahead, and tell in a ring of what they have written
 * there, and of what they have read. It is heard before anything is looked up, so a block can be found from when its
 * writer has told of it. */

#include <stdlib.h>

#include "../transport/ring.h"
#include "index.h"

struct neighbour {
    uint64_t owner;
    struct ring *ring; /* NULL: it is gone, or has told nonsense: it is not listened to any more */
    uint64_t heard;
    int64_t deadline_ns; /* of what it was granted */
    uint32_t count;      /* slots */
    uint64_t addresses[POLAR_MOST_GRANTED];
    uint32_t rows[POLAR_MOST_GRANTED];
    struct neighbour *next;
};

static struct neighbour *neighbour_of(const polar_index *index, uint64_t owner) {
    struct neighbour *neighbour = index->neighbours;
    while (neighbour && neighbour->owner != owner) neighbour = neighbour->next;
    return neighbour;
}

static void forget_granted(polar_index *index, struct neighbour *neighbour) {
    while (neighbour->count) {
        uint32_t row = neighbour->rows[--neighbour->count];
        index->granted_bytes -= slot_bytes_of(row_of(index, row)->length);
        discard(index, row);
    }
}

/* The row of a granted slot, which is not one any more; 0: it is none. */
static uint32_t take_granted(polar_index *index, struct neighbour *neighbour, uint64_t address) {
    for (uint32_t i = neighbour->count; i--;) {
        uint32_t row = neighbour->rows[i];
        if (neighbour->addresses[i] != address) continue;
        neighbour->rows[i] = neighbour->rows[--neighbour->count];
        neighbour->addresses[i] = neighbour->addresses[neighbour->count];
        index->granted_bytes -= slot_bytes_of(row_of(index, row)->length);
        return row;
    }
    return 0;
}

/* Lets a block be found under a key that has none; whether it could be. */
static bool name_row(polar_index *index, uint32_t row, struct key key) {
    uint32_t absent;
    if (!table_has_room(&index->table, 2)) return false;
    absent = find_row(&index->table, key);
    if (absent && row_of(index, absent)->state != ABSENT) return false;
    row_of(index, row)->key = key;
    if (absent) {
        row_of(index, row)->children = row_of(index, absent)->children;
        put_in_place(&index->table, row, absent);
        free_row(&index->table, absent);
    } else {
        put_in(&index->table, row);
    }
    return true;
}

static void hear_of_write(polar_index *index, struct neighbour *neighbour, const struct notice *notice) {
    uint32_t row = take_granted(index, neighbour, notice->address);
    if (!row) {
        index->counted.late_commits++;
        return;
    }
    if (!name_row(index, row, (struct key){{notice->key[0], notice->key[1]}})) {
        discard(index, row);
        return;
    }
    row_of(index, row)->parent = (struct key){{notice->parent[0], notice->parent[1]}};
    join(index, row_of(index, row)->parent);
    make_visible(index, row, notice->checksum, ++index->tick);
}

static void hear_of_use(polar_index *index, const struct notice *notice) {
    struct row *row = row_of(index, find_row(&index->table, (struct key){{notice->key[0], notice->key[1]}}));
    index->counted.hits += notice->kind == BLOCK_READ;
    if (row->state == COMMITTED) row->last_use = ++index->tick;
}

static void hear(polar_index *index, struct neighbour *neighbour) {
    struct ring *ring = neighbour->ring;
    uint64_t told = ring ? __atomic_load_n(&ring->told, __ATOMIC_ACQUIRE) : neighbour->heard;
    if (told == neighbour->heard) return;
    if (told - neighbour->heard > NOTICES) {
        neighbour->ring = NULL;
        return;
    }
    for (; neighbour->heard != told; neighbour->heard++) {
        struct notice notice = *notice_at(ring, neighbour->heard); /* once: the client may change it meanwhile */
        if (notice.kind == BLOCK_WRITTEN)
            hear_of_write(index, neighbour, &notice);
        else
            hear_of_use(index, &notice);
    }
    __atomic_store_n(&ring->heard, told, __ATOMIC_RELEASE);
}

void enter(polar_index *index) {
    pthread_mutex_lock(&index->lock);
    for (struct neighbour *neighbour = index->neighbours; neighbour; neighbour = neighbour->next) hear(index, neighbour);
}

void expire_granted(polar_index *index, int64_t now_ns) {
    struct neighbour **place = &index->neighbours;
    while (*place) {
        struct neighbour *neighbour = *place;
        if (neighbour->deadline_ns <= now_ns) forget_granted(index, neighbour);
        if (neighbour->ring || neighbour->count) {
            place = &neighbour->next;
            continue;
        }
        *place = neighbour->next;
        free(neighbour);
    }
}

void free_neighbours(polar_index *index) {
    while (index->neighbours) {
        struct neighbour *neighbour = index->neighbours;
        index->neighbours = neighbour->next;
        free(neighbour);
    }
}

const char *check_neighbours(const polar_index *index, uint32_t *counts) {
    uint64_t granted_bytes = 0;
    for (const struct neighbour *neighbour = index->neighbours; neighbour; neighbour = neighbour->next)
        for (uint32_t i = 0; i < neighbour->count; i++) {
            counts[neighbour->rows[i]]++;
            granted_bytes += slot_bytes_of(index->table.rows[neighbour->rows[i]].length);
        }
    for (uint32_t number = 0; number < index->table.used; number++)
        if (counts[number] != (index->table.rows[number].state == GRANTED)) return "a granted slot is lost";
    return granted_bytes == index->granted_bytes ? NULL : "the granted bytes are miscounted";
}

int polar_open_ring(polar_index *index, uint64_t owner, uint64_t ring) {
    struct neighbour *neighbour = calloc(1, sizeof(*neighbour));
    if (!neighbour) return 0;
    neighbour->owner = owner;
    neighbour->ring = (struct ring *)(uintptr_t)ring;
    pthread_mutex_lock(&index->lock);
    neighbour->next = index->neighbours;
    index->neighbours = neighbour;
    pthread_mutex_unlock(&index->lock);
    return 1;
}

/* What is granted to a client that has gone is so until its time is over: it may be writing still. */
void polar_close_ring(polar_index *index, uint64_t owner) {
    struct neighbour *neighbour;
    enter(index);
    neighbour = neighbour_of(index, owner);
    if (neighbour) neighbour->ring = NULL;
    pthread_mutex_unlock(&index->lock);
}

/* Gives a client so many slots, all or none: what is left is for those who ask for less. */
static bool grant(polar_index *index, struct neighbour *neighbour, uint64_t length, uint32_t count) {
    uint32_t got;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t row = neighbour->rows[i] = new_row(&index->table);
        row_of(index, row)->state = GRANTED;
        row_of(index, row)->generation = index->generation++;
    }
    got = make_room(index, neighbour->rows, count, length);
    for (uint32_t i = 0; i < count; i++) neighbour->addresses[i] = row_of(index, neighbour->rows[i])->address;
    for (uint32_t i = 0; i < count && got < count; i++) discard(index, neighbour->rows[i]);
    if (got < count) return false;
    neighbour->count = count;
    index->granted_bytes += count * slot_bytes_of(length);
    return true;
}

/* Whether so many slots may be ahead of their use. They stay where they are, so they are few, and none for a while
 * after somebody found no room: a segment with one of them cannot be emptied for blocks of another length. */
static bool may_grant(const polar_index *index, uint64_t length, uint32_t count, int64_t now_ns) {
    uint64_t bytes = count * slot_bytes_of(length);
    return fits(&index->slab, length) && now_ns >= index->crowded_until_ns && bytes <= index->settings.most_granted_bytes &&
           index->granted_bytes + bytes <= index->settings.most_granted_in_all_bytes;
}

uint32_t polar_grant(polar_index *index, uint64_t owner, uint64_t length, uint32_t count, int64_t now_ns,
                     uint64_t *addresses) {
    struct neighbour *neighbour;
    uint32_t granted = 0;
    enter(index);
    neighbour = neighbour_of(index, owner);
    if (neighbour && neighbour->ring && count <= POLAR_MOST_GRANTED) {
        forget_granted(index, neighbour);
        if (!has_room(&index->slab, length)) expire(index, now_ns);
        neighbour->deadline_ns = now_ns + index->settings.reservation_ns;
        if (may_grant(index, length, count, now_ns) && grant(index, neighbour, length, count)) granted = count;
        for (uint32_t i = 0; i < granted; i++) addresses[i] = neighbour->addresses[i];
    }
    pthread_mutex_unlock(&index->lock);
    return granted;
}
