/* What the machine does without a library: the ceilings that the table compares contenders with.
 *
 * Usage: baseline memcpy | vmwrite | tcp NUM_STREAMS
 *
 * memcpy   the target's buffer is a memfd that the source maps; a page costs one memcpy, and the
 *          notification is a bare polled ring of one slot: payload and sequence in one cache line.
 * vmwrite  private memory of the target, written by process_vm_writev, IOV_MAX pages a call. It can
 *          notify nobody, so only the polled flag is timed.
 * tcp      bare streams over loopback, gathered from and scattered into place by sendmsg and
 *          recvmsg without any header: both sides know the placement. The target acknowledges each
 *          call with one byte. A call's bytes, or pages, are cut into one part per stream.
 */
#include "endpoint.h"
#include <arpa/inet.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/uio.h>

enum { kMaxStreams = 4, kMaxPages = 1 << 16, kIovMax = 1024, kSpinsBeforePoll = 1 << 12 };

struct blob {
    int32_t pid, fd;
    uint64_t base;
    uint16_t port;
};

static struct {
    struct blob remote;
    uint8_t *mapped;
    int memfd, listener, num_streams;
    int streams[kMaxStreams];
    uint64_t bounces;
} base;

static struct iovec local_iov[kMaxPages], remote_iov[kMaxPages];

static const char *version(void)
{
    return "-";
}

static size_t pack_blob(struct endpoint *self, uint8_t *blob)
{
    struct blob mine = {.pid = getpid(), .fd = base.memfd, .base = (uint64_t)(uintptr_t)self->buffer};
    if (base.num_streams) {
        struct sockaddr_in address;
        socklen_t nbytes = sizeof address;
        getsockname(base.listener, (struct sockaddr *)&address, &nbytes);
        mine.port = ntohs(address.sin_port);
    }
    memcpy(blob, &mine, sizeof mine);
    return sizeof mine;
}

static void take_blob(const uint8_t *blob, size_t nbytes)
{
    if (nbytes != sizeof base.remote)
        fail("the peer's blob has %zu bytes", nbytes);
    memcpy(&base.remote, blob, nbytes);
}

/* The one-sided contenders have nobody to tell: the driver reads the source's answer. */
static void announce_nothing(struct endpoint *self)
{
    (void)self;
}

static void await_nothing(struct endpoint *self, const struct load *load)
{
    (void)self, (void)load;
}

/* memcpy */

static size_t memcpy_setup(struct endpoint *self, uint8_t *blob, size_t capacity)
{
    (void)capacity;
    size_t nbytes = self->data_bytes + kMailBytes;
    base.memfd = memfd_create("bench-baseline", MFD_CLOEXEC);
    if (base.memfd < 0 || ftruncate(base.memfd, (off_t)nbytes))
        fail("memfd of %zu bytes: %s", nbytes, strerror(errno));
    self->buffer = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, base.memfd, 0);
    if (self->buffer == MAP_FAILED)
        fail("mmap of a memfd: %s", strerror(errno));
    memset(self->buffer, 0, nbytes);
    return pack_blob(self, blob);
}

static const char *memcpy_connect(struct endpoint *self, const uint8_t *blob, size_t nbytes)
{
    char path[64];
    take_blob(blob, nbytes);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", base.remote.pid, base.remote.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail("open %s: %s", path, strerror(errno));
    base.mapped = mmap(NULL, self->data_bytes + kMailBytes, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_POPULATE, fd, 0);
    if (base.mapped == MAP_FAILED)
        fail("mmap of the peer's memfd: %s", strerror(errno));
    close(fd);
    return "mapped";
}

static void memcpy_write(struct endpoint *self, uint64_t offset, uint64_t nbytes)
{
    memcpy(base.mapped + offset, self->buffer + offset, nbytes);
}

static void memcpy_pages(struct endpoint *self, const uint32_t *source, const uint32_t *target,
                         uint64_t num_pages, uint64_t page_bytes)
{
    for (uint64_t i = 0; i < num_pages; ++i)
        memcpy(base.mapped + target[i] * page_bytes, self->buffer + source[i] * page_bytes, page_bytes);
}

/* ORDERING: the release store of the sequence pairs with the acquire load in memcpy_await, so the
 * payload in the same line is visible when its sequence is. */
static void memcpy_notify(struct endpoint *self)
{
    uint64_t *slot = (uint64_t *)(base.mapped + self->data_bytes + kInOffset);
    slot[0] = *out_word(self);
    atomic_store_explicit((_Atomic uint64_t *)&slot[1], ++base.bounces, memory_order_release);
}

/* The sequence that a side waits for: the source has sent one more than it has received. */
static void memcpy_await(struct endpoint *self, uint64_t word)
{
    (void)word;
    struct patience patience = {0};
    const _Atomic uint64_t *sequence = (const _Atomic uint64_t *)(in_word(self) + 1);
    uint64_t awaited = self->is_source ? base.bounces : base.bounces + 1;
    while (atomic_load_explicit(sequence, memory_order_acquire) != awaited)
        wait_more(&patience, "a ring slot");
}

static void memcpy_flag(struct endpoint *self)
{
    volatile uint64_t *slot = (volatile uint64_t *)(base.mapped + self->data_bytes + kInOffset);
    *slot = *out_word(self);
}

/* vmwrite */

static size_t vmwrite_setup(struct endpoint *self, uint8_t *blob, size_t capacity)
{
    (void)capacity;
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY); /* Yama lets only parents write otherwise */
    self->buffer = private_buffer(self->data_bytes + kMailBytes);
    return pack_blob(self, blob);
}

static const char *vmwrite_connect(struct endpoint *self, const uint8_t *blob, size_t nbytes)
{
    (void)self;
    take_blob(blob, nbytes);
    return "process_vm_writev";
}

static void vmwrite_range(struct endpoint *self, uint64_t from, uint64_t to, uint64_t nbytes)
{
    while (nbytes) {
        struct iovec local = {self->buffer + from, nbytes};
        struct iovec remote = {(void *)(uintptr_t)(base.remote.base + to), nbytes};
        ssize_t written = process_vm_writev(base.remote.pid, &local, 1, &remote, 1, 0);
        if (written <= 0)
            fail("process_vm_writev: %s", strerror(errno));
        from += (uint64_t)written, to += (uint64_t)written, nbytes -= (uint64_t)written;
    }
}

static void vmwrite_write(struct endpoint *self, uint64_t offset, uint64_t nbytes)
{
    vmwrite_range(self, offset, offset, nbytes);
}

static void vmwrite_pages(struct endpoint *self, const uint32_t *source, const uint32_t *target,
                          uint64_t num_pages, uint64_t page_bytes)
{
    for (uint64_t first = 0; first < num_pages; first += kIovMax) {
        uint64_t count = num_pages - first < kIovMax ? num_pages - first : kIovMax;
        for (uint64_t i = 0; i < count; ++i) {
            local_iov[i] = (struct iovec){self->buffer + source[first + i] * page_bytes, page_bytes};
            remote_iov[i] = (struct iovec){
                (void *)(uintptr_t)(base.remote.base + target[first + i] * page_bytes), page_bytes};
        }
        ssize_t written = process_vm_writev(base.remote.pid, local_iov, count, remote_iov, count, 0);
        if (written != (ssize_t)(count * page_bytes))
            fail("process_vm_writev of %llu pages wrote %zd bytes: %s", (unsigned long long)count,
                 written, strerror(errno));
    }
}

static void vmwrite_flag(struct endpoint *self)
{
    vmwrite_range(self, self->data_bytes, self->data_bytes + kInOffset, 8);
}

/* tcp */

static size_t tcp_setup(struct endpoint *self, uint8_t *blob, size_t capacity)
{
    (void)capacity;
    self->buffer = private_buffer(self->data_bytes + kMailBytes);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    base.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(base.listener, (struct sockaddr *)&address, sizeof address) || listen(base.listener, kMaxStreams))
        fail("listen on loopback: %s", strerror(errno));
    return pack_blob(self, blob);
}

/* The source connects before the target accepts: the backlog holds all streams. */
static const char *tcp_connect(struct endpoint *self, const uint8_t *blob, size_t nbytes)
{
    static char path[32];
    take_blob(blob, nbytes);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons(base.remote.port)};
    int yes = 1;
    for (int i = 0; i < base.num_streams; ++i) {
        if (self->is_source) {
            base.streams[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (connect(base.streams[i], (struct sockaddr *)&address, sizeof address))
                fail("connect: %s", strerror(errno));
        } else if ((base.streams[i] = accept(base.listener, NULL, NULL)) < 0)
            fail("accept: %s", strerror(errno));
        setsockopt(base.streams[i], IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        fcntl(base.streams[i], F_SETFL, O_NONBLOCK);
    }
    snprintf(path, sizeof path, "%d_streams", base.num_streams);
    return path;
}

/* What is left of one stream's part of a call: iov[at..end). */
struct part {
    struct iovec *iov;
    uint64_t at, end;
};

static void advance(struct part *part, uint64_t nbytes)
{
    while (nbytes) {
        struct iovec *iov = &part->iov[part->at];
        uint64_t step = nbytes < iov->iov_len ? nbytes : iov->iov_len;
        iov->iov_base = (uint8_t *)iov->iov_base + step;
        iov->iov_len -= step;
        nbytes -= step;
        part->at += iov->iov_len == 0;
    }
}

/* Moves every part to its end, taking turns; sleeps in poll when no stream has moved for a while. */
static void move_parts(struct part *parts, bool is_sending)
{
    struct pollfd ready[kMaxStreams];
    int idle_turns = 0;
    for (;;) {
        int num_open = 0;
        bool moved = false;
        for (int i = 0; i < base.num_streams; ++i) {
            struct part *part = &parts[i];
            if (part->at == part->end)
                continue;
            uint64_t left = part->end - part->at;
            struct msghdr message = {.msg_iov = part->iov + part->at,
                                     .msg_iovlen = left < kIovMax ? left : kIovMax};
            ssize_t nbytes = is_sending ? sendmsg(base.streams[i], &message, MSG_NOSIGNAL)
                                        : recvmsg(base.streams[i], &message, 0);
            if (nbytes > 0)
                advance(part, (uint64_t)nbytes), moved = true;
            else if (nbytes == 0 || (errno != EAGAIN && errno != EINTR))
                fail("stream %d: %s", i, nbytes == 0 ? "closed" : strerror(errno));
            if (part->at != part->end)
                ready[num_open++] = (struct pollfd){base.streams[i], is_sending ? POLLOUT : POLLIN, 0};
        }
        if (!num_open)
            return;
        idle_turns = moved ? 0 : idle_turns + 1;
        if (!moved)
            sched_yield(); /* the other side may be waiting for this core */
        if (idle_turns >= kSpinsBeforePoll && poll(ready, (nfds_t)num_open, 60000) == 0)
            fail("no stream moved within 60 s");
    }
}

static void acknowledge(bool is_sending)
{
    uint8_t byte = 1;
    struct iovec iov = {&byte, 1};
    struct part parts[kMaxStreams] = {{&iov, 0, 1}};
    move_parts(parts, is_sending);
}

static void tcp_move_range(struct endpoint *self, uint64_t offset, uint64_t nbytes)
{
    struct part parts[kMaxStreams];
    for (int i = 0; i < base.num_streams; ++i) {
        uint64_t from = nbytes * (uint64_t)i / (uint64_t)base.num_streams;
        uint64_t to = nbytes * (uint64_t)(i + 1) / (uint64_t)base.num_streams;
        local_iov[i] = (struct iovec){self->buffer + offset + from, to - from};
        parts[i] = (struct part){&local_iov[i], 0, 1};
    }
    move_parts(parts, self->is_source);
}

static void tcp_move_pages(struct endpoint *self, const uint32_t *slots, uint64_t num_pages,
                           uint64_t page_bytes)
{
    struct part parts[kMaxStreams];
    for (uint64_t i = 0; i < num_pages; ++i)
        local_iov[i] = (struct iovec){self->buffer + slots[i] * page_bytes, page_bytes};
    for (int i = 0; i < base.num_streams; ++i)
        parts[i] = (struct part){local_iov, num_pages * (uint64_t)i / (uint64_t)base.num_streams,
                                 num_pages * (uint64_t)(i + 1) / (uint64_t)base.num_streams};
    move_parts(parts, self->is_source);
}

static void tcp_write(struct endpoint *self, uint64_t offset, uint64_t nbytes)
{
    tcp_move_range(self, offset, nbytes);
    acknowledge(false);
}

static void tcp_pages(struct endpoint *self, const uint32_t *source, const uint32_t *target,
                      uint64_t num_pages, uint64_t page_bytes)
{
    (void)target;
    tcp_move_pages(self, source, num_pages, page_bytes);
    acknowledge(false);
}

/* The target's side of every call of a load: it knows the placement and receives into it. */
static void tcp_receive_all(struct endpoint *self, const struct load *load)
{
    uint64_t num_slots = load->span_bytes / load->size_bytes;
    uint32_t *target = load->operation == kPages ? slot_order(load->seed, kTargetSalt, num_slots) : NULL;
    for (uint64_t call = 0; call < load->num_calls + load->num_warmup; ++call) {
        if (target)
            tcp_move_pages(self, target + call * load->num_pages % num_slots, load->num_pages,
                           load->size_bytes);
        else
            tcp_move_range(self, call % num_slots * load->size_bytes, load->size_bytes);
        acknowledge(true);
    }
    free(target);
}

static void tcp_move_word(void *word, bool is_sending)
{
    struct iovec iov = {word, 8};
    struct part parts[kMaxStreams] = {{&iov, 0, 1}};
    move_parts(parts, is_sending);
}

static void tcp_notify(struct endpoint *self)
{
    tcp_move_word(out_word(self), true);
}

static void tcp_await(struct endpoint *self, uint64_t word)
{
    (void)word;
    tcp_move_word((void *)in_word(self), false);
}

int main(int argc, char **argv)
{
    struct contender with = {.version = version, .announce = announce_nothing};
    with.await_announcement = await_nothing;
    const char *mode = argc > 1 ? argv[1] : "";
    if (!strcmp(mode, "memcpy")) {
        with.setup = memcpy_setup, with.connect = memcpy_connect;
        with.write = memcpy_write, with.write_pages = memcpy_pages;
        with.notify = memcpy_notify, with.await_notification = memcpy_await;
        with.flag = memcpy_flag;
    } else if (!strcmp(mode, "vmwrite")) {
        with.setup = vmwrite_setup, with.connect = vmwrite_connect;
        with.write = vmwrite_write, with.write_pages = vmwrite_pages;
        with.flag = vmwrite_flag;
    } else if (!strcmp(mode, "tcp") && argc > 2) {
        base.num_streams = atoi(argv[2]);
        with.setup = tcp_setup, with.connect = tcp_connect;
        with.write = tcp_write, with.write_pages = tcp_pages;
        with.notify = tcp_notify, with.await_notification = tcp_await;
        with.await_announcement = tcp_receive_all;
    }
    if (!with.setup || base.num_streams < 0 || base.num_streams > kMaxStreams) {
        fprintf(stderr, "usage: baseline memcpy | vmwrite | tcp NUM_STREAMS (1 to %d)\n", kMaxStreams);
        return 2;
    }
    return serve(&with);
}
