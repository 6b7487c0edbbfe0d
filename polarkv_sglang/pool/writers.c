/* Reservations of writers. */

#include <string.h>

#include "index.h"

/* Undoes the reservation of a block. */
static void abort_row(polar_index *index, uint32_t row) {
    unlink_row(index, row);
    discard(index, row);
}

void abort_reservation(polar_index *index, struct holding *reservation) {
    for (uint32_t i = 0; i < reservation->count; i++) abort_row(index, reservation->rows[i]);
    end_holding(&index->reservations, reservation);
}

/* Makes rows of those keys that are neither here nor being written, and says of the others what they are. How
 * many. */
static uint32_t add_new(polar_index *index, const uint8_t *keys, const uint8_t *parents, uint32_t count,
                        uint32_t *rows, uint8_t *states) {
    uint32_t added = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = find_row(&index->table, key_at(keys, i));
        struct row *row = row_of(index, number);
        if (row->state == COMMITTED) {
            states[i] = POLAR_PRESENT;
        } else if (row->state == RESERVED) {
            states[i] = POLAR_BUSY;
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
    uint32_t added, got, at;
    memset(addresses, 0, count * sizeof(*addresses));
    if (!has_room(&index->slab, length)) expire(index, now_ns);
    /* Before any eviction, which relies on later uses having later ticks. */
    find(index, keys, count);
    use(index, count);
    reservation = table_has_room(&index->table, 2 * count) ? new_holding(&index->reservations, owner, count) : NULL;
    if (!reservation) {
        memset(states, POLAR_NO_ROOM, count);
        return 0;
    }
    added = at = add_new(index, keys, parents, count, reservation->rows, states);
    got = make_room(index, reservation->rows, added, length);
    if (got < added && fits(&index->slab, length)) index->crowded_until_ns = now_ns + index->settings.reservation_ns;
    for (uint32_t i = added; i-- > got;) abort_row(index, reservation->rows[i]);
    for (uint32_t i = count; i--;) {
        if (states[i] == POLAR_RESERVED && --at < got) addresses[i] = row_of(index, reservation->rows[at])->address;
        /* One that is busy may have been so with an earlier place in this very call. */
        if ((states[i] == POLAR_RESERVED && !addresses[i]) ||
            (states[i] == POLAR_BUSY && row_of(index, find_row(&index->table, key_at(keys, i)))->state != RESERVED))
            states[i] = POLAR_NO_ROOM;
    }
    if (!got) {
        end_holding(&index->reservations, reservation);
        return 0;
    }
    reservation->count = got;
    set_deadline(&index->reservations, reservation, now_ns + index->settings.reservation_ns);
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

uint64_t polar_reserve(polar_index *index, uint64_t owner, const uint8_t *keys, const uint8_t *parents,
                       uint32_t count, uint64_t length, int fill, int64_t now_ns, uint64_t *addresses,
                       uint8_t *states) {
    uint64_t number;
    enter(index);
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
        if (!mask[i]) {
            abort_row(index, reservation->rows[i]);
            continue;
        }
        make_visible(index, reservation->rows[i], checksums[i], index->tick - i);
        committed++;
    }
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
