/* The node's end of a connection that carries blocks: bytes between a socket and memory, in one call without the
 * GIL. The socket does not block; the calls do, until all bytes have passed or the time is over. */

#define _GNU_SOURCE /* sendmsg's and recvmsg's flags */

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "abi.h"

enum {
    RANGES = 64,     /* most that one system call moves */
    BURST = 4 << 20, /* bytes that it moves at most, about: more than a socket takes */
};

/* Where the next byte of the blocks lies. */
struct place {
    uint32_t block, part;
    uint64_t into;
};

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static uint64_t begin_of(const polar_delivery *delivery, struct place at) {
    return delivery->parts[2 * at.part] + at.into;
}

static uint64_t left_of(const polar_delivery *delivery, struct place at) {
    return delivery->parts[2 * at.part + 1] - at.into;
}

static bool is_dropped(const polar_delivery *delivery, struct place at) {
    return !delivery->blocks[at.block];
}

static struct place behind(const polar_delivery *delivery, struct place at, uint64_t count) {
    while (count && count >= left_of(delivery, at)) {
        count -= left_of(delivery, at);
        at.into = 0;
        if (++at.part < delivery->part_count) continue;
        at.part = 0;
        at.block++;
    }
    at.into += count;
    return at;
}

/* Adds where the blocks' bytes lie, from a place on, up to one whose bytes are dropped; those that follow each
 * other as one. */
static int add_blocks(const polar_delivery *delivery, struct place at, struct iovec *ranges, int count) {
    uint64_t total = 0;
    while (at.block < delivery->block_count && !is_dropped(delivery, at) && total < BURST) {
        uint64_t length = left_of(delivery, at);
        uint8_t *start = (uint8_t *)(uintptr_t)(delivery->blocks[at.block] + begin_of(delivery, at));
        struct iovec *last = count ? &ranges[count - 1] : NULL;
        if (last && (uint8_t *)last->iov_base + last->iov_len == start)
            last->iov_len += length;
        else if (count < RANGES)
            ranges[count++] = (struct iovec){start, length};
        else
            break;
        at = behind(delivery, at, length);
        total += length;
    }
    return count;
}

static bool is_over(int64_t deadline_ns) {
    return deadline_ns >= 0 && now_ns() >= deadline_ns;
}

/* Waits until the socket can go on, not longer than to the deadline. */
static void wait_for(int fd, short events, int64_t deadline_ns) {
    int64_t left_ms = deadline_ns < 0 ? -1 : (deadline_ns - now_ns()) / 1000000 + 1;
    if (deadline_ns >= 0 && left_ms < 0) return; /* poll would take it for no limit */
    poll(&(struct pollfd){.fd = fd, .events = events}, 1, left_ms > INT_MAX ? INT_MAX : (int)left_ms);
}

/* Waits for bytes, without sleep at first if the peer is on this host. */
static void wait_for_bytes(const polar_delivery *delivery, int64_t deadline_ns) {
    int64_t until_ns = now_ns() + delivery->spin_ns;
    while (now_ns() < until_ns) {
        if (poll(&(struct pollfd){.fd = delivery->fd, .events = POLLIN}, 1, 0)) return;
        sched_yield(); /* the peer may be waiting for this very core */
    }
    wait_for(delivery->fd, POLLIN, deadline_ns);
}

static int64_t deadline_of(const polar_delivery *delivery) {
    return delivery->timeout_ns < 0 ? -1 : now_ns() + delivery->timeout_ns;
}

int polar_send(const polar_delivery *delivery) {
    int64_t deadline_ns = deadline_of(delivery);
    struct place at = {0};
    uint64_t head = 0; /* bytes of it that are sent */
    while (head < delivery->head_bytes || at.block < delivery->block_count) {
        struct iovec ranges[RANGES];
        struct msghdr message = {.msg_iov = ranges};
        ssize_t done;
        int count = 0;
        if (head < delivery->head_bytes)
            ranges[count++] = (struct iovec){(void *)(uintptr_t)(delivery->head + head), delivery->head_bytes - head};
        message.msg_iovlen = add_blocks(delivery, at, ranges, count);
        done = sendmsg(delivery->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done > 0) {
            uint64_t of_head = delivery->head_bytes - head;
            if (of_head > (uint64_t)done) of_head = done;
            head += of_head;
            at = behind(delivery, at, done - of_head);
        } else if (errno != EAGAIN && errno != EINTR) {
            return errno;
        } else {
            wait_for(delivery->fd, POLLOUT, deadline_ns);
        }
        /* Also of a peer that is always ready. */
        if (is_over(deadline_ns)) return ETIMEDOUT;
    }
    return 0;
}

/* One read of what comes next. */
static ssize_t receive_some(const polar_delivery *delivery, struct place at, uint64_t tail) {
    struct iovec ranges[RANGES];
    struct msghdr message = {.msg_iov = ranges};
    if (at.block == delivery->block_count)
        return recv(delivery->fd, delivery->tail + tail, delivery->tail_bytes - tail, MSG_DONTWAIT);
    if (is_dropped(delivery, at))
        return recv(delivery->fd, NULL, left_of(delivery, at), MSG_DONTWAIT | MSG_TRUNC);
    message.msg_iovlen = add_blocks(delivery, at, ranges, 0);
    return recvmsg(delivery->fd, &message, MSG_DONTWAIT);
}

int polar_receive(const polar_delivery *delivery) {
    int64_t deadline_ns = deadline_of(delivery);
    struct place at = {0};
    uint64_t tail = 0; /* bytes of it that are here */
    while (at.block < delivery->block_count || tail < delivery->tail_bytes) {
        ssize_t done = receive_some(delivery, at, tail);
        if (done > 0) {
            if (at.block < delivery->block_count)
                at = behind(delivery, at, done);
            else
                tail += done;
        } else if (done == 0) {
            return ECONNRESET;
        } else if (errno != EAGAIN && errno != EINTR) {
            return errno;
        } else {
            wait_for_bytes(delivery, deadline_ns);
        }
        if (is_over(deadline_ns)) return ETIMEDOUT;
    }
    return 0;
}
