/* A memory node's index from inside: rows of blocks, found by key, in slots of a slab. Everything here is called
 * under the index's lock. */

#ifndef POLAR_INDEX_H
#define POLAR_INDEX_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "abi.h"

#pragma GCC visibility push(hidden)

enum { KEY_BYTES = 16, SLOT_BYTES = 4096 /* slots start at and are multiples of this */ };

struct key {
    uint64_t words[2];
};

/* ---- Rows: what is known of each block. */

enum state {
    UNUSED,
    ABSENT,    /* the block is not here, but others that continue it are */
    RESERVED,  /* it is being written */
    COMMITTED, /* it can be found */
    GRANTED,   /* it has a slot, for a block of which nothing is known yet */
    DROPPED,   /* nobody can find it any more, but somebody reads it */
};

struct row {
    struct key key, parent;
    uint64_t address, length, checksum;
    uint64_t generation; /* never given twice by one node: equal means that nobody wrote there in between */
    uint64_t last_use;   /* a tick; no two rows have the same */
    uint32_t leases;
    uint32_t children; /* blocks that continue this one */
    uint32_t next;     /* unused row */
    uint8_t state;
    uint8_t queued; /* is eviction.c's */
};

/* Rows by key: open addressing with linear probing. Row 0 is no block. */
struct table {
    struct row *rows;
    uint32_t capacity; /* rows */
    uint32_t used;     /* from here on no row was ever used */
    uint32_t unused;   /* a list */
    uint32_t *places;  /* row numbers */
    uint32_t mask;     /* number of places, less one */
    uint32_t count;    /* places in use */
    uint64_t seed[2];  /* clients choose keys, and shall not choose which collide */
};

bool table_open(struct table *table, uint64_t blocks);
void table_close(struct table *table);
bool table_has_room(struct table *table, uint32_t more); /* makes it, if it can; then `add_row` does not fail */
uint32_t find_row(const struct table *table, struct key key);
void find_rows(const struct table *table, const uint8_t *keys, uint32_t count, uint32_t *rows);
uint32_t add_row(struct table *table, struct key key, enum state state);
void put_in(struct table *table, uint32_t row); /* to be found by its key */
void put_in_place(struct table *table, uint32_t row, uint32_t of); /* `of` is not found any more */
void take_out(struct table *table, uint32_t row);                  /* nor is `row` */
uint32_t new_row(struct table *table);
void free_row(struct table *table, uint32_t row);
bool is_named(const struct row *row); /* it is found by its key */
struct key key_at(const uint8_t *keys, uint32_t number);
bool is_none(struct key key);

/* ---- Slab: slots of the sizes that are asked for. */

struct segment {
    uint64_t slot_bytes; /* 0: unassigned */
    uint32_t in_use;     /* slots */
    uint32_t used;       /* from here on no slot was used since it was assigned */
    uint32_t free;       /* a list */
    uint32_t *links;     /* of the slots below `used`: the row of the block there, or the next free slot */
    struct segment *before, *next;
    bool listed;
};

struct size_class {
    uint64_t slot_bytes;
    struct segment *partial; /* segments with slots in use and free ones */
};

struct slab {
    uint64_t base, capacity_bytes, segment_bytes, used_bytes;
    struct segment *segments;
    uint32_t segment_count;
    struct segment *unassigned;
    uint32_t hand; /* which segment is looked at next to be emptied */
    struct size_class *classes; /* those with partial segments; room for one per segment */
    uint32_t class_count;
};

bool slab_open(struct slab *slab, uint64_t base, uint64_t capacity_bytes, uint64_t segment_bytes);
void slab_close(struct slab *slab);
uint64_t slot_bytes_of(uint64_t length);
bool fits(const struct slab *slab, uint64_t length);
bool has_room(const struct slab *slab, uint64_t length);
uint64_t allocate_slot(struct slab *slab, uint64_t length, uint32_t row); /* its address; 0: there was no room */
void free_slot(struct slab *slab, uint64_t address);
/* The block that a slot below `used` has; 0: none. */
uint32_t row_in(const struct slab *slab, const struct table *table, const struct segment *segment, uint32_t slot);
const char *check_slab(const struct slab *slab, const struct table *table);

/* ---- Eviction: which leaf goes next. A leaf is a committed block that no other continues and nobody reads. */

struct leaf {
    uint64_t last_use;
    uint32_t row;
};

struct eviction {
    struct leaf *heap; /* oldest first: every leaf that was last used by `horizon` */
    uint32_t count, capacity;
    uint64_t horizon;
    uint32_t batch;
};

bool eviction_open(struct eviction *eviction, uint32_t batch);
void eviction_close(struct eviction *eviction);
void add_leaf(struct eviction *eviction, struct row *rows, uint32_t row);
uint32_t next_leaf(struct eviction *eviction, struct table *table, uint64_t tick); /* it is to go; 0: there is none */
uint64_t leaf_last_use(const struct row *row);                                     /* 0: it is no leaf */
const char *check_eviction(const struct eviction *eviction, const struct table *table);

/* ---- Holdings: reservations and leases, by numbers that are never given twice. */

struct holding {
    uint64_t number, owner;
    int64_t deadline_ns;
    bool flag; /* of a reservation: it is being filled; of a lease: nobody reads under it yet */
    uint32_t count;
    uint32_t rows[];
};

struct holdings {
    struct holding **places;
    uint32_t capacity, used, free_count;
    uint32_t *free;
    uint64_t serial;
    uint32_t count;
    int64_t earliest_ns; /* before it none is over */
};

void holdings_close(struct holdings *holdings);
struct holding *new_holding(struct holdings *holdings, uint64_t owner, uint32_t count); /* NULL: no memory */
struct holding *find_holding(const struct holdings *holdings, uint64_t owner, uint64_t number);
void set_deadline(struct holdings *holdings, struct holding *holding, int64_t deadline_ns);
void end_holding(struct holdings *holdings, struct holding *holding);

struct owner {
    uint64_t owner, rows;
    struct owner *next;
};

enum { OWNER_BUCKETS = 4096 };

/* ---- Neighbours: clients on this host, which have slots ahead and tell what they do. */

void enter(polar_index *index); /* takes the lock, and hears what neighbours have told */
void expire_granted(polar_index *index, int64_t now_ns);
void free_neighbours(polar_index *index);
const char *check_neighbours(const polar_index *index, uint32_t *counts);

/* ---- Directory: what readers on this host find by themselves. */

void publish(polar_index *index, const struct row *row);  /* it is committed */
void withdraw(polar_index *index, const struct row *row); /* it will not be any more */
const char *check_directory(const polar_index *index);

/* ---- */

struct polar_index {
    pthread_mutex_t lock;
    polar_index_settings settings;
    struct table table;
    struct slab slab;
    struct eviction eviction;
    struct holdings reservations, leases;
    struct owner *owners[OWNER_BUCKETS]; /* those that have leases */
    struct neighbour *neighbours;
    uint64_t granted_bytes;  /* in slots that neighbours have ahead */
    int64_t crowded_until_ns; /* somebody found no room before */
    uint64_t tick, generation;
    uint32_t found[POLAR_MAX_KEYS]; /* rows of a call's keys, where those can be found by readers; else 0 */
    polar_index_statistics counted;
};

static inline struct row *row_of(polar_index *index, uint32_t row) {
    return &index->table.rows[row];
}

/* Looks for the keys' blocks, which are the found ones until the next call; how many there are. */
uint32_t find(polar_index *index, const uint8_t *keys, uint32_t count);
void use(polar_index *index, uint32_t count);           /* of the found blocks heads later than their tails */
void join(polar_index *index, struct key parent);       /* a block will continue `parent` */
void make_visible(polar_index *index, uint32_t row, uint64_t checksum, uint64_t last_use);
void unlink_row(polar_index *index, uint32_t row);      /* nobody can find the block any more */
void discard(polar_index *index, uint32_t row);         /* others get the slot and the row, which has no key any more */
/* Gives blocks slots, in order, and evicts others for them; how many there was room for. */
uint32_t make_room(polar_index *index, const uint32_t *rows, uint32_t count, uint64_t length);
void expire(polar_index *index, int64_t now_ns);        /* ends the holdings whose time is over */
void end_lease(polar_index *index, struct holding *lease);
void end_pull(polar_index *index, uint64_t owner, uint64_t lease, uint64_t blocks, uint64_t sent_bytes);
void abort_reservation(polar_index *index, struct holding *reservation);

#pragma GCC visibility pop

#endif
