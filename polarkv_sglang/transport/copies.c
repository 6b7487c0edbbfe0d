/* One core does not use up a host's memory bandwidth, hashing beside it even less: so many bytes are copied by two
 * threads. */

#include <signal.h>

#include "copies.h"

enum {
    BURST = 256 * 1024,     /* bytes between two looks at the clock; a multiple of a checksum's chunk */
    HELPED_BYTES = 16 << 20, /* from so many on a second thread is worth its start */
    STACK_BYTES = 256 * 1024,
};

static uint64_t bursts_a_block(const struct copies *copies) {
    return (copies->pieces * copies->piece_bytes + BURST - 1) / BURST;
}

static uint64_t bursts(const struct copies *copies) {
    return copies->count * bursts_a_block(copies);
}

struct block copied_block(const struct copies *copies, uint32_t number) {
    uint64_t length = copies->pieces * copies->piece_bytes;
    return (struct block){
        .hash = copies->hash,
        .pieces = &copies->local[(size_t)number * copies->pieces],
        .piece_bytes = copies->piece_bytes,
        .length = length,
        .digests = &copies->digests[number * chunk_count(length)],
    };
}

bool copies_left(const struct copies *copies) {
    return __atomic_load_n(&copies->taken, __ATOMIC_RELAXED) < bursts(copies);
}

void copy_burst(struct copies *copies) {
    uint64_t burst = __atomic_fetch_add(&copies->taken, 1, __ATOMIC_RELAXED);
    if (burst >= bursts(copies)) return;
    uint32_t number = copies->listed[burst / bursts_a_block(copies)];
    uint8_t *shared = (uint8_t *)(uintptr_t)copies->shared[number];
    struct block block = copied_block(copies, number);
    uint64_t from = burst % bursts_a_block(copies) * BURST, to = from + BURST;
    if (to > block.length) to = block.length;
    if (copies->put)
        write_shared(&block, shared, from, to);
    else
        read_shared(&block, shared, from, to);
    __atomic_fetch_add(&copies->copied[number], to - from, __ATOMIC_RELAXED);
}

static void *help(void *arg) {
    struct copies *copies = arg;
    while (copies_left(copies) && now_ns() < copies->deadline_ns) copy_burst(copies);
    drain_stores();
    return NULL;
}

void begin_copies(struct copies *copies) {
    static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    pthread_attr_t attributes;
    sigset_t all, before;
    if (copies->piece_bytes * copies->pieces * copies->count < HELPED_BYTES) return;
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* Signals are for the process's own threads, but for those that are about what this one does. */
    sigfillset(&all);
    for (size_t i = 0; i < sizeof(own) / sizeof(*own); i++) sigdelset(&all, own[i]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    copies->helped = pthread_create(&copies->helper, &attributes, help, copies) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

void stop_copies(struct copies *copies) {
    __atomic_store_n(&copies->taken, bursts(copies), __ATOMIC_RELAXED);
}

void finish_copies(struct copies *copies) {
    drain_stores();
    if (copies->helped) pthread_join(copies->helper, NULL);
    copies->helped = false;
}
