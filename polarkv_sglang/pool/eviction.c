/* The leaf that was used the longest time ago goes first. A tail goes before its head, since the loss of a head
 * makes its tail useless: only leaves are suggested. What is leased is none until its lease ends.
 *
 * A heap has the oldest leaves only, all of those up to a horizon, which moves on when they are used up. So neither
 * a use nor a leaf beyond the horizon costs anything here, and the look through all blocks is shared by the `batch`
 * evictions that follow it. Does not help against a scan: long prompts that never come back push out everything
 * older. */

#include <stdlib.h>

#include "index.h"

enum { LEAST_CAPACITY = 64 };

bool eviction_open(struct eviction *eviction, uint32_t batch) {
    eviction->batch = batch;
    eviction->capacity = batch > LEAST_CAPACITY ? batch : LEAST_CAPACITY;
    eviction->heap = malloc(eviction->capacity * sizeof(*eviction->heap));
    return eviction->heap != NULL;
}

void eviction_close(struct eviction *eviction) {
    free(eviction->heap);
}

uint64_t leaf_last_use(const struct row *row) {
    return row->state == COMMITTED && !row->children && !row->leases ? row->last_use : 0;
}

static void swap(struct leaf *a, struct leaf *b) {
    struct leaf leaf = *a;
    *a = *b;
    *b = leaf;
}

/* Moves a leaf up to its place in a heap whose root is the oldest one. */
static void rise(struct leaf *heap, uint32_t at) {
    while (at && heap[at].last_use < heap[(at - 1) / 2].last_use) {
        swap(&heap[at], &heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
}

/* Moves a leaf down to its place in a heap whose root is the oldest one, or the newest. */
static void sink(struct leaf *heap, uint32_t count, uint32_t at, bool newest) {
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= count) return;
        if (child + 1 < count && (heap[child + 1].last_use < heap[child].last_use) != newest) child++;
        if ((heap[at].last_use < heap[child].last_use) != newest || heap[at].last_use == heap[child].last_use)
            return;
        swap(&heap[at], &heap[child]);
        at = child;
    }
}

/* Begins anew: no leaf is known, and so none can be missing. */
static void forget(struct eviction *eviction, struct row *rows) {
    for (uint32_t i = 0; i < eviction->count; i++) rows[eviction->heap[i].row].queued = 0;
    eviction->count = 0;
    eviction->horizon = 0;
}

/* A block has become a leaf; said again whenever that comes true. */
void add_leaf(struct eviction *eviction, struct row *rows, uint32_t row) {
    uint64_t last_use = leaf_last_use(&rows[row]);
    if (!last_use || last_use > eviction->horizon || rows[row].queued) return;
    if (eviction->count == eviction->capacity) {
        size_t bytes = 2 * (size_t)eviction->capacity * sizeof(*eviction->heap);
        struct leaf *bigger = realloc(eviction->heap, bytes);
        if (!bigger) {
            forget(eviction, rows);
            return;
        }
        eviction->heap = bigger;
        eviction->capacity *= 2;
    }
    rows[row].queued = 1;
    eviction->heap[eviction->count] = (struct leaf){last_use, row};
    rise(eviction->heap, eviction->count++);
}

static int by_last_use(const void *a, const void *b) {
    uint64_t first = ((const struct leaf *)a)->last_use, second = ((const struct leaf *)b)->last_use;
    return (first > second) - (first < second);
}

/* Fills the empty heap with the oldest leaves beyond the horizon; whether there was any. Takes O(rows). */
static bool advance(struct eviction *eviction, struct table *table, uint64_t tick) {
    struct leaf *heap = eviction->heap; /* its root is the newest one until it is sorted */
    uint32_t count = 0;
    for (uint32_t number = 1; number < table->used; number++) {
        uint64_t last_use = leaf_last_use(&table->rows[number]);
        if (last_use <= eviction->horizon) continue;
        if (count < eviction->batch) {
            heap[count++] = (struct leaf){last_use, number};
            if (count == eviction->batch)
                for (uint32_t at = count / 2; at--;) sink(heap, count, at, true);
        } else if (last_use < heap[0].last_use) {
            heap[0] = (struct leaf){last_use, number};
            sink(heap, count, 0, true);
        }
    }
    qsort(heap, count, sizeof(*heap), by_last_use); /* and so it is a heap with the oldest at its root */
    for (uint32_t i = 0; i < count; i++) table->rows[heap[i].row].queued = 1;
    eviction->count = count;
    /* Where those are all, what they continue comes next, whenever that was used. */
    if (count) eviction->horizon = count < eviction->batch ? tick : heap[count - 1].last_use;
    return count > 0;
}

uint32_t next_leaf(struct eviction *eviction, struct table *table, uint64_t tick) {
    while (eviction->count || advance(eviction, table, tick)) {
        struct leaf leaf = eviction->heap[0];
        eviction->heap[0] = eviction->heap[--eviction->count];
        sink(eviction->heap, eviction->count, 0, false);
        table->rows[leaf.row].queued = 0;
        /* One that was used meanwhile has moved beyond the horizon. */
        if (leaf_last_use(&table->rows[leaf.row]) == leaf.last_use) return leaf.row;
    }
    return 0;
}

const char *check_eviction(const struct eviction *eviction, const struct table *table) {
    uint32_t queued = 0;
    for (uint32_t i = 0; i < eviction->count; i++) {
        if (!table->rows[eviction->heap[i].row].queued) return "a leaf that is queued does not know it";
        if (i && eviction->heap[i].last_use < eviction->heap[(i - 1) / 2].last_use)
            return "leaves are out of order";
    }
    for (uint32_t number = 1; number < table->used; number++) {
        uint64_t last_use = leaf_last_use(&table->rows[number]);
        queued += table->rows[number].queued;
        if (!last_use || last_use > eviction->horizon) continue;
        for (uint32_t i = 0;; i++) {
            if (i == eviction->count) return "an old leaf will never be suggested";
            if (eviction->heap[i].row == number && eviction->heap[i].last_use == last_use) break;
        }
    }
    return queued == eviction->count ? NULL : "a row is queued and not in the queue";
}
