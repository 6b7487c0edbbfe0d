/* MessagePack, as much of it as the requests that serve.c answers and their replies need. */

#ifndef POLAR_WIRE_H
#define POLAR_WIRE_H

#include <stdbool.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "columns are little-endian on the wire, and are sent as they lie in memory"
#endif

#pragma GCC visibility push(hidden)

/* What is read is as it was asked for as long as `good` stays true. */
struct reader {
    const uint8_t *at, *end;
    bool good;
    uint32_t items; /* of the message, without its tag */
};

struct bytes {
    const uint8_t *start;
    uint64_t length;
};

struct reader begin_message(const uint8_t *start, uint64_t length);
struct bytes read_tag(struct reader *reader);
uint64_t read_number(struct reader *reader);
double read_real(struct reader *reader);
struct bytes read_bytes(struct reader *reader);

/* A frame that is written: its header is filled in by `end_frame`. The caller sees to it that there is room. */
struct writer {
    uint8_t *start, *at;
};

enum { FRAME_HEADER_BYTES = 4, MOST_ITEM_BYTES = 9 /* of a number, or before bytes */ };

struct writer begin_frame(uint8_t *start, uint32_t items, const char *tag);
void write_number(struct writer *writer, uint64_t value);
void write_truth(struct writer *writer, bool value);
void write_bytes(struct writer *writer, const void *bytes, uint64_t length);
uint64_t end_frame(struct writer *writer); /* bytes of it */

#pragma GCC visibility pop

#endif
