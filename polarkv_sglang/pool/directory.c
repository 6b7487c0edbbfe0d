/* Keeps the directory, if there is one, as the index is. Under the index's lock, so there is one writer. */

#include "../transport/directory.h"
#include "index.h"

/* What is read while it is written has an odd version, or another one before than after. */
static void write_entry(struct entry *entry, const struct row *row) {
    uint64_t version = entry->version;
    __atomic_store_n(&entry->version, version + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&entry->key[0], row->key.words[0], __ATOMIC_RELAXED);
    __atomic_store_n(&entry->key[1], row->key.words[1], __ATOMIC_RELAXED);
    __atomic_store_n(&entry->address, row->address, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->length, row->length, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->checksum, row->checksum, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->generation, row->generation, __ATOMIC_RELAXED);
    __atomic_store_n(&entry->version, version + 2, __ATOMIC_RELEASE);
}

static struct entry *ways(const polar_index *index, struct key key) {
    struct entry *entries = (struct entry *)(uintptr_t)index->settings.directory;
    return ways_of(entries, index->settings.directory_entries, key.words);
}

/* Where all ways are taken the block takes the place of any: that one is asked for then. */
void publish(polar_index *index, const struct row *row) {
    struct entry *entry;
    if (!index->settings.directory_entries) return;
    entry = ways(index, row->key);
    for (int way = 0; way < WAYS; way++)
        if (!entry[way].generation) {
            write_entry(&entry[way], row);
            return;
        }
    write_entry(&entry[row->generation % WAYS], row);
}

/* Before anybody else may write to the block's slot. */
void withdraw(polar_index *index, const struct row *row) {
    static const struct row none;
    struct entry *entry;
    if (!index->settings.directory_entries) return;
    entry = ways(index, row->key);
    for (int way = 0; way < WAYS; way++)
        if (entry[way].generation == row->generation) write_entry(&entry[way], &none);
}

const char *check_directory(const polar_index *index) {
    const struct entry *entries = (const struct entry *)(uintptr_t)index->settings.directory;
    for (uint64_t i = 0; i < index->settings.directory_entries; i++) {
        const struct entry *entry = &entries[i];
        const struct row *row;
        if (entry->version % 2) return "an entry of the directory is being written";
        if (!entry->generation) continue;
        row = &index->table.rows[find_row(&index->table, (struct key){{entry->key[0], entry->key[1]}})];
        if (row->state != COMMITTED || row->generation != entry->generation || row->address != entry->address ||
            row->length != entry->length || row->checksum != entry->checksum)
            return "the directory has a block that is not here, or not so";
    }
    return NULL;
}
