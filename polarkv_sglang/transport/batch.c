/* What must not hold the GIL: a batch of RMA operations from start to end, and a memory node's progress loop.
 *
 * The calling thread gives up the GIL once for the whole call: beside a busy Python thread every hand-over
 * costs a switch interval (5 ms). Nothing here calls into Python or needs its headers. */

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "abi.h"

enum {
    UCS_OK = 0,
    UCS_INPROGRESS = 1,
    UCS_ERR_CANCELED = -16,
    UCS_ERR_TIMED_OUT = -20,
    UCS_ERR_NOT_CONNECTED = -24,
    UCS_ERR_LAST = -100,
    OP_CALLBACK = 1 << 1,
    OP_USER_DATA = 1 << 2,
    OP_FLAGS = 1 << 4,
    OP_MEMH = 1 << 8,
    CLOSE_FORCE = 1,
};

enum {
    ISSUE_BURST = 64,    /* operations issued on one endpoint before the others and the clock get a turn */
    PROGRESS_BURST = 16, /* progress calls between two looks at the clock */
    SPINS = 64,          /* fruitless rounds before sleeping: spinning starves a TCP peer on the same host */
    SLEEP_MS = 10,       /* longest sleep: an event that UCX does not signal costs no more than this */
    SERVE_BURST = 256,   /* progress calls between two looks at a serving worker's stop_fd */
};

/* One batch's operations on one endpoint. Each lane has its own window: an endpoint that hangs holds up only
 * itself. */
struct lane {
    const polar_ucp *ucp;
    polar_endpoint *endpoint;
    ucp_rkey_h key;
    struct ticket *next;       /* first operation that was not issued yet */
    uint32_t in_flight;        /* requests that UCX holds, the flush included */
    bool needs_flush;          /* puts are done only when the peer has them */
    ucs_status_t flush_status; /* UCS_INPROGRESS: not flushed */
};

enum lane_state { FINISHED, WAITING, READY }; /* WAITING: for UCX. READY: has more to issue at once */

/* One operation's place in its lane; same index as the operation. Outlives the request. */
struct ticket {
    struct lane *owner;
    struct ticket *next;
    ucs_status_t status;
};

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static bool is_request(ucs_status_ptr_t result) {
    return (uintptr_t)result - 1 < (uintptr_t)UCS_ERR_LAST - 1;
}

static ucs_status_t raw_status(ucs_status_ptr_t result) {
    return (ucs_status_t)(intptr_t)result;
}

/* UCX calls this when the peer is lost. Closing the endpoint is left to whoever uses it next. */
void polar_endpoint_failed(void *arg, ucp_ep_h handle, ucs_status_t status) {
    polar_endpoint *endpoint = arg;
    (void)handle;
    if (endpoint->status == UCS_OK) endpoint->status = status;
}

static void on_operation(void *request, ucs_status_t status, void *arg) {
    struct ticket *ticket = arg;
    struct lane *lane = ticket->owner;
    ticket->status = status;
    lane->in_flight--;
    lane->ucp->request_free(request);
}

static void on_flush(void *request, ucs_status_t status, void *arg) {
    struct lane *lane = arg;
    lane->flush_status = status;
    lane->in_flight--;
    lane->ucp->request_free(request);
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

static void issue(struct lane *lane, struct ticket *ticket, const polar_batch *batch,
                  const polar_operation *op) {
    const polar_ucp *ucp = lane->ucp;
    ucp_request_param_t param = {
        .op_attr_mask = OP_CALLBACK | OP_USER_DATA | OP_MEMH,
        .cb = on_operation,
        .user_data = ticket,
        .memh = batch->memories[op->memory]->handle,
    };
    void *local = (void *)(uintptr_t)op->local;
    ucp_ep_h ep = lane->endpoint->handle;
    ucs_status_ptr_t result = batch->put ? ucp->put(ep, local, op->length, op->remote, lane->key, &param)
                                         : ucp->get(ep, local, op->length, op->remote, lane->key, &param);
    if (is_request(result))
        lane->in_flight++;
    else
        ticket->status = raw_status(result);
}

static void flush(struct lane *lane) {
    ucp_request_param_t param = {
        .op_attr_mask = OP_CALLBACK | OP_USER_DATA,
        .cb = on_flush,
        .user_data = lane,
    };
    ucs_status_ptr_t result = lane->ucp->flush(lane->endpoint->handle, &param);
    lane->needs_flush = false;
    if (is_request(result))
        lane->in_flight++;
    else
        lane->flush_status = raw_status(result);
}

/* Hands UCX what fits into the lane's window. */
static enum lane_state advance(struct lane *lane, const polar_batch *batch, struct ticket *tickets) {
    for (int burst = ISSUE_BURST; lane->endpoint->status == UCS_OK && lane->next && burst; burst--) {
        struct ticket *ticket = lane->next;
        if (lane->in_flight >= batch->window) break;
        lane->next = ticket->next;
        issue(lane, ticket, batch, &batch->operations[ticket - tickets]);
    }
    if (lane->endpoint->status != UCS_OK) {
        fail_unissued(lane, lane->endpoint->status);
        lane->needs_flush = false;
        force_close(lane->ucp, lane->endpoint); /* else some of its requests would stay until the deadline */
    } else if (lane->needs_flush && !lane->next) {
        flush(lane);
    }
    if (lane->next && lane->in_flight < batch->window) return READY;
    return lane->in_flight ? WAITING : FINISHED;
}

/* Sleeps until the worker has an event or stop_fd is readable; not at all if there is an event by now. */
static void sleep_armed(const polar_worker *worker, int stop_fd, int timeout_ms) {
    struct pollfd fds[2] = {{.fd = worker->event_fd, .events = POLLIN}, {.fd = stop_fd, .events = POLLIN}};
    if (worker->ucp->arm(worker->handle) == UCS_OK) poll(fds, 2, timeout_ms); /* callers loop: EINTR too */
}

static bool progress_some(const polar_worker *worker) {
    bool any = false;
    for (int i = 0; i < PROGRESS_BURST && worker->ucp->progress(worker->handle); i++) any = true;
    return any;
}

/* Progresses until every lane is finished; false at the deadline. */
static bool run_until(const polar_worker *worker, const polar_batch *batch, struct lane *lanes,
                      struct ticket *tickets, int64_t deadline_ns) {
    int idle = 0;
    for (;;) {
        enum lane_state busiest = FINISHED;
        for (uint32_t i = 0; i < batch->endpoint_count; i++) {
            enum lane_state state = advance(&lanes[i], batch, tickets);
            if (state > busiest) busiest = state;
        }
        if (busiest == FINISHED) return true;
        if (now_ns() >= deadline_ns) return false;
        if (progress_some(worker) || busiest == READY) {
            idle = 0;
        } else if (++idle > SPINS) {
            int64_t left_ms = (deadline_ns - now_ns()) / 1000000 + 1;
            sleep_armed(worker, -1, left_ms < SLEEP_MS ? (int)left_ms : SLEEP_MS);
        }
    }
}

/* Gives up what is pending, and the endpoints that hold it. */
static void expire(const polar_batch *batch, struct lane *lanes) {
    for (uint32_t i = 0; i < batch->endpoint_count; i++) {
        struct lane *lane = &lanes[i];
        fail_unissued(lane, UCS_ERR_TIMED_OUT);
        lane->needs_flush = false;
        if (!lane->in_flight) continue;
        polar_endpoint_failed(lane->endpoint, NULL, UCS_ERR_TIMED_OUT);
        force_close(lane->ucp, lane->endpoint);
    }
}

static bool in_bounds(const polar_batch *batch, const polar_operation *op) {
    const polar_memory *memory;
    if (op->endpoint >= batch->endpoint_count || op->memory >= batch->memory_count) return false;
    memory = batch->memories[op->memory];
    return op->local >= memory->address && op->length <= memory->length &&
           op->local - memory->address <= memory->length - op->length;
}

/* An operation's final status: its own, for a put its flush's too; the endpoint's explains a cancellation. */
static ucs_status_t settle(const struct ticket *ticket) {
    const struct lane *lane = ticket->owner;
    ucs_status_t status = ticket->status == UCS_OK ? lane->flush_status : ticket->status;
    if (status == UCS_OK || (status != UCS_INPROGRESS && status != UCS_ERR_CANCELED)) return status;
    return lane->endpoint->status != UCS_OK ? lane->endpoint->status : UCS_ERR_TIMED_OUT;
}

int polar_transfer(const polar_worker *worker, const polar_batch *batch, ucs_status_t *statuses,
                   polar_outcome *outcome) {
    int64_t deadline_ns = now_ns() + batch->timeout_ns;
    int result = POLAR_NO_MEMORY;
    struct lane *lanes;
    struct ticket *tickets;

    /* Before anything is issued: a batch is refused whole. */
    for (uint32_t i = 0; i < batch->operation_count; i++) {
        if (!in_bounds(batch, &batch->operations[i])) {
            outcome->refused = i;
            return POLAR_REFUSED;
        }
    }
    lanes = calloc(batch->endpoint_count + 1, sizeof(*lanes));
    tickets = calloc(batch->operation_count + 1, sizeof(*tickets));
    if (!lanes || !tickets) goto out;
    for (uint32_t i = 0; i < batch->endpoint_count; i++) {
        lanes[i].ucp = worker->ucp;
        lanes[i].endpoint = batch->endpoints[i];
        lanes[i].key = batch->keys[i];
        lanes[i].flush_status = batch->put ? UCS_INPROGRESS : UCS_OK;
    }
    for (uint32_t i = batch->operation_count; i-- > 0;) { /* backwards: each lane's list then runs forwards */
        struct lane *lane = &lanes[batch->operations[i].endpoint];
        tickets[i] = (struct ticket){.owner = lane, .next = lane->next, .status = UCS_INPROGRESS};
        lane->next = &tickets[i];
        lane->needs_flush = batch->put;
    }

    if (!run_until(worker, batch, lanes, tickets, deadline_ns)) {
        expire(batch, lanes);
        /* UCX still refers to the tickets if this fails too: they are given up together with the worker. */
        if (!run_until(worker, batch, lanes, tickets, now_ns() + batch->drain_ns)) return POLAR_UNDRAINED;
    }
    for (uint32_t i = 0; i < batch->operation_count; i++) {
        statuses[i] = settle(&tickets[i]);
        if (statuses[i] == UCS_OK)
            outcome->done_bytes += batch->operations[i].length;
        else
            outcome->failed++;
    }
    result = POLAR_DONE;
out:
    free(tickets);
    free(lanes);
    return result;
}

/* Unless forced, waits for the peer to take part. Returns a UCX status. */
int polar_close(const polar_worker *worker, polar_endpoint *endpoint, int force, int64_t timeout_ns) {
    int64_t deadline_ns = now_ns() + timeout_ns;
    ucp_request_param_t param = {0};
    ucs_status_ptr_t result;
    ucs_status_t status;

    if (force || endpoint->status != UCS_OK) {
        polar_endpoint_failed(endpoint, NULL, UCS_ERR_NOT_CONNECTED);
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
        if (!progress_some(worker)) sleep_armed(worker, -1, 1);
    worker->ucp->request_free(result);
    return status == UCS_INPROGRESS ? UCS_ERR_TIMED_OUT : status;
}

/* A spinning loop would take the core from the clients of this host, so this one sleeps in poll. */
int polar_serve(const polar_worker *worker, int stop_fd) {
    struct pollfd stop = {.fd = stop_fd, .events = POLLIN};
    for (;;) {
        bool idle = false;
        for (int i = 0; i < SERVE_BURST && !idle; i++) idle = worker->ucp->progress(worker->handle) == 0;
        int ready = poll(&stop, 1, 0);
        if (ready > 0) return 0;
        if (ready < 0 && errno != EINTR) return errno;
        if (idle) sleep_armed(worker, stop_fd, -1);
    }
}
