/* Slots of a slab. A segment serves one slot size until its last slot is free; then it may serve another. So
 * blocks of different lengths share the memory without a compactor, which one-sided readers could not bear. */

#include <stdlib.h>

#include "index.h"

#define NONE UINT32_MAX /* no slot */

uint64_t slot_bytes_of(uint64_t length) {
    return (length + SLOT_BYTES - 1) / SLOT_BYTES * SLOT_BYTES;
}

bool slab_open(struct slab *slab, uint64_t base, uint64_t capacity_bytes, uint64_t segment_bytes) {
    uint64_t count = capacity_bytes / segment_bytes;
    if (count > UINT32_MAX) return false;
    slab->base = base;
    slab->segment_bytes = segment_bytes;
    slab->capacity_bytes = count * segment_bytes;
    slab->segment_count = (uint32_t)count;
    slab->segments = calloc(count, sizeof(*slab->segments));
    slab->classes = calloc(count, sizeof(*slab->classes));
    if (!slab->segments || !slab->classes) return false;
    while (count--) {
        slab->segments[count].free = NONE;
        slab->segments[count].next = slab->unassigned;
        slab->unassigned = &slab->segments[count];
    }
    return true;
}

void slab_close(struct slab *slab) {
    for (uint32_t i = 0; slab->segments && i < slab->segment_count; i++) free(slab->segments[i].links);
    free(slab->segments);
    free(slab->classes);
}

bool fits(const struct slab *slab, uint64_t length) {
    return length <= slab->segment_bytes;
}

static struct size_class *class_of(const struct slab *slab, uint64_t slot_bytes) {
    for (uint32_t i = 0; i < slab->class_count; i++)
        if (slab->classes[i].slot_bytes == slot_bytes) return &slab->classes[i];
    return NULL;
}

bool has_room(const struct slab *slab, uint64_t length) {
    return fits(slab, length) && (slab->unassigned || class_of(slab, slot_bytes_of(length)));
}

/* The segment has slots in use and free ones. */
static void list(struct slab *slab, struct segment *segment) {
    struct size_class *class = class_of(slab, segment->slot_bytes);
    if (segment->listed) return;
    if (!class) {
        class = &slab->classes[slab->class_count++];
        *class = (struct size_class){.slot_bytes = segment->slot_bytes};
    }
    segment->before = NULL;
    segment->next = class->partial;
    if (segment->next) segment->next->before = segment;
    class->partial = segment;
    segment->listed = true;
}

static void unlist(struct slab *slab, struct segment *segment) {
    struct size_class *class = class_of(slab, segment->slot_bytes);
    if (!segment->listed) return;
    if (segment->next) segment->next->before = segment->before;
    if (segment->before)
        segment->before->next = segment->next;
    else
        class->partial = segment->next;
    segment->listed = false;
    if (!class->partial) *class = slab->classes[--slab->class_count];
}

/* A segment with a free slot; NULL if there is none. */
static struct segment *segment_for(struct slab *slab, uint64_t slot_bytes) {
    struct size_class *class = class_of(slab, slot_bytes);
    struct segment *segment = slab->unassigned;
    if (class) return class->partial;
    if (!segment) return NULL;
    segment->links = malloc(slab->segment_bytes / slot_bytes * sizeof(*segment->links));
    if (!segment->links) return NULL;
    slab->unassigned = segment->next;
    segment->slot_bytes = slot_bytes;
    segment->used = 0;
    segment->free = NONE;
    list(slab, segment);
    return segment;
}

static uint64_t address_of(const struct slab *slab, const struct segment *segment, uint32_t slot) {
    return slab->base + (uint64_t)(segment - slab->segments) * slab->segment_bytes + slot * segment->slot_bytes;
}

uint64_t allocate_slot(struct slab *slab, uint64_t length, uint32_t row) {
    uint64_t slot_bytes = slot_bytes_of(length);
    struct segment *segment = fits(slab, length) ? segment_for(slab, slot_bytes) : NULL;
    uint32_t slot;
    if (!segment) return 0;
    slot = segment->free;
    if (slot == NONE)
        slot = segment->used++;
    else
        segment->free = segment->links[slot];
    segment->links[slot] = row;
    if (++segment->in_use == slab->segment_bytes / slot_bytes) unlist(slab, segment);
    slab->used_bytes += slot_bytes;
    return address_of(slab, segment, slot);
}

uint32_t row_in(const struct slab *slab, const struct table *table, const struct segment *segment, uint32_t slot) {
    uint32_t row = segment->links[slot];
    return row < table->used && table->rows[row].address == address_of(slab, segment, slot) ? row : 0;
}

void free_slot(struct slab *slab, uint64_t address) {
    uint64_t offset = address - slab->base;
    struct segment *segment = &slab->segments[offset / slab->segment_bytes];
    uint32_t slot = (uint32_t)(offset % slab->segment_bytes / segment->slot_bytes);
    slab->used_bytes -= segment->slot_bytes;
    segment->links[slot] = segment->free;
    segment->free = slot;
    if (--segment->in_use) {
        list(slab, segment);
        return;
    }
    unlist(slab, segment);
    free(segment->links);
    segment->links = NULL;
    segment->slot_bytes = 0;
    segment->next = slab->unassigned;
    slab->unassigned = segment;
}

static const char *check_segment(const struct slab *slab, const struct segment *segment) {
    uint64_t slots = segment->slot_bytes ? slab->segment_bytes / segment->slot_bytes : 0;
    uint32_t free = 0;
    for (uint32_t slot = segment->free; slots && slot != NONE; slot = segment->links[slot])
        if (slot >= segment->used || ++free > segment->used) return "a free slot is listed twice or was never used";
    if (slots && segment->in_use + free != segment->used) return "slots are miscounted";
    if (segment->listed != (segment->in_use && segment->in_use < slots)) return "a segment is listed wrongly";
    return NULL;
}

const char *check_slab(const struct slab *slab, const struct table *table) {
    uint64_t used_bytes = 0, block_bytes = 0;
    uint32_t unassigned = 0, empty = 0, listed = 0, partial = 0;
    for (uint32_t i = 0; i < slab->segment_count; i++) {
        const struct segment *segment = &slab->segments[i];
        const char *wrong = check_segment(slab, segment);
        if (wrong) return wrong;
        used_bytes += segment->slot_bytes * segment->in_use;
        empty += !segment->in_use;
        listed += segment->listed;
    }
    for (const struct segment *segment = slab->unassigned; segment; segment = segment->next)
        if (segment->slot_bytes || ++unassigned > slab->segment_count) return "an empty segment is assigned";
    if (unassigned != empty) return "an empty segment is lost";
    for (uint32_t i = 0; i < slab->class_count; i++)
        for (const struct segment *segment = slab->classes[i].partial; segment; segment = segment->next)
            if (segment->slot_bytes != slab->classes[i].slot_bytes || ++partial > slab->segment_count)
                return "a segment is among those of another size";
    if (partial != listed) return "a segment with free slots is lost";
    /* As many bytes in blocks as in slots, and each block in a slot of its own size that knows it: then each has its
     * own. */
    for (uint32_t number = 1; number < table->used; number++) {
        const struct row *row = &table->rows[number];
        const struct segment *segment;
        uint64_t offset = row->address - slab->base, inside = offset % slab->segment_bytes;
        if (!row->address) continue;
        if (offset >= slab->capacity_bytes) return "a block lies outside the slab";
        segment = &slab->segments[offset / slab->segment_bytes];
        if (segment->slot_bytes != slot_bytes_of(row->length)) return "a block lies in a slot of another size";
        if (inside / segment->slot_bytes >= segment->used ||
            row_in(slab, table, segment, (uint32_t)(inside / segment->slot_bytes)) != number)
            return "a block lies in a slot that does not know it";
        block_bytes += segment->slot_bytes;
    }
    if (used_bytes != block_bytes) return "the slots in use are not those of the blocks";
    return slab->used_bytes != used_bytes || used_bytes > slab->capacity_bytes ? "used_bytes is wrong" : NULL;
}
