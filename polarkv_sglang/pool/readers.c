/* Leases of readers: what has one stays where it is. */

#include <stdlib.h>

#include "index.h"

enum { LEASE_ROWS = 32 }; /* a lease itself takes about as much memory as so many rows */

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

void end_lease(polar_index *index, struct holding *lease) {
    for (uint32_t i = 0; i < lease->count; i++) {
        struct row *row = row_of(index, lease->rows[i]);
        if (--row->leases) continue;
        index->counted.leased_bytes -= row->length;
        add_leaf(&index->eviction, index->table.rows, lease->rows[i]);
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
    for (uint32_t i = 0; i < count; i++)
        if (row_of(index, index->found[i])->leases > UINT32_MAX - POLAR_MAX_KEYS) return NULL;
    if (!present || !charge(index, owner, LEASE_ROWS + present)) return NULL;
    lease = new_holding(&index->leases, owner, present);
    if (!lease) {
        refund(index, owner, LEASE_ROWS + present);
        return NULL;
    }
    set_deadline(&index->leases, lease, deadline_ns);
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

uint64_t polar_locate(polar_index *index, uint64_t owner, const uint8_t *keys, uint32_t count, int64_t lease_ns,
                      int counted, int64_t now_ns, const polar_places *places) {
    struct holding *lease;
    uint64_t number = 0;
    uint32_t present;
    enter(index);
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

/* Blocks were read by who did not ask. */
void polar_use(polar_index *index, const uint8_t *keys, uint32_t count) {
    enter(index);
    find(index, keys, count);
    use(index, count);
    index->counted.hits += count;
    pthread_mutex_unlock(&index->lock);
}

uint64_t polar_hold(polar_index *index, uint64_t owner, const uint8_t *keys, uint32_t count, int64_t lease_ns,
                    int64_t now_ns, uint8_t *present) {
    struct holding *lease;
    uint64_t number = 0;
    enter(index);
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
    if (lasts) set_deadline(&index->leases, lease, lease_deadline(index, lease_ns, now_ns));
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

/* Ends the lease of blocks that were sent; with `sent_bytes` of 0 nothing was. */
void end_pull(polar_index *index, uint64_t owner, uint64_t lease, uint64_t blocks, uint64_t sent_bytes) {
    struct holding *holding;
    pthread_mutex_lock(&index->lock);
    holding = find_holding(&index->leases, owner, lease);
    if (holding) end_lease(index, holding);
    index->counted.sent_blocks += blocks;
    index->counted.sent_bytes += sent_bytes;
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
