/* MessagePack, as much of it as the requests that serve.c answers and their replies need. */

#include "wire.h"

#include <string.h>

enum {
    FIXED_ARRAY = 0x90,
    FIXED_TEXT = 0xa0,
    FALSE = 0xc2,
    TRUE = 0xc3,
    BYTES_8 = 0xc4, /* and BYTES_16, BYTES_32 */
    REAL_64 = 0xcb,
    NUMBER_8 = 0xcc, /* and NUMBER_16, _32, _64 */
};

/* The next bytes; none if there are not as many. */
static const uint8_t *take(struct reader *reader, uint64_t length) {
    const uint8_t *start = reader->at;
    reader->good &= length <= (uint64_t)(reader->end - reader->at);
    if (!reader->good) return NULL;
    reader->at += length;
    return start;
}

static uint8_t take_kind(struct reader *reader) {
    const uint8_t *kind = take(reader, 1);
    return kind ? *kind : 0;
}

static uint64_t take_big_endian(struct reader *reader, uint32_t length) {
    const uint8_t *bytes = take(reader, length);
    uint64_t value = 0;
    for (uint32_t i = 0; bytes && i < length; i++) value = value << 8 | bytes[i];
    return value;
}

struct reader begin_message(const uint8_t *start, uint64_t length) {
    struct reader reader = {.at = start, .end = start + length, .good = true};
    uint8_t kind = take_kind(&reader);
    reader.good &= (kind & 0xf0) == FIXED_ARRAY && kind != FIXED_ARRAY;
    reader.items = (kind & 0x0f) - 1u;
    return reader;
}

struct bytes read_tag(struct reader *reader) {
    uint8_t kind = take_kind(reader);
    uint64_t length = kind & 0x1f;
    reader->good &= (kind & 0xe0) == FIXED_TEXT;
    return (struct bytes){take(reader, length), length};
}

uint64_t read_number(struct reader *reader) {
    uint8_t kind = take_kind(reader);
    if (kind < 0x80) return kind;
    reader->good &= kind >= NUMBER_8 && kind < NUMBER_8 + 4;
    return reader->good ? take_big_endian(reader, 1u << (kind - NUMBER_8)) : 0;
}

double read_real(struct reader *reader) {
    uint64_t bits;
    double value;
    reader->good &= take_kind(reader) == REAL_64;
    bits = take_big_endian(reader, sizeof(bits));
    memcpy(&value, &bits, sizeof(value));
    return value;
}

struct bytes read_bytes(struct reader *reader) {
    uint8_t kind = take_kind(reader);
    uint64_t length;
    reader->good &= kind >= BYTES_8 && kind < BYTES_8 + 3;
    if (!reader->good) return (struct bytes){0};
    length = take_big_endian(reader, 1u << (kind - BYTES_8));
    return (struct bytes){take(reader, length), length};
}

static void put(struct writer *writer, uint8_t kind, uint64_t value, uint32_t length) {
    *writer->at++ = kind;
    while (length--) *writer->at++ = (uint8_t)(value >> 8 * length);
}

struct writer begin_frame(uint8_t *start, uint32_t items, const char *tag) {
    struct writer writer = {start, start + FRAME_HEADER_BYTES};
    size_t length = strlen(tag);
    *writer.at++ = (uint8_t)(FIXED_ARRAY | (items + 1));
    *writer.at++ = (uint8_t)(FIXED_TEXT | length);
    memcpy(writer.at, tag, length);
    writer.at += length;
    return writer;
}

void write_number(struct writer *writer, uint64_t value) {
    if (value < 0x80)
        *writer->at++ = (uint8_t)value;
    else if (value >> 32)
        put(writer, NUMBER_8 + 3, value, 8);
    else if (value >> 16)
        put(writer, NUMBER_8 + 2, value, 4);
    else
        put(writer, NUMBER_8 + 1, value, 2);
}

void write_truth(struct writer *writer, bool value) {
    *writer->at++ = value ? TRUE : FALSE;
}

void write_bytes(struct writer *writer, const void *bytes, uint64_t length) {
    put(writer, BYTES_8 + 2, length, 4);
    if (length) memcpy(writer->at, bytes, length);
    writer->at += length;
}

uint64_t end_frame(struct writer *writer) {
    uint32_t length = (uint32_t)(writer->at - writer->start - FRAME_HEADER_BYTES);
    memcpy(writer->start, &length, sizeof(length));
    return FRAME_HEADER_BYTES + length;
}
