/* What a memory node on this host has told of its blocks, as it is read here. */

#ifndef POLAR_LOOKUP_H
#define POLAR_LOOKUP_H

#include "blocks.h"
#include "directory.h"
#include "ring.h"

enum { KEY_BYTES = 16 };

#pragma GCC visibility push(hidden)

/* The entry of a key of 16 bytes, as it was when nobody was writing it; without a generation if there is none. */
struct entry find_entry(const polar_directory *directory, const uint8_t *key);

/* Where `length` bytes at an address of the node are mapped here; 0: they are not. */
uint64_t slab_at(const polar_directory *directory, uint64_t address, uint64_t length);

/* Whether the node has been told that the block is written, and has not heard it yet. */
bool was_told(const polar_directory *directory, const uint8_t *key);

/* Puts a notice into the ring, which has room for it. The node hears of all at once, by `tell`. */
void note(polar_directory *directory, struct notice notice, const uint8_t *key);
void tell(polar_directory *directory);

#pragma GCC visibility pop

#endif
