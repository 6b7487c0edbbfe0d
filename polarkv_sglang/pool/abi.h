/* Declarations that the memory node's C files and, through cffi, native.py share: one text, so that both agree
 * on layouts. No preprocessor lines: cffi reads this file as it is. The includer provides <stdint.h>. */

enum { POLAR_ABI = 5 }; /* of this file: raised with its every change */

/* As in transport/messages.py. */
enum { POLAR_MAX_KEYS = 8192, POLAR_MAX_PULL_PARTS = 64, POLAR_MAX_PULL_RUNS = 1 << 14 };

/* What became of a key that was to be reserved: transport/messages.py, KeyState. */
enum { POLAR_RESERVED = 0, POLAR_PRESENT = 1, POLAR_NO_ROOM = 2, POLAR_BUSY = 3 };

enum { POLAR_MOST_GRANTED = 256 }; /* slots that one client has ahead */

typedef struct polar_index polar_index;

typedef struct {
    uint64_t base; /* address of the slab */
    uint64_t capacity_bytes;
    uint64_t segment_bytes;
    int64_t reservation_ns;
    int64_t longest_lease_ns;
    uint64_t most_leased_rows; /* that the leases of one owner have in all; a lease counts as some */
    uint64_t most_held_bytes;  /* that leases may keep when a request that only waits asks for one more */
    uint64_t most_granted_bytes; /* that one client has ahead */
    uint64_t most_granted_in_all_bytes;
    uint32_t eviction_batch;   /* leaves that are put in order at a time */
    uint64_t directory;        /* address; see transport/directory.h */
    uint64_t directory_entries; /* a multiple of 4; 0: there is none */
} polar_index_settings;

typedef struct {
    uint64_t capacity_bytes;
    uint64_t used_bytes;
    uint64_t granted_bytes;
    uint64_t blocks;
    uint64_t reservations;
    uint64_t leases;
    uint64_t leased_bytes;
    uint64_t quarantined_blocks;
    uint64_t hits;
    uint64_t misses;
    uint64_t commits;
    uint64_t late_commits;
    uint64_t evictions;
    uint64_t corrupt;
    uint64_t expired_leases;
    uint64_t expired_reservations;
    uint64_t no_room;  /* keys */
    uint64_t too_long; /* keys */
    uint64_t longest;  /* bytes of the longest block that was too long */
    uint64_t sent_blocks;
    uint64_t sent_bytes;
} polar_index_statistics;

/* Columns with one number per key; 0 for a miss. */
typedef struct {
    uint64_t *addresses;
    uint64_t *lengths;
    uint64_t *checksums;
    uint64_t *generations;
} polar_places;

/* Blocks of one length, or the same parts of each, on their way through a connection. */
typedef struct {
    int fd;
    const uint8_t *head; /* goes before the blocks that are sent */
    uint64_t head_bytes;
    const uint64_t *blocks; /* [block_count] address; 0: what is received of it is dropped */
    uint32_t block_count;
    const uint64_t *parts; /* [part_count][2] where in a block it begins, and its bytes, at least 1 */
    uint32_t part_count;
    uint8_t *tail; /* comes behind the blocks that are received */
    uint64_t tail_bytes;
    int64_t timeout_ns; /* below 0: none */
    int64_t spin_ns;    /* bytes are waited for so long without sleep, each time */
} polar_delivery;

/* A client's connection that streams. */
typedef struct {
    polar_index *index;
    uint64_t owner; /* of leases and reservations */
    int fd;
    int near; /* the client is on this host */
    uint64_t most_frame_bytes;
    uint8_t *frame; /* the last that came; valid until the next call */
    uint64_t frame_bytes;
    uint64_t frame_capacity;
    uint64_t *columns; /* room for the numbers of a request */
    uint8_t *reply;
} polar_stream;

int polar_abi(void); /* POLAR_ABI of the file that the helper was built of */

/* The index. Keys lie end to end, 16 bytes each. `now_ns`: CLOCK_MONOTONIC. What a function returns or fills in
 * is described in index.py, under the same name. */
polar_index *polar_index_new(const polar_index_settings *settings); /* NULL: there is no memory for it */
void polar_index_free(polar_index *index);
uint64_t polar_reserve(polar_index *index, uint64_t owner, const uint8_t *keys, const uint8_t *parents,
                       uint32_t count, uint64_t length, int fill, int64_t now_ns, uint64_t *addresses,
                       uint8_t *states);
int64_t polar_commit(polar_index *index, uint64_t owner, uint64_t number, const uint8_t *mask,
                     const uint64_t *checksums, uint32_t count); /* below 0: of how many blocks it is, negated */
uint32_t polar_fill(polar_index *index, uint64_t owner, uint64_t number, int64_t now_ns, uint64_t *addresses,
                    uint64_t *length, int64_t *left_ns); /* how many; 0: it is over */
void polar_give_up(polar_index *index, uint64_t owner, uint64_t number, int64_t now_ns);
uint64_t polar_locate(polar_index *index, uint64_t owner, const uint8_t *keys, uint32_t count, int64_t lease_ns,
                      int counted, int64_t now_ns, const polar_places *places);
uint64_t polar_hold(polar_index *index, uint64_t owner, const uint8_t *keys, uint32_t count, int64_t lease_ns,
                    int64_t now_ns, uint8_t *present);
void polar_use(polar_index *index, const uint8_t *keys, uint32_t count);
int polar_renew(polar_index *index, uint64_t owner, uint64_t number, int64_t lease_ns, int64_t now_ns);
void polar_release(polar_index *index, uint64_t owner, uint64_t number);
void polar_end_holds(polar_index *index, uint64_t owner);
void polar_report_corrupt(polar_index *index, const uint8_t *keys, const uint64_t *generations, uint32_t count);
void polar_peek(polar_index *index, const uint8_t *keys, uint32_t count, uint8_t *present);
void polar_describe(polar_index *index, const uint8_t *keys, uint32_t count, uint8_t *parents, uint64_t *lengths);
void polar_expire(polar_index *index, int64_t now_ns);
void polar_statistics(polar_index *index, polar_index_statistics *statistics);
int polar_open_ring(polar_index *index, uint64_t owner, uint64_t ring); /* an address; 0: no memory for it */
void polar_close_ring(polar_index *index, uint64_t owner);
uint32_t polar_grant(polar_index *index, uint64_t owner, uint64_t length, uint32_t count, int64_t now_ns,
                     uint64_t *addresses); /* how many */
const char *polar_check(polar_index *index); /* what does not agree, or NULL; for tests: takes O(n) */

int polar_send(const polar_delivery *delivery); /* 0, or an errno: ETIMEDOUT, or the socket's */
int polar_receive(const polar_delivery *delivery);

polar_stream *polar_stream_new(polar_index *index, uint64_t owner, int fd, int near, uint64_t most_frame_bytes);
void polar_stream_free(polar_stream *stream);
int polar_serve(polar_stream *stream); /* 0: its frame is for others to answer; else an errno */
