/* Declarations that the C helper and, through cffi, library.py share: one text, so that both agree on
 * layouts. No preprocessor lines: cffi reads this file as it is. The includer provides <stdint.h> and
 * <stddef.h>. */

/* ---- The part of the UCX API that we use. Its structs grow only at the end, under a field mask: this holds
 *      for libucp 1.13 to 1.23. */

typedef signed char ucs_status_t;
typedef void *ucs_status_ptr_t; /* NULL: done at once; top of the address space: an error; else a request */
typedef void *ucp_context_h;
typedef void *ucp_worker_h;
typedef void *ucp_ep_h;
typedef void *ucp_mem_h;
typedef void *ucp_rkey_h;
typedef void *ucp_config_t;

typedef void (*ucp_send_nbx_callback_t)(void *request, ucs_status_t status, void *user_data);
typedef void (*ucp_err_handler_cb_t)(void *arg, ucp_ep_h ep, ucs_status_t status);

typedef struct {
    uint64_t field_mask;
    uint64_t features;
    size_t request_size;
    void *request_init;
    void *request_cleanup;
    uint64_t tag_sender_mask;
    int mt_workers_shared;
    size_t estimated_num_eps;
    size_t estimated_num_ppn;
    const char *name;
    size_t node_local_id;
} ucp_params_t;

typedef struct {
    uint64_t field_mask;
    size_t request_size;
    int thread_mode;
    uint64_t memory_types;
    char name[32];
    size_t device_counter_size;
} ucp_context_attr_t;

typedef struct {
    uint64_t field_mask;
    int thread_mode;
    uint64_t cpu_mask[16];
    unsigned events;
    void *user_data;
    int event_fd;
    uint64_t flags;
    const char *name;
    size_t am_alignment;
    uint64_t client_id;
} ucp_worker_params_t;

typedef struct {
    uint64_t field_mask;
    int thread_mode;
    uint32_t address_flags;
    void *address;
    size_t address_length;
    size_t max_am_header;
    char name[32];
    size_t max_debug_string;
} ucp_worker_attr_t;

typedef struct {
    const void *addr;
    uint32_t addrlen;
} ucs_sock_addr_t;

typedef struct {
    ucp_err_handler_cb_t cb;
    void *arg;
} ucp_err_handler_t;

typedef struct {
    uint64_t field_mask;
    const void *address;
    int err_mode;
    ucp_err_handler_t err_handler;
    void *user_data;
    unsigned flags;
    ucs_sock_addr_t sockaddr;
    void *conn_request;
    const char *name;
    ucs_sock_addr_t local_sockaddr;
} ucp_ep_params_t;

typedef struct {
    uint64_t field_mask;
    void *address;
    size_t length;
    unsigned flags;
    unsigned prot;
    int memory_type;
    const void *exported_memh_buffer;
} ucp_mem_map_params_t;

typedef struct {
    uint32_t op_attr_mask;
    uint32_t flags;
    void *request;
    ucp_send_nbx_callback_t cb;
    uint64_t datatype;
    void *user_data;
    void *reply_buffer;
    int memory_type;
    void *recv_info;
    ucp_mem_h memh;
} ucp_request_param_t;

typedef struct {
    void *buffer;
    size_t length;
} ucp_dt_iov_t;

typedef struct {
    const char *transport_name;
    const char *device_name;
} ucp_transport_entry_t;

typedef struct {
    ucp_transport_entry_t *entries;
    unsigned num_entries;
    size_t entry_size;
} ucp_transports_t;

typedef struct {
    uint64_t field_mask;
    char name[32];
    uint64_t local_sockaddr[16]; /* struct sockaddr_storage */
    uint64_t remote_sockaddr[16];
    ucp_transports_t transports;
    void *user_data;
} ucp_ep_attr_t;

void ucp_get_version(unsigned *major, unsigned *minor, unsigned *release);
const char *ucs_status_string(ucs_status_t status);
ucs_status_t ucp_config_read(const char *env_prefix, const char *filename, ucp_config_t *config);
ucs_status_t ucp_config_modify(ucp_config_t config, const char *name, const char *value);
void ucp_config_release(ucp_config_t config);
ucs_status_t ucp_init_version(unsigned major, unsigned minor, const ucp_params_t *params, ucp_config_t config,
                              ucp_context_h *context);
ucs_status_t ucp_context_query(ucp_context_h context, ucp_context_attr_t *attributes);
void ucp_cleanup(ucp_context_h context);
ucs_status_t ucp_mem_map(ucp_context_h context, const ucp_mem_map_params_t *params, ucp_mem_h *memory);
ucs_status_t ucp_mem_unmap(ucp_context_h context, ucp_mem_h memory);
ucs_status_t ucp_rkey_pack(ucp_context_h context, ucp_mem_h memory, void **buffer, size_t *length);
void ucp_rkey_buffer_release(void *buffer);
ucs_status_t ucp_worker_create(ucp_context_h context, const ucp_worker_params_t *params,
                               ucp_worker_h *worker);
void ucp_worker_destroy(ucp_worker_h worker);
ucs_status_t ucp_worker_query(ucp_worker_h worker, ucp_worker_attr_t *attributes);
void ucp_worker_release_address(ucp_worker_h worker, void *address);
unsigned ucp_worker_progress(ucp_worker_h worker);
ucs_status_t ucp_worker_get_efd(ucp_worker_h worker, int *fd);
ucs_status_t ucp_worker_arm(ucp_worker_h worker);
ucs_status_t ucp_ep_create(ucp_worker_h worker, const ucp_ep_params_t *params, ucp_ep_h *ep);
ucs_status_t ucp_ep_query(ucp_ep_h ep, ucp_ep_attr_t *attributes);
ucs_status_ptr_t ucp_ep_close_nbx(ucp_ep_h ep, const ucp_request_param_t *param);
ucs_status_ptr_t ucp_ep_flush_nbx(ucp_ep_h ep, const ucp_request_param_t *param);
ucs_status_t ucp_ep_rkey_unpack(ucp_ep_h ep, const void *buffer, ucp_rkey_h *rkey);
void ucp_rkey_destroy(ucp_rkey_h rkey);
ucs_status_ptr_t ucp_put_nbx(ucp_ep_h ep, const void *buffer, size_t count, uint64_t remote, ucp_rkey_h rkey,
                             const ucp_request_param_t *param);
ucs_status_ptr_t ucp_get_nbx(ucp_ep_h ep, void *buffer, size_t count, uint64_t remote, ucp_rkey_h rkey,
                             const ucp_request_param_t *param);
ucs_status_t ucp_request_check_status(void *request);
void ucp_request_free(void *request);

/* ---- Ours. */

enum { POLAR_ABI = 5 }; /* of this file: raised with its every change */

/* Entry points of the libucp that Python loaded: the helper is built without UCX and linked to none. */
typedef struct {
    ucs_status_ptr_t (*put)(ucp_ep_h, const void *, size_t, uint64_t, ucp_rkey_h,
                            const ucp_request_param_t *);
    ucs_status_ptr_t (*get)(ucp_ep_h, void *, size_t, uint64_t, ucp_rkey_h, const ucp_request_param_t *);
    ucs_status_ptr_t (*flush)(ucp_ep_h, const ucp_request_param_t *);
    ucs_status_ptr_t (*close)(ucp_ep_h, const ucp_request_param_t *);
    unsigned (*progress)(ucp_worker_h);
    ucs_status_t (*arm)(ucp_worker_h);
    ucs_status_t (*request_status)(void *);
    void (*request_free)(void *);
} polar_ucp;

typedef struct polar_endpoint {
    ucp_ep_h handle;     /* NULL once closed */
    ucs_status_t status; /* why it can no longer be used; the first reason stays */
    struct polar_endpoint *next;
} polar_endpoint;

typedef struct {
    const polar_ucp *ucp;
    ucp_worker_h handle;
    int event_fd;              /* readable when progress may have work to do */
    polar_endpoint *endpoints; /* a list of those that are not closed */
} polar_worker;

typedef struct {
    ucp_mem_h handle;
    uint64_t address;
    uint64_t length;
} polar_memory;

/* A way to one memory of a peer: through an endpoint, or mapped where the peer shares it with us. */
typedef struct {
    polar_endpoint *endpoint; /* NULL: mapped */
    ucp_rkey_h key;           /* unpacked on the endpoint */
    uint64_t mapping;         /* where [remote, remote + length) of the peer is mapped here */
    uint64_t remote;
    uint64_t length;
} polar_route;

typedef uint64_t (*polar_hash)(const void *input, size_t length);

/* Blocks to read or write. Each is contiguous in the peer; here it is cut into pieces of one length, each of
 * them inside one of the memories. */
typedef struct {
    const uint32_t *route;  /* [block_count] index into routes */
    const uint64_t *remote; /* [block_count] address in the peer */
    const uint64_t *local;  /* [block_count][pieces] address */
    uint32_t block_count;
    uint32_t pieces;
    uint64_t piece_bytes;
    const polar_route *routes;
    uint32_t route_count;
    polar_memory **memories;
    uint32_t memory_count;
    int put;
    polar_hash hash;          /* NULL: no checksums, and local memory that the processor cannot read may be used */
    uint64_t *digests;        /* [block_count][chunks of a block], of the blocks that are done; NULL: unwanted */
    uint32_t window;          /* most operations in flight on one route */
    uint32_t entries;         /* most local ranges that one operation may name */
    uint64_t entry_bytes;     /* most bytes of a range that shares an operation with others */
    uint64_t operation_bytes; /* most bytes that one operation may move */
    int64_t timeout_ns;       /* of the transfer */
    int64_t drain_ns;         /* then at most this long until nothing touches local memory any more */
} polar_batch;

typedef struct {
    uint64_t done_bytes;
    uint32_t failed;     /* blocks */
    uint32_t block;      /* the one that is refused */
    uint32_t piece;      /* with POLAR_BAD_LOCAL: the piece of it */
    uint64_t operations; /* that UCX was to carry out */
} polar_outcome;

enum {
    POLAR_DONE = 0, /* statuses and checksums are filled in, some statuses may be errors */
    /* Nothing was issued: */
    POLAR_NO_MEMORY = 1,
    POLAR_BAD_ROUTE = 2,  /* a block names a route that is not there */
    POLAR_BAD_REMOTE = 3, /* a block lies outside its mapping */
    POLAR_BAD_LOCAL = 4,  /* a piece lies outside every memory */
    /* UCX may still touch local memory; the worker must not be used again: */
    POLAR_UNDRAINED = 5,
    /* Of a look-up: some block is in no directory, and nothing was read: */
    POLAR_NOT_THERE = 6,
    /* Of a publication: nothing was written, for want of slots, or of room in the ring, or of the node: */
    POLAR_NO_SLOTS = 7,
    POLAR_GONE = 8,
};

/* One peer of an exchange: a request, of a put with its blocks behind it, and the reply, of a get likewise. */
typedef struct {
    int fd;
    const uint8_t *request; /* a frame with its header */
    uint64_t request_bytes;
    const uint64_t *local; /* [block_count][pieces] address */
    uint32_t block_count;
    const uint64_t *expected; /* of a put: checksums that the blocks must have; NULL: any */
    uint64_t *checksums;      /* [block_count] of what was moved; of a put, one byte each follows: as expected */
    uint8_t *reply;           /* a frame without its header */
    uint64_t reply_capacity;
    uint64_t reply_bytes;
    uint32_t arrived; /* leading blocks of a get */
    int error;        /* an errno: ETIMEDOUT, EBADMSG: not an answer, or the socket's */
} polar_channel;

typedef struct {
    polar_channel *channels;
    uint32_t channel_count;
    uint32_t pieces;
    uint64_t piece_bytes;
    int put;
    int near; /* all peers are on this host */
    polar_hash hash;
    int64_t timeout_ns;
} polar_exchange_batch;

/* A directory and a slab of a node on this host, as they are mapped here. */
typedef struct {
    uint64_t entries; /* address; see directory.h */
    uint64_t entry_count;
    polar_route slab;
    uint64_t ring;   /* address; see ring.h; 0: there is none */
    uint64_t noted;  /* notices in the ring that the node is not told of yet */
    uint32_t untold; /* blocks of the last look-up whose reading it was not told of: the ring had no room */
} polar_directory;

/* Blocks to read from nodes on this host without asking them. */
typedef struct {
    polar_directory **directories;
    uint32_t directory_count;
    const uint32_t *directory; /* [block_count] which of them; NULL: the first */
    const uint8_t *keys;       /* [block_count] of 16 bytes */
    const uint64_t *local;     /* [block_count][pieces] address */
    uint32_t block_count;
    uint32_t pieces;
    uint64_t piece_bytes;
    polar_hash hash;
    uint8_t *states;       /* [block_count] what became of each */
    uint64_t *generations; /* [block_count] of what was read */
    int64_t timeout_ns;
} polar_lookup;

/* Slots in a node on this host that may be written to without asking, for blocks of one length. */
typedef struct {
    polar_directory *directory;
    int fd; /* of the connection to the node, which has to stand */
    const uint64_t *addresses; /* [count] in the node */
    uint32_t count;
    uint32_t taken; /* of them, the first ones */
} polar_granted;

/* Blocks to write there. */
typedef struct {
    polar_granted *granted;
    const uint8_t *keys;   /* [block_count] of 16 bytes */
    const uint8_t *parents;
    const uint64_t *local; /* [block_count][pieces] address */
    uint32_t block_count;
    uint32_t pieces;
    uint64_t piece_bytes;
    polar_hash hash;
    const uint64_t *expected; /* [block_count] checksums that the blocks must have; NULL: any */
    uint8_t *states;          /* [block_count] what became of each */
    int64_t timeout_ns;
} polar_publication;

enum {
    POLAR_NOT_WRITTEN = 0, /* time is over, or it has another checksum than expected */
    POLAR_WRITTEN = 1,
    POLAR_WAS_THERE = 2,
};

enum {
    POLAR_UNKNOWN = 0, /* it was there and is not any more, or time is over: the node has to be asked */
    POLAR_READ = 1,
    POLAR_WRONG = 2, /* it is not what was written */
};

int polar_abi(void); /* POLAR_ABI of the file that the helper was built of */
int polar_transfer(const polar_worker *worker, const polar_batch *batch, ucs_status_t *statuses,
                   uint64_t *checksums, polar_outcome *outcome);
int polar_close(const polar_worker *worker, polar_endpoint *endpoint, int force, int64_t timeout_ns);
int polar_wait(const polar_worker *worker, const int *fds, uint32_t fd_count, int64_t timeout_ns);
int polar_checksums(polar_hash hash, const uint64_t *local, uint32_t block_count, uint32_t pieces,
                    uint64_t piece_bytes, uint64_t *checksums);
int polar_look_up(const polar_lookup *lookup);         /* POLAR_DONE, or _NO_MEMORY, or _NOT_THERE */
int polar_publish(const polar_publication *publication); /* POLAR_DONE, or _NO_MEMORY, _NO_SLOTS or _GONE */
int polar_exchange(const polar_exchange_batch *batch); /* POLAR_DONE or POLAR_NO_MEMORY */
void polar_endpoint_failed(void *worker, ucp_ep_h handle, ucs_status_t status);
void polar_add_endpoint(polar_worker *worker, polar_endpoint *endpoint);
void polar_remove_endpoint(polar_worker *worker, const polar_endpoint *endpoint);
