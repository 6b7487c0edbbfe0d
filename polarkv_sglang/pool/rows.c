/* Rows of blocks, found by key. */

#define _GNU_SOURCE /* MAP_ANONYMOUS */

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "index.h"

enum { FIRST_PLACES = 1024 };

struct key key_at(const uint8_t *keys, uint32_t number) {
    struct key key;
    memcpy(&key, keys + (size_t)number * KEY_BYTES, KEY_BYTES);
    return key;
}

bool is_none(struct key key) {
    return !(key.words[0] | key.words[1]);
}

static bool is_same(struct key a, struct key b) {
    return a.words[0] == b.words[0] && a.words[1] == b.words[1];
}

bool table_open(struct table *table, uint64_t blocks) {
    /* Each absent block is continued by one that is here, or is being reserved. */
    uint64_t rows = 1 + 2 * (blocks + POLAR_MAX_KEYS);
    void *memory;
    if (rows > UINT32_MAX) return false;
    /* Taken as far as rows are used: memory that grows by being moved would take twice as much meanwhile. */
    memory = mmap(NULL, rows * sizeof(struct row), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    table->rows = memory;
    table->capacity = (uint32_t)rows;
    table->used = 1;
    table->places = calloc(FIRST_PLACES, sizeof(*table->places));
    table->mask = FIRST_PLACES - 1;
    return table->places && getrandom(table->seed, sizeof(table->seed), 0) == sizeof(table->seed);
}

void table_close(struct table *table) {
    if (table->rows) munmap(table->rows, table->capacity * sizeof(struct row));
    free(table->places);
}

static uint32_t place_of(const struct table *table, struct key key) {
    unsigned __int128 product =
        (unsigned __int128)(key.words[0] ^ table->seed[0]) * ((key.words[1] ^ table->seed[1]) | 1);
    return (uint32_t)((uint64_t)product ^ (uint64_t)(product >> 64)) & table->mask;
}

/* The place of the key's row, or the empty one where it would be. */
static uint32_t look_for(const struct table *table, struct key key) {
    uint32_t place = place_of(table, key);
    while (table->places[place] && !is_same(table->rows[table->places[place]].key, key))
        place = (place + 1) & table->mask;
    return place;
}

bool is_named(const struct row *row) {
    return row->state == ABSENT || row->state == RESERVED || row->state == COMMITTED;
}

bool table_has_room(struct table *table, uint32_t more) {
    uint64_t places = (uint64_t)table->mask + 1, wanted = places;
    uint32_t *old = table->places, *bigger;
    while (wanted / 4 * 3 < (uint64_t)table->count + more) wanted *= 2;
    if (wanted == places) return true;
    if (wanted - 1 > UINT32_MAX || !(bigger = calloc(wanted, sizeof(*bigger)))) return false;
    table->places = bigger;
    table->mask = (uint32_t)(wanted - 1);
    for (uint32_t row = 1; row < table->used; row++)
        if (is_named(&table->rows[row]))
            bigger[look_for(table, table->rows[row].key)] = row;
    free(old);
    return true;
}

uint32_t find_row(const struct table *table, struct key key) {
    return table->places[look_for(table, key)];
}

void find_rows(const struct table *table, const uint8_t *keys, uint32_t count, uint32_t *rows) {
    /* What is not in a cache is waited for once and not key by key. */
    for (uint32_t i = 0; i < count; i++) {
        rows[i] = place_of(table, key_at(keys, i));
        __builtin_prefetch(&table->places[rows[i]]);
    }
    for (uint32_t i = 0; i < count; i++) __builtin_prefetch(&table->rows[table->places[rows[i]]], 1);
    for (uint32_t i = 0; i < count; i++) rows[i] = find_row(table, key_at(keys, i));
}

uint32_t new_row(struct table *table) {
    uint32_t row = table->unused;
    if (row)
        table->unused = table->rows[row].next;
    else
        row = table->used++; /* there are as many as can be needed */
    return row;
}

void free_row(struct table *table, uint32_t row) {
    uint8_t queued = table->rows[row].queued;
    table->rows[row] = (struct row){.next = table->unused, .queued = queued};
    table->unused = row;
}

uint32_t add_row(struct table *table, struct key key, enum state state) {
    uint32_t row = new_row(table);
    table->rows[row].key = key;
    table->rows[row].state = state;
    put_in(table, row);
    return row;
}

void put_in(struct table *table, uint32_t row) {
    table->places[look_for(table, table->rows[row].key)] = row;
    table->count++;
}

void put_in_place(struct table *table, uint32_t row, uint32_t of) {
    table->places[look_for(table, table->rows[of].key)] = row;
}

void take_out(struct table *table, uint32_t row) {
    uint32_t hole = look_for(table, table->rows[row].key), place = hole;
    table->count--;
    /* What follows moves up, unless it would come before the place where it is looked for first. */
    for (;;) {
        uint32_t first;
        table->places[hole] = 0;
        do {
            place = (place + 1) & table->mask;
            if (!table->places[place]) return;
            first = place_of(table, table->rows[table->places[place]].key);
        } while (((place - first) & table->mask) < ((place - hole) & table->mask));
        table->places[hole] = table->places[place];
        hole = place;
    }
}
