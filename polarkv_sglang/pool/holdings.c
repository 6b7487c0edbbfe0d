/* Reservations and leases: rows that a client holds, by a number. */

#include <stdlib.h>

#include "index.h"

/* A number is a serial one and, below it, the place where the holding is looked for. */
enum { PLACE_BITS = 23, FIRST_CAPACITY = 64 };

void holdings_close(struct holdings *holdings) {
    for (uint32_t place = 0; place < holdings->used; place++) free(holdings->places[place]);
    free(holdings->places);
    free(holdings->free);
}

static bool grow(struct holdings *holdings) {
    uint32_t capacity = holdings->capacity ? 2 * holdings->capacity : FIRST_CAPACITY, *free;
    struct holding **places;
    if (capacity > 1u << PLACE_BITS) return false;
    places = realloc(holdings->places, capacity * sizeof(*places));
    if (!places) return false;
    holdings->places = places;
    free = realloc(holdings->free, capacity * sizeof(*free));
    if (!free) return false;
    holdings->free = free;
    holdings->capacity = capacity;
    return true;
}

struct holding *new_holding(struct holdings *holdings, uint64_t owner, uint32_t count) {
    struct holding *holding = malloc(sizeof(*holding) + count * sizeof(uint32_t));
    uint32_t place;
    if (!holding) return NULL;
    if (!holdings->free_count && holdings->used == holdings->capacity && !grow(holdings)) {
        free(holding);
        return NULL;
    }
    place = holdings->free_count ? holdings->free[--holdings->free_count] : holdings->used++;
    *holding = (struct holding){
        .number = ++holdings->serial << PLACE_BITS | place,
        .owner = owner,
        .count = count,
    };
    holdings->places[place] = holding;
    holdings->count++;
    return holding;
}

/* NULL if it is over, or another's. */
struct holding *find_holding(const struct holdings *holdings, uint64_t owner, uint64_t number) {
    uint64_t place = number & ((1u << PLACE_BITS) - 1);
    struct holding *holding = place < holdings->used ? holdings->places[place] : NULL;
    return holding && holding->number == number && holding->owner == owner ? holding : NULL;
}

void set_deadline(struct holdings *holdings, struct holding *holding, int64_t deadline_ns) {
    holding->deadline_ns = deadline_ns;
    if (deadline_ns < holdings->earliest_ns) holdings->earliest_ns = deadline_ns;
}

void end_holding(struct holdings *holdings, struct holding *holding) {
    uint32_t place = holding->number & ((1u << PLACE_BITS) - 1);
    holdings->places[place] = NULL;
    holdings->free[holdings->free_count++] = place;
    holdings->count--;
    free(holding);
}
