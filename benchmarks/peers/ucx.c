/* UCX as a contender, in C, polled the way ucx_perftest polls it.
 *
 * Usage: ucx allocated | ucx user      whether UCX allocates the buffer (which lets it share the
 * memory between processes) or registers memory that the process had. UCX_TLS picks transports.
 *
 * A write is ucp_put_nbx and a flush of the endpoint; pages are one put each and one flush. The
 * notification is an active message sent once the flush has ended, because a put carries none and
 * nothing orders an active message behind it. Blob of `setup`: buffer address, lengths of the
 * packed key and of the worker address (three little-endian u64), the key, the worker address.
 */
#include "endpoint.h"
#include <ucp/api/ucp.h>

enum { kNotification = 1, kHello = 2 };

static struct {
    bool user_memory;
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_mem_h memory;
    ucp_ep_h peer;
    ucp_rkey_h key;
    uint64_t remote_base;
    uint64_t arrivals, awaited, hellos;
} ucx;

static void check(ucs_status_t status, const char *what)
{
    if (status != UCS_OK)
        fail("%s: %s", what, ucs_status_string(status));
}

static ucs_status_t count_message(void *counter, const void *header, size_t header_bytes, void *data,
                                  size_t nbytes, const ucp_am_recv_param_t *param)
{
    (void)header, (void)header_bytes, (void)data, (void)nbytes, (void)param;
    ++*(uint64_t *)counter;
    return UCS_OK;
}

static void on_message(unsigned id, uint64_t *counter)
{
    ucp_am_handler_param_t handler = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                      UCP_AM_HANDLER_PARAM_FIELD_ARG,
        .id = id,
        .cb = count_message,
        .arg = counter,
    };
    check(ucp_worker_set_am_recv_handler(ucx.worker, &handler), "ucp_worker_set_am_recv_handler");
}

/* Progresses until `request` has ended; UCX returns null for what ended at once. */
static void finish(ucs_status_ptr_t request, const char *what)
{
    if (!request)
        return;
    if (UCS_PTR_IS_ERR(request))
        check(UCS_PTR_STATUS(request), what);
    struct patience patience = {0};
    ucs_status_t status;
    while ((status = ucp_request_check_status(request)) == UCS_INPROGRESS) {
        ucp_worker_progress(ucx.worker);
        wait_more(&patience, what);
    }
    ucp_request_free(request);
    check(status, what);
}

static void flush(void)
{
    ucp_request_param_t param = {0};
    finish(ucp_ep_flush_nbx(ucx.peer, &param), "ucp_ep_flush_nbx");
}

static inline void put(uint64_t local, uint64_t remote, uint64_t nbytes)
{
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_MEMH, .memh = ucx.memory};
    ucs_status_ptr_t request =
        ucp_put_nbx(ucx.peer, endpoint.buffer + local, nbytes, ucx.remote_base + remote, ucx.key, &param);
    if (!request)
        return;
    if (UCS_PTR_IS_ERR(request))
        check(UCS_PTR_STATUS(request), "ucp_put_nbx");
    ucp_request_free(request); /* freed once it ends; the flush waits for it */
}

static void message(unsigned id)
{
    ucp_request_param_t param = {0};
    finish(ucp_am_send_nbx(ucx.peer, id, NULL, 0, NULL, 0, &param), "ucp_am_send_nbx");
}

static const char *version(void)
{
    return ucp_get_version_string();
}

static void map_buffer(struct endpoint *self, size_t nbytes)
{
    ucp_mem_map_params_t param = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_FLAGS,
        .address = ucx.user_memory ? private_buffer(nbytes) : NULL,
        .length = nbytes,
        .flags = ucx.user_memory ? 0 : UCP_MEM_MAP_ALLOCATE,
    };
    check(ucp_mem_map(ucx.context, &param, &ucx.memory), "ucp_mem_map");
    ucp_mem_attr_t attr = {.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS};
    check(ucp_mem_query(ucx.memory, &attr), "ucp_mem_query");
    self->buffer = attr.address;
    memset(self->buffer, 0, nbytes);
}

static size_t setup(struct endpoint *self, uint8_t *blob, size_t capacity)
{
    ucp_params_t param = {.field_mask = UCP_PARAM_FIELD_FEATURES,
                          .features = UCP_FEATURE_RMA | UCP_FEATURE_AM};
    ucp_worker_params_t worker_param = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                        .thread_mode = UCS_THREAD_MODE_SINGLE};
    check(ucp_init(&param, NULL, &ucx.context), "ucp_init");
    check(ucp_worker_create(ucx.context, &worker_param, &ucx.worker), "ucp_worker_create");
    on_message(kNotification, &ucx.arrivals);
    on_message(kHello, &ucx.hellos);
    map_buffer(self, self->data_bytes + kMailBytes);

    void *key;
    size_t key_bytes, address_bytes;
    ucp_address_t *address;
    check(ucp_rkey_pack(ucx.context, ucx.memory, &key, &key_bytes), "ucp_rkey_pack");
    check(ucp_worker_get_address(ucx.worker, &address, &address_bytes), "ucp_worker_get_address");
    uint64_t head[3] = {(uint64_t)(uintptr_t)self->buffer, key_bytes, address_bytes};
    if (sizeof head + key_bytes + address_bytes > capacity)
        fail("the address and key take %zu bytes", key_bytes + address_bytes);
    memcpy(blob, head, sizeof head);
    memcpy(blob + sizeof head, key, key_bytes);
    memcpy(blob + sizeof head + key_bytes, address, address_bytes);
    ucp_rkey_buffer_release(key);
    ucp_worker_release_address(ucx.worker, address);
    return sizeof head + key_bytes + address_bytes;
}

/* The lanes of the endpoint as one word for the record, from lines of ucp_ep_print_info such as
 * "lane[0]:  3:posix/memory.0 md[2] ...": what stands between the second colon and " md[". */
static const char *lanes(void)
{
    static char word[512];
    char *text = NULL, *save = NULL;
    size_t nbytes = 0;
    FILE *stream = open_memstream(&text, &nbytes);
    ucp_ep_print_info(ucx.peer, stream);
    fclose(stream);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *lane = strstr(line, "lane["), *index = lane ? strchr(lane, ':') : NULL;
        char *device = index ? strchr(index + 1, ':') : NULL, *past = device ? strstr(device, " md[") : NULL;
        if (past)
            snprintf(word + strlen(word), sizeof word - strlen(word), "%s%.*s", *word ? "+" : "",
                     (int)(past - device - 1), device + 1);
    }
    free(text);
    return *word ? word : "-";
}

static const char *connect_peer(struct endpoint *self, const uint8_t *blob, size_t nbytes)
{
    (void)self;
    uint64_t head[3];
    memcpy(head, blob, sizeof head);
    if (nbytes != sizeof head + head[1] + head[2])
        fail("the peer's blob has %zu bytes", nbytes);
    ucx.remote_base = head[0];
    ucp_ep_params_t param = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS,
        .address = (const ucp_address_t *)(blob + sizeof head + head[1]),
    };
    check(ucp_ep_create(ucx.worker, &param, &ucx.peer), "ucp_ep_create");
    check(ucp_ep_rkey_unpack(ucx.peer, blob + sizeof head, &ucx.key), "ucp_ep_rkey_unpack");
    message(kHello);
    flush();
    struct patience patience = {0};
    while (!ucx.hellos) {
        ucp_worker_progress(ucx.worker);
        wait_more(&patience, "the peer's hello");
    }
    return lanes();
}

static void write_range(struct endpoint *self, uint64_t offset, uint64_t nbytes)
{
    (void)self;
    put(offset, offset, nbytes);
    flush();
}

static void write_pages(struct endpoint *self, const uint32_t *source, const uint32_t *target,
                        uint64_t num_pages, uint64_t page_bytes)
{
    (void)self;
    for (uint64_t i = 0; i < num_pages; ++i)
        put(source[i] * page_bytes, target[i] * page_bytes, page_bytes);
    flush();
}

/* No flush: the receiver's poll is the completion, as in ucx_perftest's put_lat. */
static void flag(struct endpoint *self)
{
    put(self->data_bytes, self->data_bytes + kInOffset, 8);
}

static void notify(struct endpoint *self)
{
    flag(self);
    flush();
    message(kNotification);
}

static void await_notification(struct endpoint *self, uint64_t word)
{
    (void)self, (void)word;
    struct patience patience = {0};
    ++ucx.awaited;
    while (ucx.arrivals < ucx.awaited) {
        ucp_worker_progress(ucx.worker);
        wait_more(&patience, "a notification");
    }
}

static void announce(struct endpoint *self)
{
    (void)self;
    message(kNotification);
}

static void await_announcement(struct endpoint *self, const struct load *load)
{
    (void)load;
    await_notification(self, 0);
}

static void progress(struct endpoint *self)
{
    (void)self;
    if (ucx.worker)
        ucp_worker_progress(ucx.worker);
}

int main(int argc, char **argv)
{
    ucx.user_memory = argc > 1 && !strcmp(argv[1], "user");
    const struct contender with = {
        .version = version,
        .setup = setup,
        .connect = connect_peer,
        .write = write_range,
        .write_pages = write_pages,
        .announce = announce,
        .await_announcement = await_announcement,
        .notify = notify,
        .await_notification = await_notification,
        .flag = flag,
        .poll_flag = progress,
        .progress = progress,
    };
    return serve(&with);
}
