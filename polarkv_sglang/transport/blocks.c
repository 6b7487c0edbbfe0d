/* Checksums of blocks, and copies of them to and from memory that a peer on this host shares.
 *
 * The checksum of a block is the XXH3_64 of the XXH3_64 digests (little-endian) of its chunks of 4096 bytes,
 * of which the last may be shorter. It does not depend on how the block is cut into pieces, chunks can be
 * hashed side by side, and a chunk can be hashed and copied while it is in the first-level cache: that makes
 * a copy with its checksum as fast as a copy. */

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "blocks.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "digests are hashed as they lie in memory");

enum {
    CHUNK = 4096,
    VECTOR = 16,              /* bytes of one streaming store */
    CACHE_LINE = 64,
    AHEAD = CHUNK, /* bytes between what is copied and what memory is to bring */
    FAULT_AROUND = 64 * 1024, /* that Linux maps at a read fault */
};

static uint64_t least(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

uint64_t chunk_count(uint64_t length) {
    return (length + CHUNK - 1) / CHUNK;
}

/* How much of the block's first `reached` bytes is whole chunks of it. */
uint64_t whole_chunks(const struct block *block, uint64_t reached) {
    return reached == block->length ? reached : reached - reached % CHUNK;
}

uint64_t checksum_of(const struct block *block) {
    return block->hash(block->digests, chunk_count(block->length) * sizeof(*block->digests));
}

/* Copies past the caches: memory is not read before it is written, and the cache keeps what it held. Unless NULL,
 * `kept` gets the same bytes, once read, in the cache. While they go out memory brings those that lie AHEAD of them,
 * as far as the `readable` ones go: the processor by itself stops at the end of a page. */
static inline void stream(uint8_t *to, uint8_t *kept, const uint8_t *from, size_t length, size_t readable) {
    size_t at = 0;
#ifdef __SSE2__
    size_t head = -(uintptr_t)to % VECTOR;
    if (length >= head + CACHE_LINE) {
        memcpy(to, from, head);
        if (kept) memcpy(kept, to, head);
        for (at = head; length - at >= CACHE_LINE; at += CACHE_LINE) {
            const __m128i *source = (const __m128i *)(from + at);
            __m128i *target = (__m128i *)(to + at), *copy;
            __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
            __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
            if (at + AHEAD < readable) __builtin_prefetch(from + at + AHEAD);
            _mm_stream_si128(target, a);
            _mm_stream_si128(target + 1, b);
            _mm_stream_si128(target + 2, c);
            _mm_stream_si128(target + 3, d);
            if (!kept) continue;
            copy = (__m128i *)(kept + at);
            _mm_storeu_si128(copy, a);
            _mm_storeu_si128(copy + 1, b);
            _mm_storeu_si128(copy + 2, c);
            _mm_storeu_si128(copy + 3, d);
        }
    }
#else
    (void)readable;
#endif
    if (kept) from = memcpy(kept + at, from + at, length - at) - at;
    memcpy(to + at, from + at, length - at);
}

void drain_stores(void) {
#ifdef __SSE2__
    _mm_sfence();
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* The range of the block from `from` that lies in one piece, at most `length` bytes of it. */
static uint8_t *span(const struct block *block, uint64_t from, uint64_t *length) {
    uint64_t into = from % block->piece_bytes;
    *length = least(*length, block->piece_bytes - into);
    return (uint8_t *)(uintptr_t)block->pieces[from / block->piece_bytes] + into;
}

/* A chunk's bytes in one run: where they are if one piece holds them, else collected in `buffer`. */
static const uint8_t *chunk_at(const struct block *block, uint64_t from, uint64_t length, uint8_t *buffer) {
    uint64_t part = length;
    const uint8_t *found = span(block, from, &part);
    if (part == length) return found;
    for (uint64_t done = 0; done < length; done += part) {
        part = length - done;
        found = span(block, from + done, &part);
        memcpy(buffer + done, found, part);
    }
    return buffer;
}

void digest(const struct block *block, uint64_t from, uint64_t to) {
    uint8_t buffer[CHUNK];
    for (; from < to; from += CHUNK) {
        uint64_t length = least(CHUNK, to - from);
        block->digests[from / CHUNK] = block->hash(chunk_at(block, from, length, buffer), length);
    }
}

/* The peer may change shared memory at any time: what is hashed and what is handed on is read once. */
void read_shared(const struct block *block, const uint8_t *shared, uint64_t from, uint64_t to) {
    uint8_t chunk[CHUNK] __attribute__((aligned(CACHE_LINE)));
    for (; from < to; from += CHUNK) {
        uint64_t length = least(CHUNK, to - from);
        for (uint64_t done = 0, part; done < length; done += part) {
            part = length - done;
            uint8_t *piece = span(block, from + done, &part);
            stream(piece, block->hash ? chunk + done : NULL, shared + from + done, part, block->length - from - done);
        }
        if (block->hash) block->digests[from / CHUNK] = block->hash(chunk, length);
    }
}

/* A read fault maps the pages around it too, a write fault only its own: with the read, the first writes to a
 * mapping run at 8 GB/s instead of 2.5. */
static void map_around(const uint8_t *shared) {
    (void)*(const volatile uint8_t *)shared;
}

void write_shared(const struct block *block, uint8_t *shared, uint64_t from, uint64_t to) {
    uint8_t buffer[CHUNK];
    for (; from < to; from += CHUNK) {
        uint64_t length = least(CHUNK, to - from), readable = block->piece_bytes - from % block->piece_bytes;
        const uint8_t *chunk = chunk_at(block, from, length, buffer);
        if (from == 0 || (uintptr_t)(shared + from) % FAULT_AROUND < CHUNK) map_around(shared + from);
        stream(shared + from, NULL, chunk, length, chunk == buffer ? 0 : readable);
        if (block->hash) block->digests[from / CHUNK] = block->hash(chunk, length);
    }
}

int polar_checksums(polar_hash hash, const uint64_t *local, uint32_t block_count, uint32_t pieces,
                    uint64_t piece_bytes, uint64_t *checksums) {
    struct block block = {.hash = hash, .piece_bytes = piece_bytes, .length = pieces * piece_bytes};
    block.digests = malloc(chunk_count(block.length) * sizeof(*block.digests));
    if (!block.digests) return POLAR_NO_MEMORY;
    for (uint32_t i = 0; i < block_count; i++) {
        block.pieces = &local[(size_t)i * pieces];
        digest(&block, 0, block.length);
        checksums[i] = checksum_of(&block);
    }
    free(block.digests);
    return POLAR_DONE;
}
