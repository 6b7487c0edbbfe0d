/* Blocks over sockets: a request and its blocks out, a reply and its blocks in, with many peers at once.
 *
 * Where a network offers nothing but TCP this is quicker than UCX's one-sided operations, which it emulates by
 * messages: one exchange moves a whole batch, bytes are hashed while they are in a cache, and once a socket is
 * closed nothing writes to local memory any more. So it is for few blocks anywhere on one host. One call without
 * the GIL, like a batch over UCX. */

#define _GNU_SOURCE /* splice, and sendmsg's and recvmsg's flags */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "blocks.h"

enum {
    RANGES = 64,           /* most that one system call moves */
    BURST = 256 * 1024,    /* bytes that it moves at most: what is hashed before it or after it is in a cache */
    SPIN_NS = 300 * 1000,  /* a peer is waited for so long without sleep: most take less, being woken 100 us */
    SIZE_BYTES = 4,        /* of a frame's header */
    LENGTH_BYTES = 8,      /* of what says how many bytes of blocks follow a reply */
    LEND_BYTES = 2 << 20,  /* from so many on a peer's blocks are lent to the socket: copying fewer is quicker */
    LEND_PIECE = 4096,     /* in pieces of so many at least */
    PIPE_BYTES = 1 << 19,  /* wanted of a pipe: a slot for every page of a burst, whose ranges may begin in one */
    LEAST_PIPE = 1 << 16,  /* through less, copying is quicker */
};

struct stream {
    polar_channel *channel;
    uint64_t block_bytes;
    uint64_t *digests; /* of the block that is being moved */
    uint64_t hashed;   /* bytes of all blocks, from the first on */
    uint64_t sent;     /* bytes of request, blocks and checksums */
    uint64_t received; /* bytes of reply, length and blocks */
    uint64_t frame_bytes;
    uint64_t coming; /* bytes of blocks behind the reply */
    uint64_t lent;   /* bytes of blocks that have been in the pipe */
    int pipe[2];     /* through which the socket gets pages instead of copies of them; -1: there is none */
    uint8_t size[SIZE_BYTES];
    uint8_t length[LENGTH_BYTES];
    bool finished;
};

static uint64_t least(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

static uint64_t little_endian(const uint8_t *bytes, int count) {
    uint64_t value = 0;
    while (count--) value = value << 8 | bytes[count];
    return value;
}

static void finish(struct stream *stream, int error) {
    stream->channel->error = error;
    stream->finished = true;
}

static uint64_t outgoing_blocks(const polar_exchange_batch *batch, const struct stream *stream) {
    return batch->put ? stream->channel->block_count * stream->block_bytes : 0;
}

static uint64_t outgoing_checksums(const polar_exchange_batch *batch, const struct stream *stream) {
    return batch->put ? stream->channel->block_count * (sizeof(uint64_t) + 1) : 0;
}

/* Hashes the blocks' bytes up to `reached` of all of them; a block's checksum once its last byte is there. */
static void hash_until(const polar_exchange_batch *batch, struct stream *stream, uint64_t reached) {
    polar_channel *channel = stream->channel;
    while (batch->hash && stream->hashed < reached) {
        uint64_t index = stream->hashed / stream->block_bytes, start = index * stream->block_bytes;
        uint64_t end = least(reached - start, stream->block_bytes);
        struct block block = {
            .hash = batch->hash,
            .pieces = &channel->local[index * batch->pieces],
            .piece_bytes = batch->piece_bytes,
            .length = stream->block_bytes,
            .digests = stream->digests,
        };
        end = whole_chunks(&block, end);
        if (start + end <= stream->hashed) return; /* less than a chunk more */
        digest(&block, stream->hashed - start, end);
        stream->hashed = start + end;
        if (end < stream->block_bytes) continue;
        channel->checksums[index] = checksum_of(&block);
        if (batch->put)
            ((uint8_t *)(channel->checksums + channel->block_count))[index] =
                !channel->expected || channel->expected[index] == channel->checksums[index];
    }
}

static int add_range(struct iovec *ranges, int count, const void *start, uint64_t length) {
    if (length && count < RANGES) ranges[count++] = (struct iovec){(void *)(uintptr_t)start, length};
    return count;
}

/* Adds where the blocks' bytes [from, to) lie. */
static int add_blocks(const polar_exchange_batch *batch, const struct stream *stream, struct iovec *ranges,
                      int count, uint64_t from, uint64_t to) {
    while (from < to && count < RANGES) {
        uint64_t piece = from / batch->piece_bytes, into = from % batch->piece_bytes;
        uint64_t length = least(to - from, batch->piece_bytes - into);
        const uint8_t *start = (const uint8_t *)(uintptr_t)stream->channel->local[piece] + into;
        struct iovec *last = count ? &ranges[count - 1] : NULL;
        if (last && (const uint8_t *)last->iov_base + last->iov_len == start)
            last->iov_len += length;
        else
            count = add_range(ranges, count, start, length);
        from += length;
    }
    return count;
}

static void close_pipe(struct stream *stream) {
    for (int end = 0; end < 2; end++)
        if (stream->pipe[end] >= 0) close(stream->pipe[end]);
    stream->pipe[0] = stream->pipe[1] = -1;
}

/* Gives a put with much to send a pipe, if the socket would not block on it. */
static void open_pipe(const polar_exchange_batch *batch, struct stream *stream) {
    struct sigaction action;
    int flags;
    stream->pipe[0] = stream->pipe[1] = -1;
    if (outgoing_blocks(batch, stream) < LEND_BYTES || batch->piece_bytes < LEND_PIECE) return;
    flags = fcntl(stream->channel->fd, F_GETFL);
    if (flags < 0 || !(flags & O_NONBLOCK)) return;
    /* Python ignores SIGPIPE, but its host may not: splice raises it where sendmsg can be told not to. */
    if (sigaction(SIGPIPE, NULL, &action) || action.sa_handler == SIG_DFL) return;
    if (pipe2(stream->pipe, O_CLOEXEC | O_NONBLOCK)) return;
    fcntl(stream->pipe[1], F_SETPIPE_SZ, PIPE_BYTES); /* else it has what it has */
    if (fcntl(stream->pipe[1], F_GETPIPE_SZ) < LEAST_PIPE) close_pipe(stream);
}

/* Goes on by copying: such memory, or such a kernel, does not lend. */
static ssize_t stop_lending(struct stream *stream) {
    close_pipe(stream);
    errno = EAGAIN;
    return -1;
}

/* Sends blocks' bytes from `sent` on without a copy: the socket reads them where they lie. Should the exchange
 * fail, that may be after its return; the checksums, which go last, are those of the bytes as they were. */
static ssize_t lend_some(const polar_exchange_batch *batch, struct stream *stream, uint64_t sent) {
    uint64_t to = least(sent + BURST, outgoing_blocks(batch, stream));
    struct iovec ranges[RANGES];
    ssize_t done;
    if (stream->lent <= sent) {
        hash_until(batch, stream, to);
        done = vmsplice(stream->pipe[1], ranges, add_blocks(batch, stream, ranges, 0, sent, to), 0);
        if (done < 0) return errno == EINTR ? done : stop_lending(stream);
        stream->lent = sent + done;
    }
    done = splice(stream->pipe[0], NULL, stream->channel->fd, NULL, stream->lent - sent, SPLICE_F_MORE);
    if (done < 0 && (errno == EINVAL || errno == ENOSYS || errno == EPERM || errno == EACCES))
        return stop_lending(stream);
    return done;
}

/* Sends what is not lent. */
static ssize_t copy_some(const polar_exchange_batch *batch, struct stream *stream) {
    polar_channel *channel = stream->channel;
    uint64_t blocks = outgoing_blocks(batch, stream), sums = outgoing_checksums(batch, stream);
    uint64_t sent = stream->sent;
    bool lending = stream->pipe[0] >= 0;
    struct iovec ranges[RANGES];
    struct msghdr message = {.msg_iov = ranges};
    int count = 0, flags = MSG_DONTWAIT | MSG_NOSIGNAL;

    if (sent < channel->request_bytes) {
        count = add_range(ranges, count, channel->request + sent, channel->request_bytes - sent);
        sent = channel->request_bytes;
    }
    sent -= channel->request_bytes;
    if (sent < blocks && lending) {
        flags |= MSG_MORE;
    } else if (sent < blocks) {
        uint64_t to = least(sent + BURST, blocks);
        hash_until(batch, stream, to);
        count = add_blocks(batch, stream, ranges, count, sent, to);
        sent = to;
    }
    if (sent >= blocks && count < RANGES) {
        uint64_t part = sent - blocks;
        count = add_range(ranges, count, (const uint8_t *)channel->checksums + part, sums - part);
    }
    message.msg_iovlen = count;
    return sendmsg(channel->fd, &message, flags);
}

/* Whether it got on. */
static bool send_some(const polar_exchange_batch *batch, struct stream *stream) {
    uint64_t blocks_from = stream->channel->request_bytes;
    bool at_blocks = stream->sent >= blocks_from && stream->sent - blocks_from < outgoing_blocks(batch, stream);
    ssize_t done = at_blocks && stream->pipe[0] >= 0 ? lend_some(batch, stream, stream->sent - blocks_from)
                                                     : copy_some(batch, stream);
    if (done < 0) {
        if (errno != EAGAIN && errno != EINTR) finish(stream, errno);
        return false;
    }
    stream->sent += done;
    return true;
}

/* Counts what a read has brought, or ends the stream if it cannot go on. Whether it got on. */
static bool took_in(struct stream *stream, ssize_t count) {
    if (count > 0) {
        stream->received += count;
        return true;
    }
    if (count == 0)
        finish(stream, ECONNRESET);
    else if (errno != EAGAIN && errno != EINTR)
        finish(stream, errno);
    return false;
}

/* Receives into `length` bytes at `start`, of which `had` are there. Whether it got on. */
static bool receive_part(struct stream *stream, uint8_t *start, uint64_t had, uint64_t length) {
    return took_in(stream, recv(stream->channel->fd, start + had, length - had, MSG_DONTWAIT));
}

static bool receive_blocks(const polar_exchange_batch *batch, struct stream *stream, uint64_t had) {
    struct iovec ranges[RANGES];
    struct msghdr message = {.msg_iov = ranges};
    ssize_t done;
    message.msg_iovlen = add_blocks(batch, stream, ranges, 0, had, least(had + BURST, stream->coming));
    done = recvmsg(stream->channel->fd, &message, MSG_DONTWAIT);
    if (!took_in(stream, done)) return false;
    hash_until(batch, stream, had + done);
    if (had + done == stream->coming) {
        stream->channel->arrived = stream->coming / stream->block_bytes;
        finish(stream, 0);
    }
    return true;
}

/* Whether it got on. A reply is its frame, and for a get the number of bytes that follow, and these. */
static bool receive_some(const polar_exchange_batch *batch, struct stream *stream) {
    polar_channel *channel = stream->channel;
    uint64_t received = stream->received;
    bool more;

    if (received < SIZE_BYTES) {
        more = receive_part(stream, stream->size, received, SIZE_BYTES);
        if (stream->received < SIZE_BYTES) return more;
        stream->frame_bytes = little_endian(stream->size, SIZE_BYTES);
        if (!stream->frame_bytes || stream->frame_bytes > channel->reply_capacity) finish(stream, EBADMSG);
        return more;
    }
    received -= SIZE_BYTES;
    if (received < stream->frame_bytes) {
        more = receive_part(stream, channel->reply, received, stream->frame_bytes);
        channel->reply_bytes = stream->received - SIZE_BYTES;
        if (channel->reply_bytes == stream->frame_bytes && batch->put) finish(stream, 0);
        return more;
    }
    received -= stream->frame_bytes;
    if (received < LENGTH_BYTES) {
        more = receive_part(stream, stream->length, received, LENGTH_BYTES);
        if (stream->received - SIZE_BYTES - stream->frame_bytes < LENGTH_BYTES) return more;
        stream->coming = little_endian(stream->length, LENGTH_BYTES);
        if (stream->coming > channel->block_count * stream->block_bytes ||
            stream->coming % stream->block_bytes)
            finish(stream, EBADMSG);
        else if (!stream->coming)
            finish(stream, 0);
        return more;
    }
    return receive_blocks(batch, stream, received - LENGTH_BYTES);
}

static bool is_sending(const polar_exchange_batch *batch, const struct stream *stream) {
    return stream->sent < stream->channel->request_bytes + outgoing_blocks(batch, stream) +
                              outgoing_checksums(batch, stream);
}

/* Waits until one of the unfinished sockets can go on, so many ms at most. Whether one can. */
static bool wait_ms(const polar_exchange_batch *batch, const struct stream *streams, struct pollfd *fds,
                    int most_ms) {
    nfds_t count = 0;
    for (uint32_t i = 0; i < batch->channel_count; i++) {
        if (streams[i].finished) continue;
        /* A peer that gives up while we send says so, and may not read the rest. */
        short events = is_sending(batch, &streams[i]) ? POLLOUT : POLLIN;
        fds[count++] = (struct pollfd){.fd = streams[i].channel->fd, .events = events};
    }
    return poll(fds, count, most_ms) > 0;
}

static void sleep_on(const polar_exchange_batch *batch, const struct stream *streams, struct pollfd *fds,
                     int64_t deadline_ns) {
    int64_t left_ms = (deadline_ns - now_ns()) / 1000000 + 1;
    wait_ms(batch, streams, fds, left_ms < 1 ? 1 : left_ms > INT_MAX ? INT_MAX : (int)left_ms);
}

/* Waits without sleep, and without the sockets' locks, under which bytes come in: trying to read takes them. */
static void spin_on(const polar_exchange_batch *batch, const struct stream *streams, struct pollfd *fds,
                    int64_t until_ns) {
    do sched_yield(); /* the peer may be waiting for this very core */
    while (!wait_ms(batch, streams, fds, 0) && now_ns() < until_ns);
}

static void run(const polar_exchange_batch *batch, struct stream *streams, struct pollfd *fds) {
    int64_t now = now_ns(), deadline_ns = now + batch->timeout_ns, idle_since = 0;
    for (;;) {
        bool waiting = false, any = false, sending = false, replies = false;
        for (uint32_t i = 0; i < batch->channel_count; i++) {
            struct stream *stream = &streams[i];
            if (stream->finished) continue;
            any |= is_sending(batch, stream) ? send_some(batch, stream) : receive_some(batch, stream);
            waiting |= !stream->finished;
            sending |= !stream->finished && is_sending(batch, stream);
            replies |= stream->received > 0;
        }
        if (!waiting) return;
        now = now_ns();
        if (now >= deadline_ns) break;
        if (any) {
            idle_since = 0;
            continue;
        }
        if (!idle_since) idle_since = now;
        if (now - idle_since >= SPIN_NS || (replies && !batch->near)) {
            sleep_on(batch, streams, fds, deadline_ns);
            idle_since = 0;
        } else if (sending) {
            sched_yield(); /* then try: a socket is said to be ready only once a good part of it is empty */
        } else {
            int64_t until_ns = idle_since + SPIN_NS;
            spin_on(batch, streams, fds, until_ns < deadline_ns ? until_ns : deadline_ns);
        }
    }
    for (uint32_t i = 0; i < batch->channel_count; i++)
        if (!streams[i].finished) finish(&streams[i], ETIMEDOUT);
}

int polar_exchange(const polar_exchange_batch *batch) {
    uint64_t block_bytes = batch->pieces * batch->piece_bytes, chunks = chunk_count(block_bytes);
    struct stream *streams = calloc(batch->channel_count, sizeof(*streams));
    struct pollfd *fds = calloc(batch->channel_count, sizeof(*fds));
    uint64_t *digests = malloc(batch->channel_count * chunks * sizeof(*digests));
    int result = POLAR_NO_MEMORY;
    if (streams && fds && digests) {
        for (uint32_t i = 0; i < batch->channel_count; i++) {
            streams[i].channel = &batch->channels[i];
            streams[i].channel->reply_bytes = streams[i].channel->arrived = 0;
            streams[i].block_bytes = block_bytes;
            streams[i].digests = &digests[i * chunks];
            open_pipe(batch, &streams[i]);
        }
        run(batch, streams, fds);
        for (uint32_t i = 0; i < batch->channel_count; i++) close_pipe(&streams[i]);
        result = POLAR_DONE;
    }
    free(digests);
    free(fds);
    free(streams);
    return result;
}
