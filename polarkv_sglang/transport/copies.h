/* Blocks on their way between local memory and what peers on this host share. */

#ifndef POLAR_COPIES_H
#define POLAR_COPIES_H

#include <pthread.h>
#include <stdbool.h>

#include "blocks.h"

/* Copied burst by burst, by whichever thread takes the next one. */
struct copies {
    polar_hash hash; /* NULL: no checksums */
    bool put;
    const uint64_t *local; /* [blocks][pieces] address */
    uint32_t pieces;
    uint64_t piece_bytes;
    uint64_t *digests; /* [blocks][chunks of a block] */
    uint64_t *shared;  /* [blocks] address in this process; of those that are listed */
    uint64_t *copied;  /* [blocks] bytes; of those that are listed */
    uint32_t *listed;  /* [count] numbers of the blocks that are to be copied */
    uint32_t count;
    uint64_t taken; /* bursts, of all listed blocks */
    int64_t deadline_ns;
    pthread_t helper;
    bool helped;
};

#pragma GCC visibility push(hidden)

bool copies_left(const struct copies *copies);
void copy_burst(struct copies *copies);   /* the next one, if there is any left */
void begin_copies(struct copies *copies); /* has a second thread take part where that is quicker */
void stop_copies(struct copies *copies);  /* no burst is begun any more */
void finish_copies(struct copies *copies); /* and none is under way, and all is where other threads see it */
struct block copied_block(const struct copies *copies, uint32_t number);

#pragma GCC visibility pop

#endif
