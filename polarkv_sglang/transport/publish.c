/* Writes blocks for a memory node on this host without asking it: to slots that it has granted before, and it is told
 * once they are there. Who looks them up then finds them, since the node hears first what it was told. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "copies.h"
#include "lookup.h"

/* Whether the node, as far as the socket knows, has not ended the connection. */
static bool stands(int fd) {
    char byte;
    ssize_t count = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return count > 0 || (count < 0 && (errno == EAGAIN || errno == EINTR));
}

/* Decides which blocks are written, and where; false if that is more than there are slots. */
static bool assign_slots(const polar_publication *publication, struct copies *copies) {
    const polar_granted *granted = publication->granted;
    uint64_t length = publication->pieces * publication->piece_bytes;
    /* Who writes the same again begins with the same block; to look for each would take long. */
    bool again = publication->block_count && was_told(granted->directory, publication->keys);
    for (uint32_t i = 0; i < publication->block_count; i++) {
        const uint8_t *key = publication->keys + (size_t)i * KEY_BYTES;
        copies->shared[i] = 0;
        if (find_entry(granted->directory, key).generation || (again && was_told(granted->directory, key))) continue;
        if (copies->count == granted->count - granted->taken) return false;
        copies->shared[i] = slab_at(granted->directory, granted->addresses[granted->taken + copies->count], length);
        if (!copies->shared[i]) return false;
        copies->listed[copies->count++] = i;
    }
    return true;
}

/* Fills in what became of a block, and notes it; `slot` is where it was written, if it was. */
static void settle(const polar_publication *publication, const struct copies *copies, uint32_t number, uint64_t slot) {
    const uint8_t *key = publication->keys + (size_t)number * KEY_BYTES;
    uint8_t *state = &publication->states[number];
    struct block block = copied_block(copies, number);
    struct notice notice = {.kind = BLOCK_OFFERED, .address = slot};
    *state = slot ? POLAR_NOT_WRITTEN : POLAR_WAS_THERE;
    if (slot) {
        if (copies->copied[number] < block.length) return;
        notice.kind = BLOCK_WRITTEN;
        notice.checksum = checksum_of(&block);
        if (publication->expected && publication->expected[number] != notice.checksum) return;
        memcpy(notice.parent, publication->parents + (size_t)number * KEY_BYTES, KEY_BYTES);
        *state = POLAR_WRITTEN;
    }
    note(publication->granted->directory, notice, key);
}

static int carry_out(const polar_publication *publication, struct copies *copies) {
    polar_granted *granted = publication->granted;
    struct ring *ring = (struct ring *)(uintptr_t)granted->directory->ring;
    uint32_t slot;
    if (!can_tell(ring, publication->block_count) || !assign_slots(publication, copies)) return POLAR_NO_SLOTS;
    begin_copies(copies);
    while (copies_left(copies) && now_ns() < copies->deadline_ns) copy_burst(copies);
    stop_copies(copies);
    finish_copies(copies);
    slot = granted->taken += copies->count;
    /* Heads are used later than their tails. */
    for (uint32_t i = publication->block_count; i--;)
        settle(publication, copies, i, copies->shared[i] ? granted->addresses[--slot] : 0);
    tell(granted->directory);
    return POLAR_DONE;
}

int polar_publish(const polar_publication *publication) {
    size_t count = (size_t)publication->block_count + 1;
    uint64_t chunks = chunk_count(publication->pieces * publication->piece_bytes);
    struct copies copies = {
        .hash = publication->hash,
        .put = true,
        .local = publication->local,
        .pieces = publication->pieces,
        .piece_bytes = publication->piece_bytes,
        .digests = malloc(count * chunks * sizeof(uint64_t)),
        .shared = malloc(count * sizeof(uint64_t)),
        .copied = calloc(count, sizeof(uint64_t)),
        .listed = malloc(count * sizeof(uint32_t)),
        .deadline_ns = now_ns() + publication->timeout_ns,
    };
    int result = POLAR_NO_MEMORY;
    if (!stands(publication->granted->fd))
        result = POLAR_GONE;
    else if (copies.digests && copies.shared && copies.copied && copies.listed)
        result = carry_out(publication, &copies);
    free(copies.digests);
    free(copies.shared);
    free(copies.copied);
    free(copies.listed);
    return result;
}
