/* A memory node's directory, slab and ring, from the side of its clients. */

#include <string.h>

#include "lookup.h"

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

struct entry find_entry(const polar_directory *directory, const uint8_t *key) {
    struct entry *ways, entry;
    uint64_t words[2];
    memcpy(words, key, sizeof(words));
    ways = ways_of((struct entry *)(uintptr_t)directory->entries, directory->entry_count, words);
    for (int way = 0; way < WAYS; way++) {
        entry = read_entry(&ways[way]);
        if (entry.generation && is_of(&entry, words)) return entry;
    }
    return (struct entry){0};
}

uint64_t slab_at(const polar_directory *directory, uint64_t address, uint64_t length) {
    const polar_route *slab = &directory->slab;
    uint64_t offset = address - slab->remote;
    return offset <= slab->length && length <= slab->length - offset ? slab->mapping + offset : 0;
}

bool was_told(const polar_directory *directory, const uint8_t *key) {
    struct ring *ring = (struct ring *)(uintptr_t)directory->ring;
    uint64_t heard = __atomic_load_n(&ring->heard, __ATOMIC_ACQUIRE);
    for (uint64_t i = heard; i != ring->told && i - heard < NOTICES; i++) {
        const struct notice *notice = notice_at(ring, i);
        if (notice->kind == BLOCK_WRITTEN && !memcmp(notice->key, key, sizeof(notice->key))) return true;
    }
    return false;
}

void note(polar_directory *directory, struct notice notice, const uint8_t *key) {
    struct ring *ring = (struct ring *)(uintptr_t)directory->ring;
    memcpy(notice.key, key, sizeof(notice.key));
    *notice_at(ring, ring->told + directory->noted++) = notice;
}

void tell(polar_directory *directory) {
    struct ring *ring = (struct ring *)(uintptr_t)directory->ring;
    __atomic_store_n(&ring->told, ring->told + directory->noted, __ATOMIC_RELEASE);
    directory->noted = 0;
}
