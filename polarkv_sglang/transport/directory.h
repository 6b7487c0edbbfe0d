/* A memory node's directory: where its committed blocks lie, in memory that clients on its host map for reading.
 *
 * So they find blocks without asking. Its one writer never waits for them: an entry that is being written, or was
 * while it was read, is none. It need not have every block, and a block that was found may be gone by the time that
 * it is read: whoever reads it checks it. */

#ifndef POLAR_DIRECTORY_H
#define POLAR_DIRECTORY_H

#include <stdbool.h>
#include <stdint.h>

/* A cache line. */
struct entry {
    uint64_t version; /* odd: it is being written */
    uint64_t key[2];
    uint64_t address; /* in the node */
    uint64_t length, checksum;
    uint64_t generation; /* 0: empty */
    uint64_t unused;
};

_Static_assert(sizeof(struct entry) == 64, "directory.py knows it");

enum { WAYS = 4 }; /* entries that a key's may be in */

/* The first of the entries where the key's may be, of so many, which are a multiple of WAYS. */
static inline struct entry *ways_of(struct entry *entries, uint64_t count, const uint64_t key[2]) {
    return &entries[key[0] % (count / WAYS) * WAYS];
}

static inline bool is_of(const struct entry *entry, const uint64_t key[2]) {
    return entry->key[0] == key[0] && entry->key[1] == key[1];
}

#endif
