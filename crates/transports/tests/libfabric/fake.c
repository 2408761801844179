// A libfabric without a fabric: endpoints of one process, whose writes copy at once and complete in any order, with
// errors where a test wants them.
//
// The tests compile it, copy it once for each of them, and set what the provider is through the exported `fake`, whose
// layout `fake.rs` repeats. Structures are those of rdma/*.h as far as they are used; `layout.rs` holds the same
// offsets against the real headers.

#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FLAG(bit) (1ULL << (bit))
enum { EAVAIL = 259, EBADFLAGS = 260, ENOKEY_ = 266, EOVERRUN = 268 };
enum { MR_VIRT_ADDR = 1 << 4, MR_PROV_KEY = 1 << 6, MR_ENDPOINT = 1 << 9 };
enum { kMaxEndpoints = 512, kMaxMemory = 4096, kMaxEntries = 1 << 16, kMaxReceives = 512 };
#define MODE_CONTEXT2 FLAG(52)
#define MODE_RX_CQ_DATA FLAG(56)
#define DELIVERY_COMPLETE FLAG(28)
#define REMOTE_CQ_DATA FLAG(17)
#define SOURCE FLAG(57)
#define DMABUF FLAG(40)
#define HMEM FLAG(47)

// What the provider is, what goes wrong, and what was seen. The order of completions: 0 as posted, 1 last first,
// 2 shuffled.
struct fake {
    uint64_t mode, mr_mode, cq_data_size, ep_cnt, version;
    uint64_t has_source, has_delivery_complete, has_write_data, has_fd;
    uint64_t order, fail_nth, fail_with, again_every, swallow, stale_on_close, null;
    uint64_t stays_open;    // endpoints cannot be closed
    uint64_t memory_stays;  // nor can memory
    uint64_t memory_fails;  // which registration fails from now on, and all after it; 0: none
    uint64_t writes, immediates, sends, endpoints, memories, dmabufs, options, flags, posts;
    uint64_t has_hmem, no_dmabuf, no_address;  // GPU memory: whether at all, errors of the two ways
    uint64_t gpu_memories, dmabuf_offset, dmabuf_word, device;  // by address; and what the last one was
    uint64_t is_full, says_so;  // queues take no more; an overrun is an entry, and not what reading gives
    uint64_t deepest, depth;  // queue that can be opened, 0: any; and the last one's
    uint64_t takes_keys;  // of ours for memory, if it is asked to, although it chooses them by itself
    uint64_t late;  // arrivals come when their endpoint is being closed (1), or are lost with it (2)
    uint64_t has_trywait, not_now;  // fi_trywait: whether the table has it, and that nobody may wait now
    uint64_t nics, shut;  // how many there are, "fake0" and so on; a bit for each that cannot be opened
    uint64_t early;  // objects that were closed, or were to be, before what uses them
    uint64_t reused;  // contexts and buffers that were posted while an endpoint had them already
    uint64_t addr_format;
    uint64_t key_bytes;  // of memory
    uint64_t no_receives;  // error of receives that are posted
    uint64_t writable;  // memories that peers may write
    uint64_t down;  // a bit for each NIC whose link carries nothing: what goes over it never completes
    // When a write was posted first after this was set to 0, where nothing is moved.
    uint64_t posted_ns;
    char provider[32], fabric[32];
    // Where a test plays /sys/class/net: the system's names of the NICs lead there.
    char machine[256];
};
struct fake fake = {.cq_data_size = 8, .ep_cnt = 64, .nics = 1, .key_bytes = 8, .version = 1 << 16 | 22, .has_source = 1,
    .has_delivery_complete = 1, .has_write_data = 1, .posted_ns = 1, .provider = "fake", .fabric = "fake"};

// ---- structures of rdma/*.h --------------------------------------------------------------------------------------

struct fid { size_t fclass; void *context; const struct fi_ops *ops; };
struct fi_ops { size_t size; int (*close)(struct fid *); int (*bind)(struct fid *, struct fid *, uint64_t);
    int (*control)(struct fid *, int, void *); void *rest[3]; };
struct tx_attr { uint64_t caps, mode, op_flags, msg_order, comp_order; size_t inject, size, iov, rma_iov;
    uint32_t tclass; };
struct rx_attr { uint64_t caps, mode, op_flags, msg_order, comp_order; size_t buffered, size, iov; };
struct ep_attr { uint32_t type, protocol, protocol_version; size_t max_msg_size; uint8_t rest[72]; };
struct domain_attr { void *domain; char *name; uint32_t threading, control, data, resource, av; int mr_mode;
    size_t mr_key_size, cq_data_size, cq_cnt, ep_cnt; uint8_t rest[120]; };
struct fabric_attr { void *fabric; char *name, *prov_name; uint32_t prov_version, api_version; };
struct fi_info { struct fi_info *next; uint64_t caps, mode; uint32_t addr_format; size_t src_len, dest_len;
    void *src, *dest, *handle; struct tx_attr *tx; struct rx_attr *rx; struct ep_attr *ep; struct domain_attr *domain;
    struct fabric_attr *fabric; void *nic; };
struct mr_attr { const void *iov; size_t iov_count; uint64_t access, offset, key; void *context; size_t auth_size;
    uint8_t *auth; uint32_t iface; uint64_t device; };
struct mr_dmabuf { int fd; uint64_t offset; size_t len; void *base; };
struct msg { const struct iovec *iov; void **desc; size_t iov_count; uint64_t addr; void *context; uint64_t data; };
struct rma_iov { uint64_t addr; size_t len; uint64_t key; };
struct msg_rma { const struct iovec *iov; void **desc; size_t iov_count; uint64_t addr; const struct rma_iov *rma;
    size_t rma_count; void *context; uint64_t data; };
struct cq_attr { size_t size; uint64_t flags; uint32_t format, wait_obj; int vector; uint32_t cond; void *wait_set; };
struct cq_entry { void *context; uint64_t flags; size_t len; void *buf; uint64_t data; };
struct cq_error { void *context; uint64_t flags; size_t len; void *buf; uint64_t data, tag; size_t olen;
    int err, prov_errno; void *err_data; size_t err_data_size; uint64_t src; };

// ---- objects -----------------------------------------------------------------------------------------------------

struct memory { struct fid fid; void *desc; uint64_t key; uint8_t *address; size_t len; uint64_t access; int enabled;
    struct fid *endpoint; void *domain; };
struct waiting { struct cq_entry entry; uint64_t source; int error; };
struct cq { struct fid fid; const void *ops; struct waiting *entries; size_t first, num; int fd, is_armed, overrun; };
struct av { struct fid fid; const void *ops; uint64_t ids[kMaxEndpoints]; size_t num; };
struct endpoint { struct fid fid; const void *ops, *cm, *msg, *rma; struct cq *cq; struct av *av; void *domain;
    uint64_t id; int enabled;
    struct msg receives[kMaxReceives]; struct iovec buffers[kMaxReceives]; size_t num_receives;
    void *held[kMaxReceives]; size_t num_held;
    struct waiting late[kMaxReceives]; size_t num_late; };
struct plain { struct fid fid; const void *ops, *mr; uint64_t nic; };
struct nic { struct fid fid; char **device, *rest[2], *name; };

static struct memory *memories[kMaxMemory];
static struct endpoint *endpoints[kMaxEndpoints];
static uint64_t mr_mode_in_use;  // of the domain
static uint64_t random_state = 88172645463325252ULL;
static uint8_t descriptors[4096][64];

// Endpoints of one process write into one another's queues, and engines have a thread each. Not taken where `null` is
// measured.
static pthread_mutex_t all = PTHREAD_MUTEX_INITIALIZER;
static int enter(void) { return fake.null ? 0 : (pthread_mutex_lock(&all), 1); }
static void leave(int *entered) { if (*entered) pthread_mutex_unlock(&all); }
#define GUARD __attribute__((cleanup(leave))) int guard = enter(); (void)guard

static uint64_t next_random(void) {
    random_state ^= random_state << 13; random_state ^= random_state >> 7; random_state ^= random_state << 17;
    return random_state;
}

// What an open endpoint, or memory, uses cannot be closed.
static int is_used(const void *object) {
    GUARD;
    int used = 0;
    for (size_t idx = 0; idx < kMaxEndpoints; idx++) {
        const struct endpoint *ep = endpoints[idx];
        used |= ep && (ep->cq == object || ep->av == object || ep->domain == object);
    }
    for (size_t idx = 0; idx < kMaxMemory; idx++) used |= memories[idx] && memories[idx]->domain == object;
    fake.early += (uint64_t)used;
    return used;
}

static int close_plain(struct fid *fid) {
    if (is_used(fid)) return -EBUSY;
    free(fid);
    return 0;
}
static int bind_plain(struct fid *fid, struct fid *to, uint64_t flags) { (void)fid; (void)to; (void)flags; return 0; }
static int control_plain(struct fid *fid, int command, void *value) {
    (void)fid; (void)command; (void)value;
    return -ENOSYS;
}
static const struct fi_ops plain_ops = {sizeof(struct fi_ops), close_plain, bind_plain, control_plain, {0}};

// What waits begins with the first entry.
static void compact(struct cq *cq) {
    memmove(cq->entries, cq->entries + cq->first, (cq->num -= cq->first) * sizeof *cq->entries);
    cq->first = 0;
}

static void complete(struct cq *cq, struct cq_entry entry, uint64_t source, int error) {
    if (cq->first == cq->num) cq->first = cq->num = 0;
    if (cq->num == kMaxEntries && cq->first) compact(cq);
    if (fake.is_full) {
        if (!fake.says_so) cq->overrun = 1;
        else cq->entries[cq->num++] = (struct waiting){{0}, 0, EOVERRUN};
        return;
    }
    if (cq->num < kMaxEntries) cq->entries[cq->num++] = (struct waiting){entry, source, error};
    if (cq->is_armed) cq->is_armed = 0, eventfd_write(cq->fd, 1);
}

static void arrive(struct endpoint *to, struct cq_entry entry, uint64_t source) {
    if (fake.late && to->num_late < kMaxReceives) to->late[to->num_late++] = (struct waiting){entry, source, 0};
    else complete(to->cq, entry, source, 0);
}

static void scribble(void *context) {
    // A provider that asked for it may use 64 bytes of a context until the operation has completed.
    if (context && fake.mode & MODE_CONTEXT2) memset(context, 0xa5, 64);
}

// ---- completion queue --------------------------------------------------------------------------------------------

static size_t pick(struct cq *cq) {
    if (fake.order == 1) return cq->num - 1;
    return fake.order == 2 ? next_random() % cq->num : 0;
}

static ssize_t cq_readfrom(struct cq *cq, void *into, size_t count, uint64_t *sources) {
    GUARD;
    struct cq_entry *out = into;
    size_t n = 0;
    if (cq->overrun) return -EOVERRUN;
    if (fake.order && cq->first) compact(cq);
    while (n < count && cq->num) {
        size_t at = fake.order ? pick(cq) : cq->first + n;
        if (at >= cq->num) break;
        if (cq->entries[at].error) {
            if (n) break;
            // The one to be read as an error comes first.
            struct waiting first = cq->entries[cq->first];
            cq->entries[cq->first] = cq->entries[at]; cq->entries[at] = first;
            return -EAVAIL;
        }
        if (sources) sources[n] = cq->entries[at].source;
        scribble(cq->entries[at].entry.context);
        out[n++] = cq->entries[at].entry;
        if (fake.order) cq->entries[at] = cq->entries[--cq->num];
    }
    if (!fake.order) cq->first += n;
    return n ? (ssize_t)n : -EAGAIN;
}
static ssize_t cq_read(struct cq *cq, void *into, size_t count) { return cq_readfrom(cq, into, count, NULL); }
static ssize_t cq_readerr(struct cq *cq, struct cq_error *out, uint64_t flags) {
    (void)flags;
    GUARD;
    compact(cq);
    if (!cq->num || !cq->entries[0].error) return -EAGAIN;
    struct waiting *first = cq->entries;
    memset(out, 0, sizeof *out);
    out->context = first->entry.context; out->flags = first->entry.flags;
    out->err = first->error; out->prov_errno = 4242;
    memmove(first, first + 1, --cq->num * sizeof *first);
    return 1;
}
static const char *cq_strerror(struct cq *cq, int code, const void *data, char *buf, size_t len) {
    (void)cq; (void)code; (void)data; (void)buf; (void)len;
    return "an error of the fake provider";
}
static const struct { size_t size; void *read, *readfrom, *readerr, *sread, *sreadfrom, *signal, *strerror; } cq_ops = {
    64, cq_read, cq_readfrom, cq_readerr, NULL, NULL, NULL, cq_strerror};
static int cq_close(struct fid *fid) {
    struct cq *cq = (struct cq *)fid;
    if (is_used(cq)) return -EBUSY;
    if (cq->fd >= 0) close(cq->fd);
    free(cq->entries); free(fid);
    return 0;
}
// A descriptor that becomes readable with the first entry after `trywait` said that it may be waited for. Where there
// is no `trywait` it never does.
static int cq_control(struct fid *fid, int command, void *value) {
    struct cq *cq = (struct cq *)fid;
    if (command != 5 || cq->fd < 0) return -ENOSYS;
    *(int *)value = cq->fd;
    return 0;
}
static const struct fi_ops cq_fid_ops = {sizeof(struct fi_ops), cq_close, bind_plain, cq_control, {0}};
static int cq_open(void *domain, struct cq_attr *attr, struct fid **out, void *context) {
    (void)domain; (void)context;
    if (attr->wait_obj && !fake.has_fd) return -ENOSYS;
    if (fake.deepest && attr->size > fake.deepest) return -EINVAL;
    fake.depth = attr->size;
    struct cq *cq = calloc(1, sizeof *cq);
    cq->fid.ops = &cq_fid_ops; cq->ops = &cq_ops;
    cq->entries = calloc(kMaxEntries, sizeof *cq->entries);
    cq->fd = attr->wait_obj ? eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) : -1;
    *out = &cq->fid;
    return 0;
}

// ---- addresses ---------------------------------------------------------------------------------------------------

static int av_insert(struct av *av, const void *name, size_t count, uint64_t *out, uint64_t flags, void *context) {
    (void)count; (void)flags; (void)context;
    // As EFA's does it: what is known already is found again, and removed the first time.
    uint64_t id;
    memcpy(&id, name, 8);
    id >>= 16;
    for (size_t idx = 1; idx < av->num; idx++) if (av->ids[idx] == id) return *out = idx, 1;
    av->ids[av->num] = id;
    *out = av->num++;
    return 1;
}
static int av_remove(struct av *av, uint64_t *address, size_t count, uint64_t flags) {
    (void)count; (void)flags;
    av->ids[*address] = 0;
    return 0;
}
static const struct { size_t size; void *insert, *insertsvc, *insertsym, *remove; } av_ops = {
    40, av_insert, NULL, NULL, av_remove};
static int av_open(void *domain, void *attr, struct fid **out, void *context) {
    (void)domain; (void)attr; (void)context;
    struct av *av = calloc(1, sizeof *av);
    av->fid.ops = &plain_ops; av->ops = &av_ops; av->num = 1;
    *out = &av->fid;
    return 0;
}
static int is_down(const struct endpoint *ep) { return fake.down >> ((struct plain *)ep->domain)->nic & 1; }
static struct endpoint *find(uint64_t id) { return id && id <= kMaxEndpoints ? endpoints[id - 1] : NULL; }
// How the receiver's table names a sender.
static uint64_t source_of(const struct endpoint *from, const struct endpoint *at) {
    for (size_t idx = 1; idx < at->av->num; idx++) if (at->av->ids[idx] == from->id) return idx;
    return UINT64_MAX;
}

// ---- memory ------------------------------------------------------------------------------------------------------

static int mr_close(struct fid *fid) {
    GUARD;
    if (fake.memory_stays) {
        ((struct memory *)fid)->domain = NULL;  // which may be closed all the same
        return -EBUSY;
    }
    for (size_t idx = 0; idx < kMaxMemory; idx++) if (memories[idx] == (struct memory *)fid) memories[idx] = NULL;
    fake.memories--;
    fake.writable -= ((struct memory *)fid)->access >> 13 & 1;
    free(fid);
    return 0;
}
static int mr_control(struct fid *fid, int command, void *value) {
    (void)command; (void)value;
    if (!((struct memory *)fid)->endpoint) return -EINVAL;
    ((struct memory *)fid)->enabled = 1;
    return 0;
}
static int mr_bind(struct fid *fid, struct fid *to, uint64_t flags) {
    (void)flags;
    ((struct memory *)fid)->endpoint = to;
    return 0;
}
static const struct fi_ops mr_fid_ops = {sizeof(struct fi_ops), mr_close, mr_bind, mr_control, {0}};
static int mr_regattr(struct fid *domain, const struct mr_attr *attr, uint64_t flags, struct memory **out) {
    GUARD;
    if (fake.memory_fails == 1) return -ENOMEM;
    if (fake.memory_fails) fake.memory_fails--;
    if (attr->iface && (flags & DMABUF ? fake.no_dmabuf : fake.no_address))
        return -(int)(flags & DMABUF ? fake.no_dmabuf : fake.no_address);
    for (size_t idx = 0; idx < kMaxMemory && !(mr_mode_in_use & MR_PROV_KEY); idx++)
        if (memories[idx] && memories[idx]->domain == domain && memories[idx]->key == attr->key) return -ENOKEY_;
    struct memory *mr = calloc(1, sizeof *mr);
    mr->fid.ops = &mr_fid_ops; mr->desc = mr; mr->access = attr->access; mr->domain = domain;
    mr->key = mr_mode_in_use & MR_PROV_KEY ? next_random() : attr->key;
    mr->enabled = !(mr_mode_in_use & MR_ENDPOINT);
    if (flags & DMABUF) {
        const struct mr_dmabuf *dmabuf = attr->iov;
        mr->address = dmabuf->base; mr->len = dmabuf->len;
        fake.dmabufs += attr->iface == 1 && dmabuf->fd >= 0;
        fake.dmabuf_offset = dmabuf->offset; fake.device = attr->device;
        if (pread(dmabuf->fd, &fake.dmabuf_word, 8, (off_t)dmabuf->offset) != 8) return free(mr), -EINVAL;
    } else {
        fake.gpu_memories += attr->iface == 1;
        mr->address = ((const struct iovec *)attr->iov)->iov_base;
        mr->len = ((const struct iovec *)attr->iov)->iov_len;
    }
    for (size_t idx = 0; idx < kMaxMemory; idx++) {
        if (memories[idx]) continue;
        memories[idx] = mr; *out = mr; fake.memories++;
        fake.writable += mr->access >> 13 & 1;
        return 0;
    }
    free(mr);
    return -ENOMEM;
}
// Where a write lands; NULL for what a NIC would refuse.
static uint8_t *landing(const void *domain, const struct rma_iov *to) {
    for (size_t idx = 0; idx < kMaxMemory; idx++) {
        struct memory *mr = memories[idx];
        if (!mr || mr->domain != domain || mr->key != to->key || !mr->enabled || !(mr->access & FLAG(13))) continue;
        uint64_t offset = mr_mode_in_use & MR_VIRT_ADDR ? to->addr - (uint64_t)mr->address : to->addr;
        return offset <= mr->len && to->len <= mr->len - offset ? mr->address + offset : NULL;
    }
    return NULL;
}

// ---- endpoints ---------------------------------------------------------------------------------------------------

// What an operation uses until it has completed, or its endpoint is closed.
static void use(const void *what) {
    for (size_t idx = 0; idx < kMaxEndpoints; idx++) {
        const struct endpoint *ep = endpoints[idx];
        for (size_t at = 0; ep && at < ep->num_held; at++) fake.reused += ep->held[at] == what;
        for (size_t at = 0; ep && at < ep->num_receives; at++)
            fake.reused += ep->receives[at].context == what || ep->buffers[at].iov_base == what;
    }
}

static int take_receive(struct endpoint *ep, struct msg *receive, struct iovec *buffer) {
    if (!ep->num_receives) return 0;
    *receive = ep->receives[--ep->num_receives]; *buffer = ep->buffers[ep->num_receives];
    return 1;
}
static ssize_t ep_recvmsg(struct endpoint *ep, const struct msg *msg, uint64_t flags) {
    (void)flags;
    GUARD;
    if (fake.no_receives) return -(ssize_t)fake.no_receives;
    if (ep->num_receives == kMaxReceives) return -EAGAIN;
    use(msg->context); use(msg->iov->iov_base);
    ep->buffers[ep->num_receives] = *msg->iov; ep->receives[ep->num_receives++] = *msg;
    scribble(msg->context);
    return 0;
}
static ssize_t hold_back(struct endpoint *ep, void *context) {
    if (ep->num_held == kMaxReceives) return -EAGAIN;
    ep->held[ep->num_held++] = context;
    return 0;
}
static ssize_t ep_sendmsg(struct endpoint *ep, const struct msg *msg, uint64_t flags) {
    GUARD;
    struct endpoint *to = find(ep->av->ids[msg->addr]);
    struct msg receive; struct iovec buffer;
    if (fake.again_every && ++fake.posts % fake.again_every == 0) return -EAGAIN;
    fake.flags = flags;
    use(msg->context); use(msg->iov->iov_base);
    if (!to || fake.swallow || is_down(ep) || is_down(to))
        return hold_back(ep, msg->context) || hold_back(ep, msg->iov->iov_base);
    if (!take_receive(to, &receive, &buffer)) return -EAGAIN;
    size_t len = msg->iov->iov_len < buffer.iov_len ? msg->iov->iov_len : buffer.iov_len;
    memcpy(buffer.iov_base, msg->iov->iov_base, len);
    scribble(msg->context);
    fake.sends++;
    struct cq_entry arrival = {receive.context, FLAG(1) | FLAG(10), len, buffer.iov_base, 0};
    arrive(to, arrival, source_of(ep, to));
    complete(ep->cq, (struct cq_entry){msg->context, FLAG(1) | FLAG(11), 0, NULL, 0}, 0, 0);
    return 0;
}
static ssize_t ep_writemsg(struct endpoint *ep, const struct msg_rma *msg, uint64_t flags) {
    if (fake.null) {
        if (!fake.posted_ns) {
            struct timespec now;
            clock_gettime(CLOCK_MONOTONIC, &now);
            fake.posted_ns = now.tv_sec * 1000000000ull + now.tv_nsec;
        }
        // What a NIC is handed: a descriptor of 64 bytes.
        uint64_t *words = (uint64_t *)descriptors[fake.writes++ & 4095];
        words[0] = (uint64_t)msg->iov->iov_base; words[1] = msg->iov->iov_len; words[2] = (uint64_t)*msg->desc;
        words[3] = msg->rma->addr; words[4] = msg->rma->key; words[5] = msg->data; words[6] = msg->addr;
        words[7] = flags;
        complete(ep->cq, (struct cq_entry){msg->context, FLAG(2) | FLAG(9), 0, NULL, 0}, 0, 0);
        return 0;
    }
    GUARD;
    if (flags & REMOTE_CQ_DATA && !fake.has_write_data) return -EBADFLAGS;
    if (fake.again_every && ++fake.posts % fake.again_every == 0) return -EAGAIN;
    fake.writes++; fake.flags = flags;
    struct cq_entry done = {msg->context, FLAG(2) | FLAG(9), 0, NULL, 0};
    scribble(msg->context);
    use(msg->context);
    struct endpoint *to = find(ep->av->ids[msg->addr]);
    if (!to || fake.swallow || is_down(ep) || is_down(to)) return hold_back(ep, msg->context);
    if (fake.writes == fake.fail_nth) { complete(ep->cq, done, 0, (int)fake.fail_with); return 0; }
    uint8_t *at = landing(to->domain, msg->rma);
    if (!at || msg->rma_count != 1) { complete(ep->cq, done, 0, EACCES); return 0; }
    if (msg->iov_count) memcpy(at, msg->iov->iov_base, msg->iov->iov_len);
    if (flags & REMOTE_CQ_DATA) {
        struct cq_entry arrival = {NULL, FLAG(2) | FLAG(13) | REMOTE_CQ_DATA, msg->rma->len, NULL, msg->data};
        struct msg receive; struct iovec buffer;
        if (fake.cq_data_size < 8) arrival.data &= 0xffffffff;
        if (fake.mode & MODE_RX_CQ_DATA) {
            if (!take_receive(to, &receive, &buffer)) { complete(ep->cq, done, 0, 269); return 0; }
            arrival.context = receive.context;
        }
        fake.immediates++;
        arrive(to, arrival, source_of(ep, to));
    }
    complete(ep->cq, done, 0, 0);
    return 0;
}
static const struct { size_t size; void *recv, *recvv, *recvmsg, *send, *sendv, *sendmsg; } msg_ops = {
    56, NULL, NULL, ep_recvmsg, NULL, NULL, ep_sendmsg};
static const struct { size_t size; void *read, *readv, *readmsg, *write, *writev, *writemsg; } rma_ops = {
    56, NULL, NULL, NULL, NULL, NULL, ep_writemsg};
// Begins with a family, as addresses of sockets do.
static int ep_getname(struct endpoint *ep, void *name, size_t *len) {
    uint64_t word = ep->id << 16 | 2;
    memcpy(name, &word, *len = 8);
    return 0;
}
static const struct { size_t size; void *setname, *getname; } cm_ops = {24, NULL, ep_getname};
static int ep_getopt(struct fid *fid, int level, int name, void *value, size_t *len) {
    (void)fid; (void)level; (void)name; (void)value; (void)len;
    return -ENOPROTOOPT;
}
static int ep_setopt(struct fid *fid, int level, int name, const void *value, size_t len) {
    (void)level;
    // Options come before the endpoint is enabled, and are booleans.
    if (((struct endpoint *)fid)->enabled || len != 1) return -EINVAL;
    uint64_t bit = name == 10 ? 1 : name == 11 ? 4 : name == -(0xefa << 16) + 8 ? 16 : 64;
    fake.options |= *(const uint8_t *)value ? bit << 1 : bit;
    return 0;
}
static const struct { size_t size; void *cancel, *getopt, *setopt; } ep_ops = {32, NULL, ep_getopt, ep_setopt};
static int ep_close(struct fid *fid) {
    GUARD;
    struct endpoint *ep = (struct endpoint *)fid;
    for (size_t idx = 0; idx < kMaxMemory; idx++) if (memories[idx] && memories[idx]->endpoint == fid) return -EBUSY;
    if (fake.stays_open) return -EBUSY;
    for (size_t idx = 0; fake.stale_on_close && idx < ep->num_held; idx++) {
        struct cq_entry stale = {ep->held[idx], FLAG(2) | FLAG(9), 0, NULL, 0};
        complete(ep->cq, stale, 0, fake.stale_on_close == 2 ? ECANCELED : 0);
    }
    for (size_t idx = 0; fake.late == 1 && idx < ep->num_late; idx++)
        complete(ep->cq, ep->late[idx].entry, ep->late[idx].source, 0);
    endpoints[ep->id - 1] = NULL;
    fake.endpoints--;
    free(ep);
    return 0;
}
static int ep_bind(struct fid *fid, struct fid *to, uint64_t flags) {
    if (flags) ((struct endpoint *)fid)->cq = (struct cq *)to;
    else ((struct endpoint *)fid)->av = (struct av *)to;
    return 0;
}
static int ep_control(struct fid *fid, int command, void *value) {
    (void)command; (void)value;
    return ((struct endpoint *)fid)->cq ? (((struct endpoint *)fid)->enabled = 1, 0) : -EINVAL;
}
static const struct fi_ops ep_fid_ops = {sizeof(struct fi_ops), ep_close, ep_bind, ep_control, {0}};
static int endpoint_open(void *domain, void *info, struct fid **out, void *context) {
    (void)info; (void)context;
    GUARD;
    for (uint64_t idx = 0; idx < kMaxEndpoints; idx++) {
        if (endpoints[idx]) continue;
        struct endpoint *ep = endpoints[idx] = calloc(1, sizeof *ep);
        ep->fid.ops = &ep_fid_ops; ep->ops = &ep_ops; ep->cm = &cm_ops; ep->msg = &msg_ops; ep->rma = &rma_ops;
        ep->id = idx + 1; ep->domain = domain;
        fake.endpoints++;
        *out = &ep->fid;
        return 0;
    }
    return -ENOSPC;
}

// ---- domain, fabric and entries ----------------------------------------------------------------------------------

static const struct { size_t size; void *av_open, *cq_open, *endpoint; } domain_ops = {
    32, av_open, cq_open, endpoint_open};
static const struct { size_t size; void *reg, *regv, *regattr; } mr_ops = {32, NULL, NULL, mr_regattr};
static int domain_open(void *fabric, struct fi_info *info, struct fid **out, void *context) {
    (void)fabric; (void)context;
    uint64_t nic = (uint64_t)(info->domain->name[4] - '0');
    if (fake.shut >> nic & 1) return -EACCES;
    mr_mode_in_use = (uint64_t)info->domain->mr_mode;
    struct plain *domain = calloc(1, sizeof *domain);
    domain->fid.ops = &plain_ops; domain->ops = &domain_ops; domain->mr = &mr_ops; domain->nic = nic;
    *out = &domain->fid;
    return 0;
}
static int trywait(void *fabric, struct fid **fids, int count) {
    (void)fabric;
    GUARD;
    if (fake.not_now) return -EAGAIN;
    for (int idx = 0; idx < count; idx++) {
        struct cq *cq = (struct cq *)fids[idx];
        eventfd_t seen;
        if (cq->first < cq->num) return -EAGAIN;
        if (cq->fd < 0) continue;
        (void)eventfd_read(cq->fd, &seen);
        cq->is_armed = 1;
    }
    return 0;
}
// An old table ends before `trywait`.
static struct { size_t size; void *domain, *rest[3], *trywait; } fabric_ops = {40, domain_open, {0}, trywait};

static char *copy_text(const char *text) { return text ? strdup(text) : NULL; }
static void *copy_of(const void *from, size_t len) {
    void *to = calloc(1, len);
    if (from) memcpy(to, from, len);
    return to;
}
static struct nic *nic_of(const char *domain) {
    if (!fake.machine[0] || !domain) return NULL;
    struct nic *nic = calloc(1, sizeof *nic);
    if (asprintf(&nic->name, "../../..%s/%s", fake.machine, domain) < 0) abort();
    nic->device = &nic->name;
    return nic;
}
struct fi_info *dupinfo(const struct fi_info *from) {
    struct fi_info *info = copy_of(from, sizeof *info);
    info->next = NULL;
    info->tx = copy_of(from ? from->tx : NULL, sizeof *info->tx);
    info->rx = copy_of(from ? from->rx : NULL, sizeof *info->rx);
    info->ep = copy_of(from ? from->ep : NULL, sizeof *info->ep);
    info->domain = copy_of(from ? from->domain : NULL, sizeof *info->domain);
    info->fabric = copy_of(from ? from->fabric : NULL, sizeof *info->fabric);
    info->domain->name = copy_text(info->domain->name);
    info->fabric->name = copy_text(info->fabric->name);
    info->fabric->prov_name = copy_text(info->fabric->prov_name);
    info->nic = nic_of(info->domain->name);
    return info;
}
void freeinfo(struct fi_info *info) {
    while (info) {
        struct fi_info *next = info->next;
        if (info->nic) free(((struct nic *)info->nic)->name), free(info->nic);
        free(info->domain->name); free(info->fabric->name); free(info->fabric->prov_name);
        free(info->tx); free(info->rx); free(info->ep); free(info->domain); free(info->fabric); free(info);
        info = next;
    }
}
// For tests of engines.
void fake_full(uint64_t is_full) { fake.is_full = is_full; }
static char first_hmem[32];
const char *fake_hmem(void) { return first_hmem; }
int getinfo(uint32_t version, const char *node, const char *service, uint64_t flags, const struct fi_info *hints,
    struct fi_info **out) {
    (void)node; (void)service; (void)flags;
    *out = NULL;
    // As the library does it: read once, at the first call.
    static int has_read;
    const char *hmem = getenv("FI_HMEM");
    if (!has_read++ && hmem) strncpy(first_hmem, hmem, sizeof first_hmem - 1);
    if (!hints) return -ENODATA;
    if (version > fake.version) return -ENOSYS;
    const char *wanted = hints->fabric->prov_name;
    if ((wanted && strcmp(wanted, fake.provider)) || fake.mode & ~hints->mode) return -ENODATA;
    uint64_t mr_mode = fake.mr_mode;
    if (fake.takes_keys && !(hints->domain->mr_mode & MR_PROV_KEY)) mr_mode &= ~(uint64_t)MR_PROV_KEY;
    if (mr_mode & ~(uint64_t)hints->domain->mr_mode) return -ENODATA;
    if (hints->caps & SOURCE && !fake.has_source) return -ENODATA;
    if (hints->caps & HMEM && !fake.has_hmem) return -ENODATA;
    if (hints->tx->op_flags & DELIVERY_COMPLETE && !fake.has_delivery_complete) return -ENODATA;
    for (uint64_t nic = fake.nics; nic--;) {
        // As providers do it: the name that is asked for is the domain's, not the device's.
        const char name[] = {'f', 'a', 'k', 'e', (char)('0' + nic), 0};
        if (hints->domain->name && strcasecmp(hints->domain->name, name)) continue;
        struct fi_info *info = dupinfo(NULL);
        info->next = *out;
        info->caps = hints->caps; info->mode = fake.mode; info->addr_format = (uint32_t)fake.addr_format;
        info->tx->size = 256; info->ep->type = 3; info->ep->protocol = 77; info->ep->max_msg_size = 1 << 30;
        info->domain->name = strdup(name); info->domain->mr_mode = (int)mr_mode;
        info->domain->mr_key_size = fake.key_bytes; info->domain->cq_data_size = fake.cq_data_size; info->domain->ep_cnt = fake.ep_cnt;
        info->fabric->name = strdup(fake.fabric); info->fabric->prov_name = strdup(fake.provider);
        info->nic = nic_of(info->domain->name);
        *out = info;
    }
    return *out ? 0 : -ENODATA;
}
int fabric_open(void *attr, struct fid **out, void *context) {
    (void)attr; (void)context;
    struct plain *fabric = calloc(1, sizeof *fabric);
    fabric_ops.size = fake.has_trywait ? 48 : 40;
    fabric->fid.ops = &plain_ops; fabric->ops = &fabric_ops;
    *out = &fabric->fid;
    return 0;
}
uint32_t fabric_version(void) { return (uint32_t)fake.version; }
const char *describe(int code) { return strerror(code); }

// What a page costs with nothing of ours around the provider: `count` writes in batches of 32, each patched, posted and
// taken from a queue of their own: workers of engines poll theirs at any time.
void fake_baseline(uint64_t count) {
    struct cq *cq = calloc(1, sizeof *cq);
    struct endpoint *ep = calloc(1, sizeof *ep);
    cq->entries = calloc(kMaxEntries, sizeof *cq->entries);
    cq->fd = -1;
    ep->cq = cq;
    const uint8_t *base = (const uint8_t *)descriptors;
    struct iovec iov = {(void *)(uintptr_t)base, 64};
    struct rma_iov to = {0, 64, 1};
    void *desc = NULL;
    struct msg_rma msg = {&iov, &desc, 1, 1, &to, 1, ep, 7};
    // Called as through the tables, not put in place.
    ssize_t (*volatile writemsg)(struct endpoint *, const struct msg_rma *, uint64_t) = ep_writemsg;
    ssize_t (*volatile read)(struct cq *, void *, size_t) = cq_read;
    struct cq_entry entries[16];
    for (uint64_t done = 0; done < count; done += 32) {
        for (uint64_t idx = 0; idx < 32; idx++) {
            iov.iov_base = (void *)(uintptr_t)(base + 64 * idx); to.addr = 64 * idx;
            writemsg(ep, &msg, REMOTE_CQ_DATA | DELIVERY_COMPLETE);
        }
        while (read(cq, entries, 16) > 0) {}
    }
    free(cq->entries); free(cq); free(ep);
}

// Exported under the versions that are asked for, and nothing as the default: a dlsym would find other layouts.
__asm__(".symver getinfo, fi_getinfo@FABRIC_1.3");
__asm__(".symver freeinfo, fi_freeinfo@FABRIC_1.3");
__asm__(".symver dupinfo, fi_dupinfo@FABRIC_1.3");
__asm__(".symver fabric_open, fi_fabric@FABRIC_1.1");
__asm__(".symver fabric_version, fi_version@FABRIC_1.0");
__asm__(".symver describe, fi_strerror@FABRIC_1.0");
