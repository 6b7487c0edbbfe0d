/* A client's connection that streams, served without the GIL: requests about blocks, and the blocks themselves.
 *
 * What is no such request, or is no good one, is left to Python, which knows all messages and says what is wrong
 * with those that are not. transport/messages.py describes what is answered here. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "index.h"
#include "wire.h"

enum {
    FOR_OTHERS = -1,        /* what an answer is that is not given here; else 0, or an errno */
    COLUMNS = 4,            /* of POLAR_MAX_KEYS numbers: what a request needs at most, and a reply */
    FIRST_FRAME = 64 << 10, /* bytes: the keys of a large batch fit */
    REPLY_BYTES = 256,      /* of a reply without its columns */
    PADDING_BYTES = 64,
    PAGE_BYTES = 4096,
    SPIN_NS = 100 * 1000,                 /* the rest of blocks is on its way, and being woken takes as long */
    TRAILER_BYTES = sizeof(uint64_t) + 1, /* of each block that is written: less than two columns have */
};

#define MOST_BLOCK_BYTES (UINT64_C(1) << 40)

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

polar_stream *polar_stream_new(polar_index *index, uint64_t owner, int fd, int near, uint64_t most_frame_bytes) {
    polar_stream *stream = calloc(1, sizeof(*stream));
    if (!stream) return NULL;
    *stream = (polar_stream){
        .index = index,
        .owner = owner,
        .fd = fd,
        .near = near,
        .most_frame_bytes = most_frame_bytes,
        .frame = malloc(FIRST_FRAME),
        .frame_capacity = FIRST_FRAME,
        .columns = malloc(COLUMNS * POLAR_MAX_KEYS * sizeof(*stream->columns)),
        .reply = malloc(REPLY_BYTES + PADDING_BYTES + COLUMNS * POLAR_MAX_KEYS * sizeof(uint64_t)),
    };
    if (stream->frame && stream->columns && stream->reply) return stream;
    polar_stream_free(stream);
    return NULL;
}

void polar_stream_free(polar_stream *stream) {
    free(stream->frame);
    free(stream->columns);
    free(stream->reply);
    free(stream);
}

static uint64_t *column(const polar_stream *stream, uint32_t number) {
    return stream->columns + (size_t)number * POLAR_MAX_KEYS;
}

static int reply(polar_stream *stream, struct writer *writer) {
    return polar_send(&(polar_delivery){
        .fd = stream->fd,
        .head = writer->start,
        .head_bytes = end_frame(writer),
        .timeout_ns = -1,
    });
}

/* ---- What requests have in common. */

struct keys {
    const uint8_t *start;
    uint32_t count;
};

static struct keys read_keys(struct reader *reader) {
    struct bytes bytes = read_bytes(reader);
    reader->good &= bytes.length % KEY_BYTES == 0 && bytes.length <= POLAR_MAX_KEYS * KEY_BYTES;
    return (struct keys){bytes.start, (uint32_t)(bytes.length / KEY_BYTES)};
}

static uint64_t read_length(struct reader *reader) {
    uint64_t length = read_number(reader);
    reader->good &= length > 0 && length <= MOST_BLOCK_BYTES;
    return length;
}

/* Seconds above 0, as nanoseconds; what is too long for a lease is shortened anyway. */
static int64_t read_lease(const polar_stream *stream, struct reader *reader) {
    int64_t longest_ns = stream->index->settings.longest_lease_ns;
    double lease_ns = read_real(reader) * 1e9;
    reader->good &= lease_ns > 0; /* NaN is not */
    return reader->good && lease_ns < (double)longest_ns ? (int64_t)lease_ns : longest_ns;
}

/* Whether all of the request was read, and is as it should be. */
static bool is_whole(const struct reader *reader) {
    return reader->good && reader->at == reader->end;
}

/* ---- Requests that are answered from the index alone. */

static int answer_locate(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader), lease;
    struct keys keys = read_keys(reader);
    int64_t lease_ns = read_lease(stream, reader);
    polar_places places = {column(stream, 0), column(stream, 1), column(stream, 2), column(stream, 3)};
    struct writer writer = begin_frame(stream->reply, 6, "located");
    if (!is_whole(reader)) return FOR_OTHERS;
    lease = polar_locate(stream->index, stream->owner, keys.start, keys.count, lease_ns, 1, now_ns(), &places);
    write_number(&writer, id);
    write_number(&writer, lease);
    write_bytes(&writer, places.addresses, keys.count * sizeof(uint64_t));
    write_bytes(&writer, places.lengths, keys.count * sizeof(uint64_t));
    write_bytes(&writer, places.checksums, keys.count * sizeof(uint64_t));
    write_bytes(&writer, places.generations, keys.count * sizeof(uint64_t));
    return reply(stream, &writer);
}

static int answer_hold(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader);
    struct keys keys = read_keys(reader);
    int64_t lease_ns = read_lease(stream, reader);
    uint8_t *present = (uint8_t *)column(stream, 0);
    struct writer writer = begin_frame(stream->reply, 3, "held");
    if (!is_whole(reader)) return FOR_OTHERS;
    write_number(&writer, id);
    write_number(&writer, polar_hold(stream->index, stream->owner, keys.start, keys.count, lease_ns, now_ns(), present));
    write_bytes(&writer, present, keys.count);
    return reply(stream, &writer);
}

static int answer_peek(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader);
    struct keys keys = read_keys(reader);
    uint8_t *present = (uint8_t *)column(stream, 0);
    struct writer writer = begin_frame(stream->reply, 2, "peeked");
    if (!is_whole(reader)) return FOR_OTHERS;
    polar_peek(stream->index, keys.start, keys.count, present);
    write_number(&writer, id);
    write_bytes(&writer, present, keys.count);
    return reply(stream, &writer);
}

static int answer_renew(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader), lease = read_number(reader);
    int64_t lease_ns = read_lease(stream, reader);
    struct writer writer = begin_frame(stream->reply, 2, "renewed");
    if (!is_whole(reader)) return FOR_OTHERS;
    write_number(&writer, id);
    write_truth(&writer, polar_renew(stream->index, stream->owner, lease, lease_ns, now_ns()));
    return reply(stream, &writer);
}

static int answer_release(polar_stream *stream, struct reader *reader) {
    uint64_t lease = read_number(reader);
    if (!is_whole(reader)) return FOR_OTHERS;
    polar_release(stream->index, stream->owner, lease);
    return 0;
}

static int answer_used(polar_stream *stream, struct reader *reader) {
    struct keys keys = read_keys(reader);
    if (!is_whole(reader)) return FOR_OTHERS;
    polar_use(stream->index, keys.start, keys.count);
    return 0;
}

static int answer_reserve(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader), length, *addresses = column(stream, 0);
    struct keys keys = read_keys(reader), parents = read_keys(reader);
    uint8_t *states = (uint8_t *)column(stream, 1);
    struct writer writer = begin_frame(stream->reply, 4, "reserved");
    length = read_length(reader);
    if (!is_whole(reader) || parents.count != keys.count) return FOR_OTHERS;
    write_number(&writer, id);
    write_number(&writer, polar_reserve(stream->index, stream->owner, keys.start, parents.start, keys.count, length,
                                        0, now_ns(), addresses, states));
    write_bytes(&writer, addresses, keys.count * sizeof(uint64_t));
    write_bytes(&writer, states, keys.count);
    return reply(stream, &writer);
}

static int answer_commit(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader), number = read_number(reader), *checksums = column(stream, 0);
    struct bytes mask = read_bytes(reader), blob = read_bytes(reader);
    struct writer writer = begin_frame(stream->reply, 2, "committed");
    int64_t count;
    if (!is_whole(reader) || mask.length > POLAR_MAX_KEYS || blob.length != mask.length * sizeof(*checksums))
        return FOR_OTHERS;
    memcpy(checksums, blob.start, blob.length);
    count = polar_commit(stream->index, stream->owner, number, mask.start, checksums, (uint32_t)mask.length);
    if (count < 0) return FOR_OTHERS;
    write_number(&writer, id);
    write_number(&writer, (uint64_t)count);
    return reply(stream, &writer);
}

static int answer_grant(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader), length = read_length(reader), slots = read_number(reader);
    struct writer writer = begin_frame(stream->reply, 2, "granted");
    uint32_t count;
    if (!is_whole(reader) || !slots || slots > POLAR_MOST_GRANTED) return FOR_OTHERS;
    count = polar_grant(stream->index, stream->owner, length, (uint32_t)slots, now_ns(), column(stream, 0));
    write_number(&writer, id);
    write_bytes(&writer, column(stream, 0), count * sizeof(uint64_t));
    return reply(stream, &writer);
}

/* ---- Requests that blocks go with. */

/* The parts of each block that are asked for; how many, or 0 if they are none. */
static uint32_t parts_of(struct bytes blob, uint64_t length, uint32_t keys, uint64_t parts[2 * POLAR_MAX_PULL_PARTS]) {
    uint32_t count = (uint32_t)(blob.length / 16);
    if (!blob.length) {
        parts[0] = 0;
        parts[1] = length;
        return 1;
    }
    if (blob.length % 16 || blob.length > 16 * POLAR_MAX_PULL_PARTS || keys * count > POLAR_MAX_PULL_RUNS) return 0;
    memcpy(parts, blob.start, blob.length);
    for (uint32_t i = 0; i < count; i++)
        if (parts[2 * i] > length || !parts[2 * i + 1] || parts[2 * i + 1] > length - parts[2 * i]) return 0;
    return count;
}

/* What goes out before `sent_bytes` of blocks, the first of which lies at `address`; how long it is.
 *
 * A socket copies it to the start of a page, and the blocks on from there: see framing.py, encode_before. */
static uint64_t write_pulled(polar_stream *stream, uint64_t id, const polar_places *places, uint32_t count,
                             uint64_t sent_bytes, uint64_t address) {
    static const uint8_t zeros[PADDING_BYTES];
    for (uint64_t padding = 0;; padding = PADDING_BYTES) {
        struct writer writer = begin_frame(stream->reply, 4, "pulled");
        uint64_t length;
        write_number(&writer, id);
        write_bytes(&writer, places->checksums, count * sizeof(uint64_t));
        write_bytes(&writer, places->generations, count * sizeof(uint64_t));
        write_bytes(&writer, zeros, padding);
        length = end_frame(&writer);
        memcpy(stream->reply + length, &sent_bytes, sizeof(sent_bytes));
        length += sizeof(sent_bytes);
        if (padding || (length - address) % PAGE_BYTES >= PADDING_BYTES) return length;
    }
}

/* Blocks are leased until the socket has taken them. */
static int answer_pull(polar_stream *stream, struct reader *reader) {
    polar_index *index = stream->index;
    uint64_t id = read_number(reader), length, parts[2 * POLAR_MAX_PULL_PARTS], part_bytes = 0, lease;
    struct keys keys = read_keys(reader);
    struct bytes blob = {0};
    polar_places places = {column(stream, 0), column(stream, 1), column(stream, 2), column(stream, 3)};
    uint32_t part_count, count = 0;
    int64_t longest_ns = index->settings.longest_lease_ns;
    bool last;
    int error;
    length = read_length(reader);
    if (reader->items > 3) blob = read_bytes(reader);
    if (!is_whole(reader)) return FOR_OTHERS;
    part_count = parts_of(blob, length, keys.count, parts);
    if (!part_count) return FOR_OTHERS;
    for (uint32_t i = 0; i < part_count; i++) part_bytes += parts[2 * i + 1];
    last = parts[2 * part_count - 2] + parts[2 * part_count - 1] == length;
    lease = polar_locate(index, stream->owner, keys.start, keys.count, longest_ns, !parts[0], now_ns(), &places);
    while (count < keys.count && places.lengths[count] == length) count++;
    error = polar_send(&(polar_delivery){
        .fd = stream->fd,
        .head = stream->reply,
        .head_bytes = write_pulled(stream, id, &places, count, count * part_bytes,
                                   count ? places.addresses[0] + parts[0] : 0),
        .blocks = places.addresses,
        .block_count = count,
        .parts = parts,
        .part_count = part_count,
        .timeout_ns = longest_ns / 10 * 9,
    });
    /* Blocks that come in parts are counted with the last one. */
    end_pull(index, stream->owner, lease, last && !error ? count : 0, error ? 0 : count * part_bytes);
    return error;
}

/* Has slots filled, and the reservation of those that have an address committed. What comes for the others is
 * dropped. Addresses are in the first column. How many blocks are visible then, or an errno below 0. */
static int64_t receive_blocks(polar_stream *stream, uint64_t number, uint32_t count, uint64_t length,
                              int64_t timeout_ns) {
    uint64_t *addresses = column(stream, 0), *checksums = column(stream, 1);
    uint8_t *mask = (uint8_t *)(checksums + count);
    uint32_t ours = 0;
    int error = polar_receive(&(polar_delivery){
        .fd = stream->fd,
        .blocks = addresses,
        .block_count = count,
        .parts = (const uint64_t[]){0, length},
        .part_count = 1,
        .tail = (uint8_t *)checksums,
        .tail_bytes = (uint64_t)count * TRAILER_BYTES,
        .timeout_ns = timeout_ns < 0 ? 0 : timeout_ns,
        .spin_ns = stream->near ? SPIN_NS : 0,
    });
    if (error) {
        polar_give_up(stream->index, stream->owner, number, now_ns());
        return -error;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (!addresses[i]) continue;
        checksums[ours] = checksums[i];
        mask[ours++] = mask[i];
    }
    return ours ? polar_commit(stream->index, stream->owner, number, mask, checksums, ours) : 0;
}

static int answer_store(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader), length, number;
    struct keys keys = read_keys(reader), parents = read_keys(reader);
    uint8_t *states = (uint8_t *)column(stream, 3);
    struct writer writer;
    int64_t count;
    length = read_length(reader);
    if (reader->items > 4) read_bytes(reader); /* padding */
    if (!is_whole(reader) || parents.count != keys.count) return FOR_OTHERS;
    number = polar_reserve(stream->index, stream->owner, keys.start, parents.start, keys.count, length, 1, now_ns(),
                           column(stream, 0), states);
    count = receive_blocks(stream, number, keys.count, length, stream->index->settings.reservation_ns);
    if (count < 0) return (int)-count;
    writer = begin_frame(stream->reply, 2, "stored");
    write_number(&writer, id);
    write_bytes(&writer, states, keys.count);
    return reply(stream, &writer);
}

static int answer_fill(polar_stream *stream, struct reader *reader) {
    uint64_t id = read_number(reader), number = read_number(reader), length;
    struct writer writer;
    uint32_t blocks;
    int64_t left_ns, count;
    if (reader->items > 2) read_bytes(reader); /* padding */
    if (!is_whole(reader)) return FOR_OTHERS;
    blocks = polar_fill(stream->index, stream->owner, number, now_ns(), column(stream, 0), &length, &left_ns);
    if (!blocks) return FOR_OTHERS;
    count = receive_blocks(stream, number, blocks, length, left_ns);
    if (count < 0) return (int)-count;
    writer = begin_frame(stream->reply, 2, "committed");
    write_number(&writer, id);
    write_number(&writer, (uint64_t)count);
    return reply(stream, &writer);
}

/* ---- */

typedef int (*answer_function)(polar_stream *stream, struct reader *reader);

/* By tag, with how many items the request has besides: the last one may be missing where it has a default. */
static const struct kind {
    const char *tag;
    answer_function answer;
    uint32_t least, most;
} kinds[] = {
    {"pull", answer_pull, 3, 4},       {"store", answer_store, 4, 5},   {"fill", answer_fill, 2, 3},
    {"locate", answer_locate, 3, 3},   {"release", answer_release, 1, 1}, {"reserve", answer_reserve, 4, 4},
    {"commit", answer_commit, 4, 4},   {"hold", answer_hold, 3, 3},     {"peek", answer_peek, 2, 2},
    {"renew", answer_renew, 3, 3},     {"used", answer_used, 1, 1},     {"grant", answer_grant, 3, 3},
};

static int answer(polar_stream *stream) {
    struct reader reader = begin_message(stream->frame, stream->frame_bytes);
    struct bytes tag = read_tag(&reader);
    if (!reader.good) return FOR_OTHERS;
    for (uint32_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
        const struct kind *kind = &kinds[i];
        if (tag.length != strlen(kind->tag) || memcmp(tag.start, kind->tag, tag.length)) continue;
        return reader.items < kind->least || reader.items > kind->most ? FOR_OTHERS : kind->answer(stream, &reader);
    }
    return FOR_OTHERS;
}

static int receive(const polar_stream *stream, void *start, uint64_t length) {
    return polar_receive(&(polar_delivery){
        .fd = stream->fd,
        .tail = start,
        .tail_bytes = length,
        .timeout_ns = -1,
    });
}

static int receive_frame(polar_stream *stream) {
    uint32_t length;
    int error = receive(stream, &length, sizeof(length));
    if (error) return error;
    stream->frame_bytes = length;
    if (length > stream->most_frame_bytes) return EMSGSIZE;
    if (length > stream->frame_capacity) {
        uint8_t *bigger = realloc(stream->frame, length);
        if (!bigger) return ENOMEM;
        stream->frame = bigger;
        stream->frame_capacity = length;
    }
    return receive(stream, stream->frame, length);
}

int polar_serve(polar_stream *stream) {
    for (;;) {
        int outcome = receive_frame(stream);
        if (outcome) return outcome;
        outcome = answer(stream);
        if (outcome) return outcome == FOR_OTHERS ? 0 : outcome;
    }
}
