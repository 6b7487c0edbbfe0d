/* One batch while it is carried out: what plan.c makes and batch.c runs. */

#ifndef POLAR_TRANSFER_H
#define POLAR_TRANSFER_H

#include "copies.h"

enum {
    UCS_OK = 0,
    UCS_INPROGRESS = 1,
};

/* One batch's operations on one route. Each lane has its own window: an endpoint that hangs holds up only
 * itself. The lanes of mapped routes have no endpoint and stay empty. */
struct lane {
    const struct transfer *transfer;
    polar_endpoint *endpoint;
    ucp_rkey_h key;
    uint32_t first_block;      /* block_count: none */
    struct operation *last;    /* while the batch is planned */
    struct operation *next;    /* first one that was not issued yet */
    uint32_t in_flight;        /* requests that UCX holds, the flush included */
    bool needs_flush;          /* puts are done only when the peer has them */
    ucs_status_t flush_status; /* UCS_INPROGRESS: not flushed */
};

/* One request to UCX: `length` bytes that are contiguous in the peer, from byte `start` of `block` on into
 * the blocks that follow it on its lane. Outlives the request. */
struct operation {
    struct lane *lane;
    struct operation *next; /* on the lane */
    ucp_dt_iov_t *entries;  /* where the bytes lie here */
    uint32_t entry_count;
    uint32_t memory; /* of the last entry */
    uint32_t block;
    ucs_status_t status;
    uint64_t start;
    uint64_t length;
    uint64_t remote;
};

struct transfer {
    const polar_worker *worker;
    const polar_batch *batch;
    bool abandoned; /* the caller is gone: only what is allocated here may be touched */
    uint64_t block_bytes;
    struct lane *lanes; /* [route_count] */
    struct operation *operations;
    size_t operation_count;
    ucp_dt_iov_t *entries;
    size_t entry_count;
    uint32_t *next_block; /* [block_count] the next one on its lane; block_count: none */
    uint64_t *seen;       /* [block_count] so many bytes are digested, from its start on, or copied */
    uint64_t *digests;    /* [block_count][chunks of a block] */
    struct copies copies; /* of the blocks on mapped routes */
};

#pragma GCC visibility push(hidden)

/* POLAR_DONE and a plan of which nothing is issued, or why there is none. */
int plan(const polar_worker *worker, const polar_batch *batch, struct transfer **planned,
         polar_outcome *outcome);
void discard(struct transfer *transfer);

#pragma GCC visibility pop

static inline struct block block_at(const struct transfer *transfer, uint32_t index) {
    return copied_block(&transfer->copies, index);
}

#endif
