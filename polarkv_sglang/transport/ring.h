/* A ring of notices from a client to a memory node on its host, in memory that both have mapped.
 *
 * Telling costs the client no exchange, and the node nothing until somebody looks blocks up: then it hears what it has
 * been told before. Each counter has one writer; the node believes neither the counter nor the notices. */

#ifndef POLAR_RING_H
#define POLAR_RING_H

#include <stdbool.h>
#include <stdint.h>

enum notice_kind {
    BLOCK_READ,
    BLOCK_OFFERED, /* it was to be written, and is there already */
    BLOCK_WRITTEN, /* to a slot that the client had been granted */
};

/* A cache line. */
struct notice {
    uint64_t kind;
    uint64_t key[2], parent[2];
    uint64_t address; /* of the slot, in the node */
    uint64_t checksum;
    uint64_t unused;
};

enum { NOTICES = 1022 };

struct ring {
    uint64_t told; /* notices since the start: the client's */
    uint64_t unused[7];
    uint64_t heard; /* the node's */
    uint64_t unused_too[7];
    struct notice notices[NOTICES];
};

_Static_assert(sizeof(struct notice) == 64 && sizeof(struct ring) == 65536, "directory.py knows it");

static inline struct notice *notice_at(struct ring *ring, uint64_t number) {
    return &ring->notices[number % NOTICES];
}

static inline bool can_tell(struct ring *ring, uint64_t count) {
    uint64_t waiting = ring->told - __atomic_load_n(&ring->heard, __ATOMIC_ACQUIRE);
    return waiting <= NOTICES && count <= NOTICES - waiting;
}

#endif
