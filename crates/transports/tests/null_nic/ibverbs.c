// A libibverbs without a NIC: what is posted is copied into a 64-byte descriptor, as a driver would, and completes when
// the test says so. Nothing is moved unless a test asks for it. Tests open it in place of the real library, to walk
// paths that a NIC takes rarely and to measure what our own code costs.
//
// Queue pairs complete in order each and in any order among one another; a broken one flushes what it has.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// ---- the beginnings of rdma-core's structures, as far as they are used --------------------------

struct context;
struct sge { uint64_t addr; uint32_t length, lkey; };
struct send_wr {
  uint64_t wr_id;
  struct send_wr *next;
  struct sge *sg_list;
  int num_sge;
  uint32_t opcode, send_flags, imm_data;
  uint64_t remote_addr;
  uint32_t rkey;
  uint64_t rest_of_wr[2], rest[7];
};
struct recv_wr { uint64_t wr_id; struct recv_wr *next; struct sge *sg_list; int num_sge; };
struct wc {
  uint64_t wr_id;
  uint32_t status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp, wc_flags;
  uint16_t pkey_index, slid;
  uint8_t sl, dlid_path_bits;
};
struct ops { void *op[32]; };
struct context { void *device; struct ops ops; int cmd_fd, async_fd, num_comp_vectors; pthread_mutex_t mutex; void *abi;
  int announces_fd; struct context *next; };
struct event { void *element; uint32_t type; };
struct pd { struct context *context; uint32_t handle; };
struct mr { struct context *context; struct pd *pd; void *addr; size_t length; uint32_t handle, lkey, rkey; };
struct channel { struct context *context; int fd, refcnt; };
struct cq { struct context *context; struct channel *channel; void *cq_context; uint32_t handle; int cqe; };
struct srq { struct context *context; void *srq_context; struct pd *pd; uint32_t handle; };
struct qp {
  struct context *context; void *qp_context; struct pd *pd; struct cq *send_cq, *recv_cq; struct srq *srq;
  uint32_t handle, qp_num, state, qp_type; char rest[256];
};
struct init { void *qp_context; struct cq *send_cq, *recv_cq; struct srq *srq; uint32_t cap[5]; uint32_t type; int sig_all; };
struct srq_init { void *srq_context; uint32_t max_wr, max_sge, srq_limit; };

// ---- what is behind them ------------------------------------------------------------------------

#define DEPTH 1024
#define CQ_DEPTH 65536
#define NUM_DEVICES 9

// What a driver would hand to its device. 0: opcode, flags; 1: immediate, key; 2: remote address; 3, 4: what lies here;
// 5: the number of the request; 6, 7: its place, and the queue pair.
struct descriptor { uint64_t words[8]; } __attribute__((aligned(64)));

struct null_qp {
  struct qp qp;
  struct null_qp *next_busy;
  struct null_cq *cq;
  // Posted and not completed, from first to last.
  uint32_t posted, done, dest, is_busy;
  uint32_t mask;  // of the ring, which is as deep as was asked for, so that caches see what they would see
  struct descriptor ring[DEPTH];
};

struct null_cq {
  struct cq cq;
  struct wc wcs[CQ_DEPTH];
  uint32_t head, tail, mask;
  struct null_qp *busy;  // with something posted and not completed, the last that became so first
  int armed, is_broken;
};

struct receive { uint64_t id, addr; uint32_t length; };
struct null_srq { struct srq srq; struct receive receives[CQ_DEPTH]; uint32_t head, tail, depth; };

static struct {
  long holds;           // completions are held back until the test lets them go
  long fails_after;     // this many requests succeed, then one has `status`; -1: never
  long status;          // of the request that fails
  long refuses;         // the device takes one request less than this, and refuses all that follow with ENOMEM
  long port_is_down;
  long no_queue_pairs;
  long no_memory;       // registrations that fail with ENOMEM
  long num_posts;       // calls of post_send
  long num_requests;
  long is_gone;         // nothing completes, and no queue pair can be stopped
  long flushes_nothing; // what a broken queue pair has is forgotten
  long gid_index;       // where the GID of each port is
  long sgid_index;      // what the last queue pair was connected with
  long pinning_ms;      // how long a registration takes
  long num_memories;    // registrations that were made
  long pins_at_once;    // registrations wait, a second at most, until so many are being made
  long num_pinning;     // that are being made now
  long most_pinning;    // the most at a time
  long delivers;        // 1: immediates reach the queue pair at the other end; 2: bytes too, of NICs opened since
  long no_dmabuf;       // errno of registrations of a dmabuf
  long no_address;      // errno of registrations by address
  // Of the last dmabuf: how it was registered, and what is at its offset.
  long dmabuf_offset, dmabuf_length, dmabuf_iova, dmabuf_access, dmabuf_word;
  long live_memories;   // registrations that were not ended
  long posted_ns;       // when post_send was called first after this was set to 0
  long ports_down;      // a bit for each device whose ports are down
  long narrow;          // a bit for each device whose ports have one lane and not four
  long shut;            // a bit for each device that cannot be opened
  long no_queues;       // a bit for each device on which no completion queue can be made
  long num_writable;    // registrations that peers may write
  long port_without_gid; // of every device
  long is_prompt;       // what the device took is placed before it refuses the rest
  long max_cqe;         // what the device tells, if anything
  long refuses_receives; // as `refuses`, of receives
  long num_heard;       // calls of ibv_get_async_event
  long num_unheeded;    // events that were read and not acknowledged
  long breaks_queues;   // a bit for each device: what comes to its queue of completions from its next poll on is lost
  // Of the last queue pair, as it was told.
  long pkey_index, traffic_class, service_level, rnr_timer, timeout, retry_count, rnr_retry, dlid, is_global;
  long is_infiniband;   // every port, and not Ethernet's
  long lid;             // of every port
  long access;          // of the last memory that was registered by its address
  long no_relaxed;      // errno of registrations that ask for relaxed ordering
  long keeps_memory;    // with this errno no registration is ended
  long keeps_queue_pairs; // with this errno no queue pair is destroyed
} knobs = {.fails_after = -1, .posted_ns = 1};

// Reads (with a negative value) or sets a knob by its place; the test and this agree on the order above.
long null_nic_knob(int knob, long value) {
  long *at = &((long *)&knobs)[knob];
  long before = *at;
  if (value != -2) *at = value;
  return before;
}

static char devices[NUM_DEVICES][8] = {"null0", "null1", "null2", "null3",
                                     "null4", "null5", "null6", "null7", "null8"};
static uint32_t next_number = 100;
static struct null_qp *all_qps[65536];
static struct mr *all_mrs[65536];
static long carried[2][NUM_DEVICES];  // bytes that each has sent and received, where bytes are moved

static int device_of(const struct context *context) {
  return (int)(((char *)context->device - devices[0]) / (long)sizeof devices[0]);
}

// Of the least power of two that holds so many.
static uint32_t mask_of(uint32_t depth) {
  uint32_t mask = 0;
  while (mask + 1 < depth) mask = mask * 2 + 1;
  return mask;
}

static void push(struct null_cq *cq, const struct wc *wc) {
  if (cq->is_broken) return;
  cq->wcs[cq->head++ & cq->mask] = *wc;
  if (cq->armed) {
    uint64_t one = 1;
    cq->armed = 0;
    if (write(cq->cq.channel->fd, &one, 8) < 0) abort();
  }
}

static long arrive(struct qp *of, struct wc wc, const void *message);
struct qp *null_nic_qp(uint32_t number);

// With `delivers` an engine's poll reaches into another's queues, in another thread.
static pthread_mutex_t queues = PTHREAD_MUTEX_INITIALIZER;
static void lock(void) { if (knobs.delivers) pthread_mutex_lock(&queues); }
static void unlock(void) { if (knobs.delivers) pthread_mutex_unlock(&queues); }

// What the NIC at the other end does with a write that has this key; its status.
static uint32_t place(const struct null_qp *qp, const uint64_t *words) {
  const struct qp *to = null_nic_qp(qp->dest);
  uint32_t key = (uint32_t)words[1];
  uint64_t at = words[2], nbytes = (uint32_t)words[4];
  if (!to) return 12;
  const struct mr *mr = all_mrs[key % 65536];
  // The key of another NIC, or of another engine's, is none.
  if (nbytes && (!mr || mr->rkey != key || mr->pd != to->pd)) return 10;
  if (nbytes && (at < (uint64_t)mr->addr || at + nbytes > (uint64_t)mr->addr + mr->length)) return 10;
  if (nbytes) memcpy((void *)at, (const void *)words[3], nbytes);
  carried[0][device_of(qp->qp.context)] += (long)nbytes;
  carried[1][device_of(to->context)] += (long)nbytes;
  return 0;
}

// Out of the way: what others measure is the rest.
static __attribute__((noinline, cold)) uint32_t deliver(struct null_qp *qp, const uint64_t *words) {
  uint32_t opcode = words[0] >> 32, status = knobs.delivers > 1 && opcode < 2 ? place(qp, words) : 0;
  struct wc wc = {.opcode = opcode == 1 ? 129 : 128, .imm_data = words[1] >> 32};
  const void *message = NULL;
  if (opcode == 2) wc.byte_len = (uint32_t)words[4], message = (const void *)words[3];
  // Without a receive it is tried again until the sender gives up.
  if (!status && opcode > 0 && arrive(null_nic_qp(qp->dest), wc, message) < 0) status = null_nic_qp(qp->dest) ? 13 : 12;
  if (status) qp->qp.state = 6;
  return status;
}

static void complete(struct null_qp *qp) {
  if (knobs.is_gone) return;
  while (qp->done != qp->posted) {
    uint32_t at = qp->done++ & qp->mask;
    const uint64_t *words = qp->ring[at].words;
    struct wc wc = {.wr_id = words[5], .qp_num = qp->qp.qp_num};
    if (qp->qp.state == 6) {
      if (knobs.flushes_nothing) continue;
      wc.status = 5;
    } else if (knobs.fails_after == 0) {
      wc.status = (uint32_t)knobs.status;
      knobs.fails_after = -1;
      qp->qp.state = 6;
    } else if (knobs.fails_after > 0) {
      knobs.fails_after--;
    }
    if (knobs.delivers && !wc.status) wc.status = deliver(qp, words);
    if (wc.status || words[0] & 2) push(qp->cq, &wc);
  }
}

static int poll_cq(struct null_cq *cq, int count, struct wc *wcs) {
  // The baseline polls a queue of no device.
  if (knobs.breaks_queues && knobs.breaks_queues >> device_of(cq->cq.context) & 1) {
    __atomic_fetch_and(&knobs.breaks_queues, ~(1l << device_of(cq->cq.context)), __ATOMIC_SEQ_CST);
    cq->is_broken = 1;
  }
  if (cq->is_broken) return -2;
  lock();
  if (!knobs.holds)
    // The last queue pair first: one completes before another that was posted to earlier.
    for (struct null_qp *qp; (qp = cq->busy) != NULL;) {
      cq->busy = qp->next_busy;
      qp->is_busy = 0;
      complete(qp);
    }
  int taken = 0;
  while (taken < count && cq->tail != cq->head) wcs[taken++] = cq->wcs[cq->tail++ & cq->mask];
  unlock();
  return taken;
}

static int req_notify_cq(struct null_cq *cq, int solicited_only) {
  (void)solicited_only;
  cq->armed = 1;
  return 0;
}

// Out of the way, as above.
static __attribute__((noinline, cold)) int refused(struct null_qp *qp) {
  if (knobs.refuses > 1) {
    knobs.refuses--;
    return 0;
  }
  if (knobs.is_prompt) {
    lock();
    complete(qp);
    unlock();
  }
  return 1;
}

static inline __attribute__((always_inline))
int post(struct null_qp *qp, struct send_wr *wr, struct send_wr **bad, int moves) {
  knobs.num_posts++;
  if (!knobs.posted_ns) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    knobs.posted_ns = now.tv_sec * 1000000000l + now.tv_nsec;
  }
  if (!qp->is_busy) {
    qp->is_busy = 1;
    qp->next_busy = qp->cq->busy;
    qp->cq->busy = qp;
  }
  for (; wr; wr = wr->next) {
    if ((knobs.refuses && refused(qp)) || qp->posted - qp->done > qp->mask) {
      *bad = wr;
      return ENOMEM;
    }
    uint32_t at = qp->posted++ & qp->mask;
    struct descriptor *to = &qp->ring[at];
    to->words[0] = (uint64_t)wr->opcode << 32 | wr->send_flags;
    to->words[1] = (uint64_t)wr->imm_data << 32 | wr->rkey;
    to->words[2] = wr->remote_addr;
    // Field by field, as mlx5 does to swap their bytes: a wider load would wait for the stores of whoever calls.
    if (wr->num_sge) {
      to->words[3] = wr->sg_list->addr;
      to->words[4] = (uint64_t)wr->sg_list->lkey << 32 | wr->sg_list->length;
    }
    // What is sent inline is read now, by the CPU.
    if (!moves && wr->send_flags & 8 && wr->num_sge) to->words[3] = *(const volatile uint8_t *)(uintptr_t)wr->sg_list->addr;
    if (moves && !wr->num_sge) to->words[4] = 0;
    to->words[5] = wr->wr_id;
    to->words[6] = qp->posted;
    to->words[7] = qp->qp.qp_num;
    knobs.num_requests++;
  }
  return 0;
}

static int post_send(struct null_qp *qp, struct send_wr *wr, struct send_wr **bad) { return post(qp, wr, bad, 0); }
// What is sent inline is read when it is moved: engines keep their sources until then.
static int post_moving(struct null_qp *qp, struct send_wr *wr, struct send_wr **bad) { return post(qp, wr, bad, 1); }

static int post_srq_recv(struct null_srq *srq, struct recv_wr *wr, struct recv_wr **bad) {
  int error = 0;
  lock();
  for (; wr && !error; wr = wr->next) {
    if (srq->head - srq->tail == srq->depth || knobs.refuses_receives == 1) {
      *bad = wr;
      error = ENOMEM;
      break;
    }
    if (knobs.refuses_receives) knobs.refuses_receives--;
    struct receive *to = &srq->receives[srq->head++ % CQ_DEPTH];
    *to = (struct receive){.id = wr->wr_id};
    if (wr->num_sge) to->addr = wr->sg_list->addr, to->length = wr->sg_list->length;
  }
  unlock();
  return error;
}

// Something comes for a queue pair; the number of receives that are left, or -1 without any.
static long arrive(struct qp *of, struct wc wc, const void *message) {
  if (!of) return -1;
  struct null_srq *srq = (struct null_srq *)of->srq;
  if (srq->head == srq->tail) return -1;
  const struct receive *to = &srq->receives[srq->tail++ % CQ_DEPTH];
  wc.wr_id = to->id, wc.qp_num = of->qp_num;
  if (message && wc.byte_len > to->length) {
    wc.status = 1;
    of->state = 6;
  } else if (message) {
    memcpy((void *)to->addr, message, wc.byte_len);
  }
  push((struct null_cq *)of->recv_cq, &wc);
  return srq->head - srq->tail;
}
long null_nic_arrive(struct qp *of, uint32_t imm) {
  return arrive(of, (struct wc){.opcode = 129, .imm_data = __builtin_bswap32(imm)}, NULL);
}
long null_nic_message(struct qp *of, uint32_t status, const void *message, uint32_t length) {
  return arrive(of, (struct wc){.opcode = 128, .status = status, .byte_len = length}, message);
}

// The device says what it likes, of a queue pair.
void null_nic_say(struct qp *of, uint64_t wr_id, uint32_t status, uint32_t nonsense) {
  struct wc wc = {wr_id, status, nonsense, nonsense, nonsense, nonsense, of->qp_num, nonsense, nonsense, 1, 1, 1, 1};
  push((struct null_cq *)of->recv_cq, &wc);
}

// The queue pair of that number on a device, for `null_nic_arrive`.
struct qp *null_nic_qp(uint32_t number) { return &all_qps[number % 65536]->qp; }

// A device announces something: of the queue pair of that number or of what it uses, or without one of itself, wherever
// it is open.
static struct context *contexts;
void null_nic_announce(int device, uint32_t number, uint32_t type) {
  const struct qp *of = number ? null_nic_qp(number) : NULL;
  struct event event = {(void *)1, type};
  if (of) event.element = type == 0 ? (void *)of->send_cq : type == 14 ? (void *)of->srq : (void *)of;
  pthread_mutex_lock(&queues);
  for (struct context *context = contexts; context; context = context->next)
    if ((of ? context == of->context : device_of(context) == device) &&
        send(context->announces_fd, &event, sizeof event, 0) < 0) abort();
  pthread_mutex_unlock(&queues);
}

// A device is gone: its descriptors say so for ever.
void null_nic_remove(int device) {
  pthread_mutex_lock(&queues);
  for (struct context *context = contexts; context; context = context->next)
    if (device_of(context) == device) {
      close(context->announces_fd);
      context->announces_fd = -1;
    }
  pthread_mutex_unlock(&queues);
}

// Bytes that a device has sent (0) or received (1), where bytes are moved.
long null_nic_carried(int device, int way) { return carried[way][device]; }

// What a post takes here, in nanoseconds, with nothing of ours around it: of one request each to so many queue pairs in
// turn, as deep as those of an engine, whose rings pass through the caches.
double null_nic_baseline(int num_qps, int depth, long count) {
  struct null_cq *cq = calloc(1, sizeof *cq);
  struct null_qp **qps = calloc((size_t)num_qps, sizeof *qps);
  cq->mask = mask_of(CQ_DEPTH / 2);
  for (int idx = 0; idx < num_qps; idx++) {
    qps[idx] = aligned_alloc(64, sizeof **qps);
    memset(qps[idx], 0, sizeof **qps);
    qps[idx]->cq = cq;
    qps[idx]->mask = mask_of((uint32_t)depth);
  }
  struct sge sge = {(uint64_t)(uintptr_t)qps, 512, 1};
  struct send_wr wr = {.sg_list = &sge, .num_sge = 1, .opcode = 1, .send_flags = 2, .rkey = 1}, *bad;
  // Called as through the table, not put in place.
  int (*volatile send)(struct null_qp *, struct send_wr *, struct send_wr **) = post_send;
  struct wc wcs[64];
  // So many between two looks at the clock that these do not count.
  int num_posts = num_qps > 63 ? num_qps : 63 / num_qps * num_qps;
  long spent_ns = 0, done = 0;
  for (; done < count; done += num_posts) {
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (int idx = 0; idx < num_posts; idx++) {
      wr.wr_id = (uint64_t)(done + idx);
      wr.remote_addr = 512 * wr.wr_id;
      send(qps[idx % num_qps], &wr, &bad);
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    spent_ns += (to.tv_sec - from.tv_sec) * 1000000000l + to.tv_nsec - from.tv_nsec;
    while (poll_cq(cq, 64, wcs) > 0) {}
  }
  for (int idx = 0; idx < num_qps; idx++) free(qps[idx]);
  free(qps);
  free(cq);
  return (double)spent_ns / (double)done;
}

// ---- the functions ------------------------------------------------------------------------------

void **ibv_get_device_list(int *count) {
  void **list = calloc(NUM_DEVICES + 1, sizeof *list);
  for (int idx = 0; idx < NUM_DEVICES; idx++) list[idx] = devices[idx];
  *count = NUM_DEVICES;
  return list;
}
void ibv_free_device_list(void **list) { free(list); }
const char *ibv_get_device_name(void *device) { return device; }

struct context *ibv_open_device(void *device) {
  struct context *context = calloc(1, sizeof *context);
  context->device = device;
  if (knobs.shut >> device_of(context) & 1) {
    free(context);
    errno = EACCES;
    return NULL;
  }
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
    free(context);
    return NULL;
  }
  context->cmd_fd = -1, context->async_fd = pair[0], context->announces_fd = pair[1];
  pthread_mutex_lock(&queues);
  context->next = contexts, contexts = context;
  pthread_mutex_unlock(&queues);
  context->ops.op[11] = poll_cq;
  context->ops.op[12] = req_notify_cq;
  context->ops.op[20] = post_srq_recv;
  context->ops.op[25] = knobs.delivers > 1 ? post_moving : post_send;
  return context;
}
int ibv_close_device(struct context *context) {
  pthread_mutex_lock(&queues);
  struct context **at = &contexts;
  while (*at != context) at = &(*at)->next;
  *at = context->next;
  pthread_mutex_unlock(&queues);
  close(context->async_fd);
  if (context->announces_fd >= 0) close(context->announces_fd);
  free(context);
  return 0;
}
int ibv_get_async_event(struct context *context, struct event *event) {
  __atomic_add_fetch(&knobs.num_heard, 1, __ATOMIC_SEQ_CST);
  if (read(context->async_fd, event, sizeof *event) != sizeof *event) return -1;
  __atomic_add_fetch(&knobs.num_unheeded, 1, __ATOMIC_SEQ_CST);
  return 0;
}
void ibv_ack_async_event(struct event *event) {
  (void)event;
  __atomic_sub_fetch(&knobs.num_unheeded, 1, __ATOMIC_SEQ_CST);
}

// The last device has two ports.
static char num_ports(const struct context *context) {
  return context->device == devices[NUM_DEVICES - 1] ? 2 : 1;
}

int ibv_query_device(struct context *context, char *attr) {
  memset(attr, 0, 232);
  *(int *)(attr + 108) = 65536;         // max_qp
  *(int *)(attr + 112) = DEPTH;         // max_qp_wr
  *(int *)(attr + 132) = knobs.max_cqe ? (int)knobs.max_cqe : CQ_DEPTH / 2;
  *(int *)(attr + 216) = CQ_DEPTH / 2;  // max_srq_wr
  attr[227] = num_ports(context);       // phys_port_cnt
  return 0;
}
int ibv_query_port(struct context *context, uint8_t port, char *attr) {
  memset(attr, 0, 48);
  long device = 1l << device_of(context);
  *(uint32_t *)(attr + 0) = knobs.port_is_down || knobs.ports_down & device ? 1 : 4;
  *(uint32_t *)(attr + 4) = *(uint32_t *)(attr + 8) = 5;
  *(int *)(attr + 12) = 8;
  *(uint32_t *)(attr + 20) = 1u << 30;
  *(uint16_t *)(attr + 34) = (uint16_t)knobs.lid;
  attr[43] = knobs.narrow & device ? 1 : 2, attr[44] = 64, attr[46] = knobs.is_infiniband ? 1 : 2;
  return port >= 1 && port <= num_ports(context) ? 0 : EINVAL;
}
int ibv_query_gid(struct context *context, uint8_t port, int index, uint8_t *gid) {
  (void)context;
  static const uint8_t raw[16] = {[10] = 0xff, [11] = 0xff, [12] = 10, [15] = 1};
  memcpy(gid, raw, 16);
  return index == knobs.gid_index && port != knobs.port_without_gid ? 0 : EINVAL;
}
struct pd *ibv_alloc_pd(struct context *context) {
  struct pd *pd = calloc(1, sizeof *pd);
  pd->context = context;
  return pd;
}
int ibv_dealloc_pd(struct pd *pd) { free(pd); return 0; }
static struct mr *memory(struct pd *pd, void *addr, size_t length) {
  struct mr *mr = calloc(1, sizeof *mr);
  mr->pd = pd, mr->addr = addr, mr->length = length;
  mr->lkey = mr->rkey = __atomic_add_fetch(&next_number, 1, __ATOMIC_RELAXED);
  all_mrs[mr->rkey % 65536] = mr;
  __atomic_add_fetch(&knobs.num_memories, 1, __ATOMIC_SEQ_CST);
  __atomic_add_fetch(&knobs.live_memories, 1, __ATOMIC_SEQ_CST);
  return mr;
}
struct mr *ibv_reg_mr(struct pd *pd, void *addr, size_t length, int access) {
  if (access & 2) __atomic_add_fetch(&knobs.num_writable, 1, __ATOMIC_SEQ_CST);
  if (knobs.no_memory || knobs.no_address) {
    errno = knobs.no_memory ? ENOMEM : (int)knobs.no_address;
    return NULL;
  }
  if (knobs.pinning_ms) usleep((useconds_t)knobs.pinning_ms * 1000);
  long now = __atomic_add_fetch(&knobs.num_pinning, 1, __ATOMIC_SEQ_CST);
  for (long most = knobs.most_pinning; now > most;)
    if (__atomic_compare_exchange_n(&knobs.most_pinning, &most, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) break;
  for (int ms = 0; ms < 1000 && __atomic_load_n(&knobs.most_pinning, __ATOMIC_SEQ_CST) < knobs.pins_at_once; ms++)
    usleep(1000);
  __atomic_sub_fetch(&knobs.num_pinning, 1, __ATOMIC_SEQ_CST);
  knobs.access = access;
  return memory(pd, addr, length);
}
struct mr *ibv_reg_mr_iova2(struct pd *pd, void *addr, size_t length, uint64_t iova, unsigned access) {
  if (iova != (uintptr_t)addr || (knobs.no_relaxed && access & 1 << 20)) {
    errno = knobs.no_relaxed ? (int)knobs.no_relaxed : EINVAL;
    return NULL;
  }
  return ibv_reg_mr(pd, addr, length, (int)access);
}
struct mr *ibv_reg_dmabuf_mr(struct pd *pd, uint64_t offset, size_t length, uint64_t iova, int fd, int access) {
  struct stat stat;
  if (knobs.no_dmabuf || fstat(fd, &stat) || offset + length > (uint64_t)stat.st_size) {
    errno = knobs.no_dmabuf ? (int)knobs.no_dmabuf : EINVAL;
    return NULL;
  }
  knobs.dmabuf_word = 0;
  if (pread(fd, &knobs.dmabuf_word, length < 8 ? length : 8, (off_t)offset) < 0) return NULL;
  knobs.dmabuf_offset = (long)offset, knobs.dmabuf_length = (long)length;
  knobs.dmabuf_iova = (long)iova, knobs.dmabuf_access = access;
  return memory(pd, (void *)(uintptr_t)iova, length);
}
int ibv_dereg_mr(struct mr *mr) {
  if (knobs.keeps_memory) return (int)knobs.keeps_memory;
  lock();
  all_mrs[mr->rkey % 65536] = NULL;
  unlock();
  __atomic_sub_fetch(&knobs.live_memories, 1, __ATOMIC_SEQ_CST);
  free(mr);
  return 0;
}

struct channel *ibv_create_comp_channel(struct context *context) {
  struct channel *channel = calloc(1, sizeof *channel);
  channel->context = context;
  channel->fd = eventfd(0, EFD_CLOEXEC);
  return channel;
}
int ibv_destroy_comp_channel(struct channel *channel) { close(channel->fd); free(channel); return 0; }
int ibv_get_cq_event(struct channel *channel, void **cq, void **context) {
  uint64_t count;
  *cq = *context = NULL;
  return read(channel->fd, &count, 8) == 8 ? 0 : -1;
}
void ibv_ack_cq_events(void *cq, unsigned count) { (void)cq, (void)count; }

struct cq *ibv_create_cq(struct context *context, int cqe, void *own, struct channel *channel, int vector) {
  (void)vector;
  if (knobs.no_queues >> device_of(context) & 1) {
    errno = ENOMEM;
    return NULL;
  }
  struct null_cq *cq = calloc(1, sizeof *cq);
  cq->cq.context = context, cq->cq.channel = channel, cq->cq.cq_context = own, cq->cq.cqe = cqe, cq->mask = mask_of(cqe);
  return &cq->cq;
}
int ibv_destroy_cq(struct cq *cq) { free(cq); return 0; }
struct srq *ibv_create_srq(struct pd *pd, struct srq_init *init) {
  struct null_srq *srq = calloc(1, sizeof *srq);
  srq->srq.srq_context = init->srq_context, srq->depth = init->max_wr;
  srq->srq.pd = pd, srq->srq.context = pd->context;
  return &srq->srq;
}
int ibv_destroy_srq(struct srq *srq) { free(srq); return 0; }

struct qp *ibv_create_qp(struct pd *pd, struct init *init) {
  if (knobs.no_queue_pairs) {
    errno = ENOMEM;
    return NULL;
  }
  struct null_qp *qp = aligned_alloc(64, sizeof *qp);
  memset(qp, 0, sizeof *qp);
  struct null_cq *cq = (struct null_cq *)init->send_cq;
  qp->qp.context = pd->context, qp->qp.qp_context = init->qp_context, qp->qp.pd = pd, qp->qp.srq = init->srq;
  qp->qp.send_cq = init->send_cq, qp->qp.recv_cq = init->recv_cq;
  qp->qp.qp_num = __atomic_add_fetch(&next_number, 1, __ATOMIC_RELAXED);
  qp->cq = cq, qp->mask = mask_of(init->cap[0]);
  all_qps[qp->qp.qp_num % 65536] = qp;
  return &qp->qp;
}
int ibv_modify_qp(struct qp *qp, uint32_t *attr, int mask) {
  if (knobs.is_gone) return EIO;
  const uint8_t *bytes = (const uint8_t *)attr;
  if (mask & 1 << 4) knobs.pkey_index = bytes[120] | bytes[121] << 8;
  if (mask & 1 << 7) knobs.sgid_index = bytes[76], knobs.traffic_class = bytes[78], knobs.service_level = bytes[82];
  if (mask & 1 << 7) knobs.dlid = bytes[80] | bytes[81] << 8, knobs.is_global = bytes[85];
  if (mask & 1 << 9) knobs.timeout = bytes[130];
  if (mask & 1 << 10) knobs.retry_count = bytes[131];
  if (mask & 1 << 11) knobs.rnr_retry = bytes[132];
  if (mask & 1 << 15) knobs.rnr_timer = bytes[128];
  if (mask & 1) qp->state = attr[0];
  if (mask & 1 << 20) ((struct null_qp *)qp)->dest = attr[7];
  return 0;
}
int ibv_destroy_qp(struct qp *of) {
  if (knobs.keeps_queue_pairs) return (int)knobs.keeps_queue_pairs;
  struct null_qp *qp = (struct null_qp *)of;
  lock();
  // As mlx5 does it: its completions go with it.
  struct null_cq *cq = qp->cq;
  uint32_t kept = cq->tail;
  for (uint32_t at = cq->tail; at != cq->head; at++)
    if (cq->wcs[at & cq->mask].qp_num != of->qp_num) cq->wcs[kept++ & cq->mask] = cq->wcs[at & cq->mask];
  cq->head = kept;
  struct null_qp **at = &cq->busy;
  while (*at && *at != qp) at = &(*at)->next_busy;
  if (*at) *at = qp->next_busy;
  all_qps[of->qp_num % 65536] = NULL;
  unlock();
  free(qp);
  return 0;
}
