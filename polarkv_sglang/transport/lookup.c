/* Reads blocks of nodes on this host without asking them: finds them in directories, copies them, and checks what
 * was copied. No lease keeps them where they are: what somebody else has written there meanwhile has another
 * checksum. Where something is missing nothing is read: what is behind it may be of no use. */

#include <stdlib.h>
#include <string.h>

#include "copies.h"
#include "lookup.h"

static polar_directory *directory_of(const polar_lookup *lookup, uint32_t number) {
    return lookup->directories[lookup->directory ? lookup->directory[number] : 0];
}

static struct entry find(const polar_lookup *lookup, uint32_t number) {
    return find_entry(directory_of(lookup, number), lookup->keys + (size_t)number * KEY_BYTES);
}

/* Where a block of our length lies there, inside the mapping; 0: there is none. */
static uint64_t mapped_at(const polar_lookup *lookup, uint32_t number, const struct entry *entry) {
    uint64_t length = lookup->pieces * lookup->piece_bytes;
    if (!entry->generation || entry->length != length) return 0;
    return slab_at(directory_of(lookup, number), entry->address, length);
}

/* What became of a block that was to be copied. */
static uint8_t judge(const polar_lookup *lookup, const struct copies *copies, const struct entry *was,
                     uint32_t number) {
    struct block block = copied_block(copies, number);
    if (copies->copied[number] < block.length) return POLAR_UNKNOWN;
    if (checksum_of(&block) == was->checksum) return POLAR_READ;
    return find(lookup, number).generation == was->generation ? POLAR_WRONG : POLAR_UNKNOWN;
}

static int carry_out(const polar_lookup *lookup, struct copies *copies, struct entry *found) {
    for (uint32_t i = 0; i < lookup->block_count; i++) {
        found[i] = find(lookup, i);
        lookup->generations[i] = found[i].generation;
        copies->shared[i] = mapped_at(lookup, i, &found[i]);
        copies->listed[i] = i;
        if (!copies->shared[i]) return POLAR_NOT_THERE;
    }
    copies->count = lookup->block_count;
    copies->digests = malloc((copies->count * chunk_count(lookup->pieces * lookup->piece_bytes) + 1) * sizeof(uint64_t));
    if (!copies->digests) return POLAR_NO_MEMORY;
    begin_copies(copies);
    while (copies_left(copies) && now_ns() < copies->deadline_ns) copy_burst(copies);
    stop_copies(copies);
    finish_copies(copies);
    for (uint32_t i = 0; i < copies->count; i++) lookup->states[i] = judge(lookup, copies, &found[i], i);
    return POLAR_DONE;
}

/* Has the nodes know what was read, heads later than their tails; those whose rings have room. */
static void tell_reads(const polar_lookup *lookup) {
    for (uint32_t i = 0; i < lookup->directory_count; i++) lookup->directories[i]->untold = 0;
    for (uint32_t i = 0; i < lookup->block_count; i++) directory_of(lookup, i)->untold++;
    for (uint32_t i = 0; i < lookup->directory_count; i++) {
        polar_directory *directory = lookup->directories[i];
        struct ring *ring = (struct ring *)(uintptr_t)directory->ring;
        if (ring && can_tell(ring, directory->untold)) directory->untold = 0;
    }
    for (uint32_t i = lookup->block_count; i--;)
        if (!directory_of(lookup, i)->untold)
            note(directory_of(lookup, i), (struct notice){.kind = BLOCK_READ}, lookup->keys + (size_t)i * KEY_BYTES);
    for (uint32_t i = 0; i < lookup->directory_count; i++)
        if (lookup->directories[i]->ring && !lookup->directories[i]->untold) tell(lookup->directories[i]);
}

int polar_look_up(const polar_lookup *lookup) {
    size_t count = (size_t)lookup->block_count + 1;
    struct entry *found = malloc(count * sizeof(*found)); /* as they were */
    struct copies copies = {
        .hash = lookup->hash,
        .local = lookup->local,
        .pieces = lookup->pieces,
        .piece_bytes = lookup->piece_bytes,
        .shared = malloc(count * sizeof(uint64_t)),
        .copied = calloc(count, sizeof(uint64_t)),
        .listed = malloc(count * sizeof(uint32_t)),
        .deadline_ns = now_ns() + lookup->timeout_ns,
    };
    int result = POLAR_NO_MEMORY;
    if (found && copies.shared && copies.copied && copies.listed) result = carry_out(lookup, &copies, found);
    if (result == POLAR_DONE) tell_reads(lookup);
    free(found);
    free(copies.digests);
    free(copies.shared);
    free(copies.copied);
    free(copies.listed);
    return result;
}
