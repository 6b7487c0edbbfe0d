/* A block as it lies in local memory: its checksum, and copies to and from memory that a peer shares. */

#ifndef POLAR_BLOCKS_H
#define POLAR_BLOCKS_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "abi.h"

struct block {
    polar_hash hash;
    const uint64_t *pieces; /* their addresses, in the block's order */
    uint64_t piece_bytes;
    uint64_t length;   /* bytes of all pieces */
    uint64_t *digests; /* one per chunk, filled in by the functions below */
};

static inline int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

#pragma GCC visibility push(hidden)

uint64_t chunk_count(uint64_t length);
uint64_t whole_chunks(const struct block *block, uint64_t reached);
uint64_t checksum_of(const struct block *block);

/* All of these work on the chunks in [from, to): `from` is where a chunk begins, `to` where one ends. */
void digest(const struct block *block, uint64_t from, uint64_t to);
void read_shared(const struct block *block, const uint8_t *shared, uint64_t from, uint64_t to);
void write_shared(const struct block *block, uint8_t *shared, uint64_t from, uint64_t to);

/* After a thread's last copy: no later store of it, and so no later message, overtakes what was copied. */
void drain_stores(void);

#pragma GCC visibility pop

#endif
