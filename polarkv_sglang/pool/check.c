/* Whether all that an index knows agrees. */

#include <stdlib.h>

#include "index.h"

static const char *check_row(const struct table *table, uint32_t number) {
    const struct row *row = &table->rows[number];
    bool here = row->state == RESERVED || row->state == COMMITTED || row->state == GRANTED || row->state == DROPPED;
    bool named = is_named(row);
    if (!named && row->state != DROPPED && (!is_none(row->key) || row->leases)) return "a row of no block is not blank";
    if (!here && (row->address || row->length || row->checksum || row->generation || !is_none(row->parent)))
        return "a row of a block that is not here tells of one";
    if (row->state == GRANTED && (row->checksum || !is_none(row->parent))) return "a granted slot tells of a block";
    if (here && !(row->address && row->generation)) return "a block has no slot or no generation";
    if ((row->state == COMMITTED || row->state == DROPPED) != (row->last_use > 0))
        return "a block that can be read was never used, or another was";
    if (named != (find_row(table, row->key) == number))
        return "a row is found by another key, or not by its own";
    if (row->state == ABSENT && !row->children) return "a block is absent that nobody continues";
    if (!named && row->children) return "a dropped block is continued";
    for (uint32_t other = 1; here && other < number; other++)
        if (table->rows[other].generation == row->generation) return "two blocks share a generation";
    return NULL;
}

static const char *check_rows(const struct table *table) {
    uint32_t unused = 0, listed = 0, found = 0;
    for (uint32_t number = 1; number < table->used; number++) {
        const char *wrong = check_row(table, number);
        if (wrong) return wrong;
        unused += table->rows[number].state == UNUSED;
        found += is_named(&table->rows[number]);
    }
    for (uint32_t row = table->unused; row; row = table->rows[row].next)
        if (table->rows[row].state != UNUSED || ++listed > unused) return "a row in use is listed as unused";
    if (listed != unused) return "an unused row is lost";
    return found == table->count ? NULL : "keys are miscounted";
}

/* `counts` is blank, and has room for a number per row. */
static const char *check_children(const struct table *table, uint32_t *counts) {
    for (uint32_t number = 1; number < table->used; number++) {
        const struct row *row = &table->rows[number];
        if ((row->state == RESERVED || row->state == COMMITTED) && !is_none(row->parent))
            counts[find_row(table, row->parent)]++;
    }
    for (uint32_t number = 0; number < table->used; number++)
        if (counts[number] != table->rows[number].children) return "children are miscounted";
    return NULL;
}

static const char *check_reservations(const polar_index *index, uint32_t *counts) {
    for (uint32_t place = 0; place < index->reservations.used; place++) {
        const struct holding *reservation = index->reservations.places[place];
        for (uint32_t i = 0; reservation && i < reservation->count; i++) counts[reservation->rows[i]]++;
    }
    for (uint32_t number = 0; number < index->table.used; number++)
        if (counts[number] != (index->table.rows[number].state == RESERVED)) return "a reservation is lost";
    return NULL;
}

static const char *check_leases(const polar_index *index, uint32_t *counts) {
    uint64_t leased_bytes = 0, quarantined = 0, blocks = 0, charged = 0, rows = 0;
    for (uint32_t place = 0; place < index->leases.used; place++) {
        const struct holding *lease = index->leases.places[place];
        for (uint32_t i = 0; lease && i < lease->count; i++) counts[lease->rows[i]]++;
        if (lease) rows += lease->count;
    }
    for (uint32_t number = 0; number < index->table.used; number++) {
        const struct row *row = &index->table.rows[number];
        if (counts[number] != row->leases) return "leases are miscounted";
        if (row->leases && row->state != COMMITTED && row->state != DROPPED) return "a leased block is lost";
        if (row->state == DROPPED && !row->leases) return "a dropped block keeps its slot";
        if (row->leases) leased_bytes += row->length;
        quarantined += row->state == DROPPED;
        blocks += row->state == COMMITTED;
    }
    for (uint32_t bucket = 0; bucket < OWNER_BUCKETS; bucket++)
        for (const struct owner *owner = index->owners[bucket]; owner; owner = owner->next) charged += owner->rows;
    if (charged < rows || (charged > 0) != (index->leases.count > 0)) return "an owner is charged wrongly";
    if (leased_bytes != index->counted.leased_bytes) return "the leased bytes are miscounted";
    if (quarantined != index->counted.quarantined_blocks) return "the dropped blocks are miscounted";
    return blocks == index->counted.blocks ? NULL : "the blocks are miscounted";
}

static const char *check(const polar_index *index, uint32_t *counts) {
    const char *wrong = check_rows(&index->table);
    if (!wrong) wrong = check_children(&index->table, counts);
    if (!wrong) wrong = check_reservations(index, counts + index->table.used);
    if (!wrong) wrong = check_leases(index, counts + 2 * (size_t)index->table.used);
    if (!wrong) wrong = check_neighbours(index, counts + 3 * (size_t)index->table.used);
    if (!wrong) wrong = check_eviction(&index->eviction, &index->table);
    if (!wrong) wrong = check_directory(index);
    return wrong ? wrong : check_slab(&index->slab, &index->table);
}

const char *polar_check(polar_index *index) {
    const char *wrong = "there is no memory for a check";
    uint32_t *counts;
    pthread_mutex_lock(&index->lock);
    counts = calloc(4 * (size_t)index->table.used, sizeof(*counts));
    if (counts) wrong = check(index, counts);
    free(counts);
    pthread_mutex_unlock(&index->lock);
    return wrong;
}
