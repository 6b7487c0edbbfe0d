/* Reads blocks of nodes on this host without asking them: finds them in directories, copies them, and checks what
 * was copied. No lease keeps them where they are: what somebody else has written there meanwhile has another
 * checksum. Where something is missing nothing is read: what is behind it may be of no use. */

#include <stdlib.h>
#include <string.h>

#include "copies.h"
#include "directory.h"

/* A copy that nobody was writing meanwhile; else of nothing. */
static struct entry read_entry(const struct entry *entry) {
    struct entry copy = {.version = __atomic_load_n(&entry->version, __ATOMIC_ACQUIRE)};
    copy.key[0] = __atomic_load_n(&entry->key[0], __ATOMIC_RELAXED);
    copy.key[1] = __atomic_load_n(&entry->key[1], __ATOMIC_RELAXED);
    copy.address = __atomic_load_n(&entry->address, __ATOMIC_RELAXED);
    copy.length = __atomic_load_n(&entry->length, __ATOMIC_RELAXED);
    copy.checksum = __atomic_load_n(&entry->checksum, __ATOMIC_RELAXED);
    copy.generation = __atomic_load_n(&entry->generation, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (copy.version % 2 || __atomic_load_n(&entry->version, __ATOMIC_RELAXED) != copy.version)
        copy.generation = 0;
    return copy;
}

static const polar_directory *directory_of(const polar_lookup *lookup, uint32_t number) {
    return lookup->directories[lookup->directory ? lookup->directory[number] : 0];
}

static struct entry find(const polar_lookup *lookup, uint32_t number) {
    const polar_directory *directory = directory_of(lookup, number);
    struct entry *ways, entry;
    uint64_t key[2];
    memcpy(key, lookup->keys + (size_t)number * sizeof(key), sizeof(key));
    ways = ways_of((struct entry *)(uintptr_t)directory->entries, directory->entry_count, key);
    for (int way = 0; way < WAYS; way++) {
        entry = read_entry(&ways[way]);
        if (entry.generation && is_of(&entry, key)) return entry;
    }
    return (struct entry){0};
}

/* Where a block of our length lies there, inside the mapping; 0: there is none. */
static uint64_t mapped_at(const polar_lookup *lookup, uint32_t number, const struct entry *entry) {
    const polar_route *slab = &directory_of(lookup, number)->slab;
    uint64_t offset = entry->address - slab->remote, length = lookup->pieces * lookup->piece_bytes;
    if (!entry->generation || entry->length != length) return 0;
    return offset <= slab->length && length <= slab->length - offset ? slab->mapping + offset : 0;
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
    free(found);
    free(copies.digests);
    free(copies.shared);
    free(copies.copied);
    free(copies.listed);
    return result;
}
