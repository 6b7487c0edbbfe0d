/* A batch before it starts: checked whole, then cut into operations of UCX.
 *
 * An operation costs UCX microseconds however small it is, and over tcp an exchange of messages. So what goes
 * on in the peer's memory is moved together: as one range where it goes on here too, else, if it is small, as
 * entries of one operation (IOV). */

#include <stdlib.h>

#include "transfer.h"

/* The memory that holds the range, looked for from `*memory` on: pieces tend to go round the memories. */
static bool find_memory(const polar_batch *batch, uint64_t address, uint64_t length, uint32_t *memory) {
    for (uint32_t tried = 0; tried < batch->memory_count; tried++) {
        const polar_memory *candidate = batch->memories[*memory];
        uint64_t offset = address - candidate->address; /* wraps below it, and is far too large then */
        if (offset <= candidate->length && length <= candidate->length - offset) return true;
        *memory = (*memory + 1) % batch->memory_count;
    }
    return false;
}

static int check(const polar_batch *batch, polar_outcome *outcome) {
    uint64_t block_bytes = batch->pieces * batch->piece_bytes;
    uint32_t memory = 0;
    for (uint32_t i = 0; i < batch->block_count; i++) {
        const uint64_t *pieces = &batch->local[(size_t)i * batch->pieces];
        const polar_route *route;
        outcome->block = i;
        if (batch->route[i] >= batch->route_count) return POLAR_BAD_ROUTE;
        route = &batch->routes[batch->route[i]];
        if (!route->endpoint) {
            uint64_t offset = batch->remote[i] - route->remote;
            if (offset > route->length || block_bytes > route->length - offset) return POLAR_BAD_REMOTE;
        }
        for (uint32_t piece = 0; piece < batch->pieces; piece++) {
            outcome->piece = piece;
            if (!find_memory(batch, pieces[piece], batch->piece_bytes, &memory)) return POLAR_BAD_LOCAL;
        }
    }
    return POLAR_DONE;
}

void discard(struct transfer *transfer) {
    if (!transfer) return;
    free(transfer->lanes);
    free(transfer->operations);
    free(transfer->entries);
    free(transfer->next_block);
    free(transfer->seen);
    free(transfer->digests);
    free(transfer->copies.shared);
    free(transfer->copies.listed);
    free(transfer);
}

/* Room for the batch if nothing can be merged. */
static struct transfer *allocate(const polar_worker *worker, const polar_batch *batch) {
    uint64_t per_piece = (batch->piece_bytes + batch->operation_bytes - 1) / batch->operation_bytes;
    uint64_t block_bytes = batch->pieces * batch->piece_bytes;
    size_t ranges = (size_t)batch->block_count * batch->pieces * per_piece;
    size_t chunks = batch->block_count * chunk_count(block_bytes);
    struct transfer *transfer = calloc(1, sizeof(*transfer));
    if (!transfer) return NULL;
    transfer->worker = worker;
    transfer->batch = batch;
    transfer->block_bytes = block_bytes;
    transfer->lanes = calloc(batch->route_count + 1, sizeof(*transfer->lanes));
    transfer->operations = malloc((ranges + 1) * sizeof(*transfer->operations));
    transfer->entries = malloc((ranges + 1) * sizeof(*transfer->entries));
    transfer->next_block = malloc((batch->block_count + 1) * sizeof(*transfer->next_block));
    transfer->seen = calloc(batch->block_count + 1, sizeof(*transfer->seen));
    transfer->digests = malloc((chunks + 1) * sizeof(*transfer->digests));
    transfer->copies = (struct copies){
        .hash = batch->hash,
        .put = batch->put,
        .local = batch->local,
        .pieces = batch->pieces,
        .piece_bytes = batch->piece_bytes,
        .digests = transfer->digests,
        .shared = malloc((batch->block_count + 1) * sizeof(*transfer->copies.shared)),
        .copied = transfer->seen,
        .listed = malloc((batch->block_count + 1) * sizeof(*transfer->copies.listed)),
    };
    if (transfer->lanes && transfer->operations && transfer->entries && transfer->next_block &&
        transfer->seen && transfer->digests && transfer->copies.shared && transfer->copies.listed)
        return transfer;
    discard(transfer);
    return NULL;
}

/* Whether the range could be made part of the lane's last operation. */
static bool merge(struct transfer *transfer, struct operation *op, uint64_t remote, uint64_t local,
                  uint64_t length, uint32_t memory) {
    const polar_batch *batch = transfer->batch;
    ucp_dt_iov_t *entry;
    if (!op || op->remote + op->length != remote) return false;
    if (op->length + length > batch->operation_bytes) return false;
    entry = &op->entries[op->entry_count - 1];
    if ((uintptr_t)entry->buffer + entry->length == local && op->memory == memory) {
        entry->length += length;
    } else {
        if (op->entry_count == batch->entries || length > batch->entry_bytes) return false;
        entry[1] = (ucp_dt_iov_t){(void *)(uintptr_t)local, length};
        op->entry_count++;
        op->memory = memory;
        transfer->entry_count++;
    }
    op->length += length;
    return true;
}

static void append(struct transfer *transfer, struct lane *lane, uint32_t block, uint64_t start,
                   uint64_t local, uint64_t length, uint32_t memory) {
    uint64_t remote = transfer->batch->remote[block] + start;
    struct operation *op;
    if (merge(transfer, lane->last, remote, local, length, memory)) return;
    op = &transfer->operations[transfer->operation_count++];
    *op = (struct operation){
        .lane = lane,
        .entries = &transfer->entries[transfer->entry_count++],
        .entry_count = 1,
        .memory = memory,
        .block = block,
        .status = UCS_INPROGRESS,
        .start = start,
        .length = length,
        .remote = remote,
    };
    op->entries[0] = (ucp_dt_iov_t){(void *)(uintptr_t)local, length};
    if (lane->last)
        lane->last->next = op;
    else
        lane->next = op;
    lane->last = op;
}

static void append_block(struct transfer *transfer, struct lane *lane, uint32_t block, uint32_t *memory) {
    const polar_batch *batch = transfer->batch;
    const uint64_t *pieces = &batch->local[(size_t)block * batch->pieces];
    for (uint32_t piece = 0; piece < batch->pieces; piece++) {
        find_memory(batch, pieces[piece], batch->piece_bytes, memory);
        for (uint64_t at = 0; at < batch->piece_bytes; at += batch->operation_bytes) {
            uint64_t left = batch->piece_bytes - at;
            append(transfer, lane, block, piece * batch->piece_bytes + at, pieces[piece] + at,
                   left < batch->operation_bytes ? left : batch->operation_bytes, *memory);
        }
    }
}

int plan(const polar_worker *worker, const polar_batch *batch, struct transfer **planned,
         polar_outcome *outcome) {
    struct transfer *transfer;
    uint32_t memory = 0;
    int result = check(batch, outcome);
    if (result != POLAR_DONE) return result;
    *planned = transfer = allocate(worker, batch);
    if (!transfer) return POLAR_NO_MEMORY;

    for (uint32_t i = 0; i < batch->route_count; i++) {
        transfer->lanes[i] = (struct lane){
            .transfer = transfer,
            .endpoint = batch->routes[i].endpoint,
            .key = batch->routes[i].key,
            .first_block = batch->block_count,
            .flush_status = batch->put ? UCS_INPROGRESS : UCS_OK,
        };
    }
    for (uint32_t i = batch->block_count; i-- > 0;) { /* backwards: the lists then run forwards */
        struct lane *lane = &transfer->lanes[batch->route[i]];
        if (!lane->endpoint) continue;
        transfer->next_block[i] = lane->first_block;
        lane->first_block = i;
    }
    for (uint32_t i = 0; i < batch->block_count; i++) {
        const polar_route *route = &batch->routes[batch->route[i]];
        if (route->endpoint) continue;
        transfer->copies.shared[i] = route->mapping + (batch->remote[i] - route->remote);
        transfer->copies.listed[transfer->copies.count++] = i;
    }
    for (uint32_t i = 0; i < batch->route_count; i++) {
        struct lane *lane = &transfer->lanes[i];
        for (uint32_t b = lane->first_block; b < batch->block_count; b = transfer->next_block[b])
            append_block(transfer, lane, b, &memory);
        lane->needs_flush = batch->put && lane->next;
    }
    return POLAR_DONE;
}
