/* What must not hold the GIL: a batch of reads or writes from start to end, and the wait for events.
 *
 * The calling thread gives up the GIL once for the whole call: beside a busy Python thread every hand-over
 * costs a switch interval (5 ms). Nothing here calls into Python or needs its headers. */

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "transfer.h"

enum {
    UCS_ERR_CANCELED = -16,
    UCS_ERR_TIMED_OUT = -20,
    UCS_ERR_NOT_CONNECTED = -24,
    UCS_ERR_LAST = -100,
    OP_CALLBACK = 1 << 1,
    OP_USER_DATA = 1 << 2,
    OP_DATATYPE = 1 << 3,
    OP_FLAGS = 1 << 4,
    OP_MEMH = 1 << 8,
    DATATYPE_IOV = 2,
    CLOSE_FORCE = 1,
};

enum {
    ISSUE_BURST = 64,        /* operations issued on one route before the others and the clock get a turn */
    PROGRESS_BURST = 16,     /* progress calls between two looks at the clock */
    SPINS = 64,              /* fruitless rounds before sleeping: spinning starves a TCP peer on this host */
    SLEEP_MS = 10,           /* longest sleep: an event that UCX does not signal costs no more than this */
    WAIT_BURST = 256,        /* progress calls between two looks at what else a worker waits for */
};

enum lane_state { FINISHED, WAITING, READY }; /* WAITING: for UCX. READY: has more to do at once */

static bool is_request(ucs_status_ptr_t result) {
    return (uintptr_t)result - 1 < (uintptr_t)UCS_ERR_LAST - 1;
}

static ucs_status_t raw_status(ucs_status_ptr_t result) {
    return (ucs_status_t)(intptr_t)result;
}

static uint64_t least(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

/* Digests what became whole chunks now that the block's bytes up to `reached` are there: they are likely in a
 * cache. */
static void digest_until(const struct transfer *transfer, uint32_t index, uint64_t reached) {
    struct block block = block_at(transfer, index);
    if (block.hash)
        digest(&block, whole_chunks(&block, transfer->seen[index]), whole_chunks(&block, reached));
    transfer->seen[index] = reached;
}

/* What arrives out of order waits for the end of the batch. */
static void digest_operation(const struct operation *op) {
    const struct transfer *transfer = op->lane->transfer;
    uint64_t start = op->start, left = op->length;
    for (uint32_t i = op->block; left; i = transfer->next_block[i], start = 0) {
        uint64_t end = start + least(left, transfer->block_bytes - start);
        if (transfer->seen[i] == start) digest_until(transfer, i, end);
        left -= end - start;
    }
}

static void fail_endpoint(polar_endpoint *endpoint, ucs_status_t status) {
    if (endpoint->status == UCS_OK) endpoint->status = status;
}

/* UCX calls this when a peer is lost, even after the endpoint was closed: then it is not among the worker's any
 * more. Closing the endpoint is left to whoever uses it next. */
void polar_endpoint_failed(void *arg, ucp_ep_h handle, ucs_status_t status) {
    const polar_worker *worker = arg;
    for (polar_endpoint *endpoint = worker->endpoints; endpoint; endpoint = endpoint->next)
        if (endpoint->handle == handle) fail_endpoint(endpoint, status);
}

void polar_add_endpoint(polar_worker *worker, polar_endpoint *endpoint) {
    endpoint->next = worker->endpoints;
    worker->endpoints = endpoint;
}

void polar_remove_endpoint(polar_worker *worker, const polar_endpoint *endpoint) {
    polar_endpoint **link = &worker->endpoints;
    while (*link && *link != endpoint) link = &(*link)->next;
    if (*link) *link = endpoint->next;
}

static void complete(struct operation *op, ucs_status_t status) {
    const struct transfer *transfer = op->lane->transfer;
    op->status = status;
    if (status == UCS_OK && !transfer->abandoned && !transfer->batch->put) digest_operation(op);
}

static void on_operation(void *request, ucs_status_t status, void *arg) {
    struct operation *op = arg;
    op->lane->in_flight--;
    complete(op, status);
    op->lane->transfer->worker->ucp->request_free(request);
}

static void on_flush(void *request, ucs_status_t status, void *arg) {
    struct lane *lane = arg;
    lane->flush_status = status;
    lane->in_flight--;
    lane->transfer->worker->ucp->request_free(request);
}

/* Ends an endpoint for good; its requests are completed by further progress. */
static void force_close(const polar_ucp *ucp, polar_endpoint *endpoint) {
    ucp_request_param_t param = {.op_attr_mask = OP_FLAGS, .flags = CLOSE_FORCE};
    ucs_status_ptr_t result;
    if (!endpoint->handle) return;
    result = ucp->close(endpoint->handle, &param);
    endpoint->handle = NULL;
    if (is_request(result)) ucp->request_free(result); /* UCX keeps it until it has completed */
}

static void fail_unissued(struct lane *lane, ucs_status_t status) {
    for (; lane->next; lane->next = lane->next->next) lane->next->status = status;
}

static void issue(struct lane *lane, struct operation *op) {
    const struct transfer *transfer = lane->transfer;
    const polar_batch *batch = transfer->batch;
    const polar_ucp *ucp = transfer->worker->ucp;
    ucp_request_param_t param = {
        .op_attr_mask = OP_CALLBACK | OP_USER_DATA,
        .cb = on_operation,
        .user_data = op,
    };
    void *local = op->entries;
    size_t count = op->entry_count;
    ucs_status_ptr_t result;

    if (count == 1) {
        local = op->entries->buffer;
        count = op->entries->length;
        param.op_attr_mask |= OP_MEMH;
        param.memh = batch->memories[op->memory]->handle;
    } else {
        param.op_attr_mask |= OP_DATATYPE;
        param.datatype = DATATYPE_IOV;
    }
    if (batch->put) {
        digest_operation(op);
        result = ucp->put(lane->endpoint->handle, local, count, op->remote, lane->key, &param);
    } else {
        result = ucp->get(lane->endpoint->handle, local, count, op->remote, lane->key, &param);
    }
    if (is_request(result))
        lane->in_flight++;
    else
        complete(op, raw_status(result));
}

static void flush(struct lane *lane) {
    ucp_request_param_t param = {
        .op_attr_mask = OP_CALLBACK | OP_USER_DATA,
        .cb = on_flush,
        .user_data = lane,
    };
    ucs_status_ptr_t result = lane->transfer->worker->ucp->flush(lane->endpoint->handle, &param);
    lane->needs_flush = false;
    if (is_request(result))
        lane->in_flight++;
    else
        lane->flush_status = raw_status(result);
}

/* Hands UCX what fits into the lane's window. */
static enum lane_state advance(struct lane *lane) {
    const struct transfer *transfer = lane->transfer;
    uint32_t window = transfer->batch->window;
    if (!lane->endpoint) return FINISHED;
    for (int burst = ISSUE_BURST; lane->endpoint->status == UCS_OK && lane->next && burst; burst--) {
        struct operation *op = lane->next;
        if (lane->in_flight >= window) break;
        lane->next = op->next;
        issue(lane, op);
    }
    if (lane->endpoint->status != UCS_OK) {
        fail_unissued(lane, lane->endpoint->status);
        lane->needs_flush = false;
        /* Else some of its requests would stay until the deadline. */
        force_close(transfer->worker->ucp, lane->endpoint);
    } else if (lane->needs_flush && !lane->next) {
        flush(lane);
    }
    if (lane->next && lane->in_flight < window) return READY;
    return lane->in_flight ? WAITING : FINISHED;
}

/* Sleeps until the worker has an event or one of the others is readable; not at all if it has one by now. The
 * first place is the worker's. */
static void sleep_armed(const polar_worker *worker, struct pollfd *fds, nfds_t count, int timeout_ms) {
    fds[0] = (struct pollfd){.fd = worker->event_fd, .events = POLLIN};
    if (worker->ucp->arm(worker->handle) != UCS_OK) return;
    poll(fds, count, timeout_ms); /* callers loop: EINTR too */
}

/* Milliseconds until the deadline, at least 1, at most `longest`. */
static int milliseconds_to(int64_t deadline_ns, int longest) {
    int64_t left_ms = (deadline_ns - now_ns()) / 1000000 + 1;
    return left_ms < 1 ? 1 : left_ms < longest ? (int)left_ms : longest;
}

static bool progress_some(const polar_worker *worker) {
    bool any = false;
    for (int i = 0; i < PROGRESS_BURST && worker->ucp->progress(worker->handle); i++) any = true;
    return any;
}

/* Progresses until every lane is finished and every block copied; false at the deadline. */
static bool run_until(struct transfer *transfer, int64_t deadline_ns) {
    const polar_worker *worker = transfer->worker;
    const polar_batch *batch = transfer->batch;
    int idle = 0;
    for (;;) {
        enum lane_state busiest = copies_left(&transfer->copies) ? READY : FINISHED;
        for (uint32_t i = 0; i < batch->route_count; i++) {
            enum lane_state state = advance(&transfer->lanes[i]);
            if (state > busiest) busiest = state;
        }
        if (busiest == FINISHED) return true;
        if (now_ns() >= deadline_ns) return false;
        copy_burst(&transfer->copies);
        if (progress_some(worker) || busiest == READY) {
            idle = 0;
        } else if (++idle > SPINS) {
            struct pollfd fds[1];
            sleep_armed(worker, fds, 1, milliseconds_to(deadline_ns, SLEEP_MS));
        }
    }
}

/* Gives up what is pending, and the endpoints that hold it. */
static void expire(struct transfer *transfer) {
    stop_copies(&transfer->copies);
    for (uint32_t i = 0; i < transfer->batch->route_count; i++) {
        struct lane *lane = &transfer->lanes[i];
        fail_unissued(lane, UCS_ERR_TIMED_OUT);
        lane->needs_flush = false;
        /* Puts that UCX took at once are still on their way until they are flushed. */
        if (!lane->in_flight && !(lane->last && lane->flush_status == UCS_INPROGRESS)) continue;
        fail_endpoint(lane->endpoint, UCS_ERR_TIMED_OUT);
        force_close(transfer->worker->ucp, lane->endpoint);
    }
}

/* An operation's final status: its own, for a put its flush's too; the endpoint's explains a cancellation. */
static ucs_status_t settle(const struct operation *op) {
    const struct lane *lane = op->lane;
    ucs_status_t status = op->status == UCS_OK ? lane->flush_status : op->status;
    if (status == UCS_OK || (status != UCS_INPROGRESS && status != UCS_ERR_CANCELED)) return status;
    return lane->endpoint->status != UCS_OK ? lane->endpoint->status : UCS_ERR_TIMED_OUT;
}

static void copy_digests(const struct block *block, uint32_t index, uint64_t *all) {
    uint64_t chunks = chunk_count(block->length);
    memcpy(&all[index * chunks], block->digests, chunks * sizeof(*all));
}

/* Fills in what the caller learns of each block. */
static void report(const struct transfer *transfer, ucs_status_t *statuses, uint64_t *checksums,
                   polar_outcome *outcome) {
    const polar_batch *batch = transfer->batch;
    outcome->operations = transfer->operation_count;
    for (uint32_t i = 0; i < batch->block_count; i++) {
        bool mapped = !batch->routes[batch->route[i]].endpoint;
        statuses[i] = mapped && transfer->seen[i] < transfer->block_bytes ? UCS_ERR_TIMED_OUT : UCS_OK;
    }
    for (size_t i = 0; i < transfer->operation_count; i++) {
        const struct operation *op = &transfer->operations[i];
        ucs_status_t status = settle(op);
        uint64_t reached = op->start;
        if (status == UCS_OK) continue;
        for (uint32_t b = op->block; reached < op->start + op->length; b = transfer->next_block[b]) {
            if (statuses[b] == UCS_OK) statuses[b] = status;
            reached += transfer->block_bytes - reached % transfer->block_bytes;
        }
    }
    for (uint32_t i = 0; i < batch->block_count; i++) {
        struct block block = block_at(transfer, i);
        if (statuses[i] != UCS_OK) {
            outcome->failed++;
            continue;
        }
        digest_until(transfer, i, block.length);
        if (block.hash) checksums[i] = checksum_of(&block);
        if (block.hash && batch->digests) copy_digests(&block, i, batch->digests);
        outcome->done_bytes += block.length;
    }
}

int polar_transfer(const polar_worker *worker, const polar_batch *batch, ucs_status_t *statuses,
                   uint64_t *checksums, polar_outcome *outcome) {
    int64_t deadline_ns = now_ns() + batch->timeout_ns;
    struct transfer *transfer;
    bool drained;
    int result = plan(worker, batch, &transfer, outcome);
    if (result != POLAR_DONE) return result;
    transfer->copies.deadline_ns = deadline_ns;
    begin_copies(&transfer->copies);
    drained = run_until(transfer, deadline_ns);
    if (!drained) {
        expire(transfer);
        drained = run_until(transfer, now_ns() + batch->drain_ns);
    }
    finish_copies(&transfer->copies);
    if (!drained) {
        /* UCX still refers to the plan: it is given up together with the worker. */
        transfer->abandoned = true;
        return POLAR_UNDRAINED;
    }
    report(transfer, statuses, checksums, outcome);
    discard(transfer);
    return POLAR_DONE;
}

/* Unless forced, waits for the peer to take part. Returns a UCX status. */
int polar_close(const polar_worker *worker, polar_endpoint *endpoint, int force, int64_t timeout_ns) {
    int64_t deadline_ns = now_ns() + timeout_ns;
    ucp_request_param_t param = {0};
    ucs_status_ptr_t result;
    ucs_status_t status;
    struct pollfd fds[1];

    if (force || endpoint->status != UCS_OK) {
        fail_endpoint(endpoint, UCS_ERR_NOT_CONNECTED);
        force_close(worker->ucp, endpoint);
        while (progress_some(worker) && now_ns() < deadline_ns) continue;
        return UCS_OK;
    }
    if (!endpoint->handle) return UCS_OK;
    result = worker->ucp->close(endpoint->handle, &param);
    endpoint->handle = NULL;
    endpoint->status = UCS_ERR_NOT_CONNECTED;
    if (!is_request(result)) return raw_status(result);
    while ((status = worker->ucp->request_status(result)) == UCS_INPROGRESS && now_ns() < deadline_ns)
        if (!progress_some(worker)) sleep_armed(worker, fds, 1, 1);
    worker->ucp->request_free(result);
    return status == UCS_INPROGRESS ? UCS_ERR_TIMED_OUT : status;
}

/* Progresses the worker until one of the descriptors is readable: 1; or the time is over, which a negative
 * one never is: 0; or they cannot be waited for: minus an errno. A spinning loop would take the core from the
 * peers of this host, so this one sleeps in poll. */
int polar_wait(const polar_worker *worker, const int *fds, uint32_t fd_count, int64_t timeout_ns) {
    int64_t deadline_ns = timeout_ns < 0 ? INT64_MAX : now_ns() + timeout_ns;
    struct pollfd *polled = calloc(fd_count + 1, sizeof(*polled));
    int result;
    if (!polled) return -ENOMEM;
    for (uint32_t i = 0; i < fd_count; i++) polled[i + 1] = (struct pollfd){.fd = fds[i], .events = POLLIN};
    for (;;) {
        bool idle = false;
        int ready;
        for (int i = 0; i < WAIT_BURST && !idle; i++) idle = worker->ucp->progress(worker->handle) == 0;
        ready = poll(polled + 1, fd_count, 0);
        result = ready < 0 ? -errno : 0;
        if (ready > 0 || (ready < 0 && errno != EINTR)) break;
        result = 0;
        if (now_ns() >= deadline_ns) break;
        if (idle) sleep_armed(worker, polled, fd_count + 1, milliseconds_to(deadline_ns, INT_MAX));
    }
    for (uint32_t i = 0; i < fd_count && result == 0; i++)
        if (polled[i + 1].revents) result = polled[i + 1].revents & POLLNVAL ? -EBADF : (int)i + 1;
    free(polled);
    return result;
}

int polar_abi(void) {
    return POLAR_ABI;
}
