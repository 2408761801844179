// Does the bed itself work? RDMA WRITE WITH IMMEDIATE between two processes, straight on libibverbs.
//
//     cc -O1 -Wall -Wextra -o smoke smoke.c -libverbs
//     smoke NIC_A NIC_B [LINK]
//
// A writes, B checks every byte when the immediate has come: each size once, then a stream; a write with a wrong key
// must be refused. LINK goes down in the middle of the stream, and up again. When this fails, the bed is broken; when
// only the engine's cases fail, the engine is.
#include <errno.h>
#include <infiniband/verbs.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REQUIRE(condition, ...) \
  do { \
    if (!(condition)) fail(__LINE__, #condition, "" __VA_ARGS__); \
  } while (0)

enum { kRegionBytes = 1 << 20, kSlotBytes = 256, kNumSlots = 64, kNumStreamed = 2000, kGidIdx = 1, kDeadlineS = 60 };
static const uint32_t kSizes[] = {0, 1, 63, 64, 1023, 1024, 1025, 4096, 65537, kRegionBytes};
enum { kNumSizes = sizeof kSizes / sizeof *kSizes };

static const char *side = "set-up";

// What one side tells the other to be reached.
struct Address {
  uint64_t region;
  uint32_t key, qp_num;
  union ibv_gid gid;
};

struct Side {
  struct ibv_context *nic;
  struct ibv_cq *cq;
  struct ibv_qp *qp;
  struct ibv_mr *mr;
  uint8_t *bytes;
  struct Address peer;
  int socket;
};

static void fail(int line, const char *condition, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "smoke %s, line %d: %s (%s) ", side, line, condition, strerror(errno));
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  exit(1);
}

static uint8_t pattern(uint32_t seed, uint32_t at) { return (uint8_t)((at * 2654435761u + seed * 40503u) >> 11); }

static void fill(uint8_t *bytes, uint32_t nbytes, uint32_t seed) {
  for (uint32_t at = 0; at < nbytes; at++) bytes[at] = pattern(seed, at);
}

static void check(const uint8_t *bytes, uint32_t nbytes, uint32_t seed) {
  for (uint32_t at = 0; at < nbytes; at++)
    REQUIRE(bytes[at] == pattern(seed, at), "byte %u of %u, seed %u", at, nbytes, seed);
}

// Both sides pass here together.
static void meet(struct Side *s) {
  char byte = 0;
  REQUIRE(write(s->socket, &byte, 1) == 1 && read(s->socket, &byte, 1) == 1, "the other side has gone");
}

static void open_nic(struct Side *s, const char *name) {
  int num_nics = 0;
  struct ibv_device **nics = ibv_get_device_list(&num_nics);
  REQUIRE(nics);
  for (int i = 0; i < num_nics; i++)
    if (!strcmp(ibv_get_device_name(nics[i]), name)) s->nic = ibv_open_device(nics[i]);
  REQUIRE(s->nic, "no NIC %s among %d", name, num_nics);
  struct ibv_pd *pd = ibv_alloc_pd(s->nic);
  REQUIRE(pd);
  s->cq = ibv_create_cq(s->nic, 256, NULL, NULL, 0);
  REQUIRE(s->cq);
  s->mr = ibv_reg_mr(pd, s->bytes, kRegionBytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
  REQUIRE(s->mr);
  struct ibv_qp_init_attr qp = {.send_cq = s->cq, .recv_cq = s->cq, .qp_type = IBV_QPT_RC};
  qp.cap = (struct ibv_qp_cap){.max_send_wr = kNumSlots, .max_recv_wr = 2 * kNumSlots, .max_send_sge = 1};
  s->qp = ibv_create_qp(pd, &qp);
  REQUIRE(s->qp);
}

static void post_receive(struct Side *s) {
  struct ibv_recv_wr receive = {0}, *bad;
  REQUIRE(!ibv_post_recv(s->qp, &receive, &bad));
}

static void connect_qp(struct Side *s) {
  struct Address own = {(uintptr_t)s->bytes, s->mr->rkey, s->qp->qp_num, {{0}}};
  REQUIRE(!ibv_query_gid(s->nic, 1, kGidIdx, &own.gid));
  REQUIRE(write(s->socket, &own, sizeof own) == sizeof own);
  REQUIRE(read(s->socket, &s->peer, sizeof s->peer) == sizeof s->peer);

  struct ibv_qp_attr init = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE};
  REQUIRE(!ibv_modify_qp(s->qp, &init, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
  struct ibv_qp_attr ready_to_receive = {
      .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_4096, .dest_qp_num = s->peer.qp_num, .min_rnr_timer = 12};
  ready_to_receive.max_dest_rd_atomic = 1;
  ready_to_receive.ah_attr = (struct ibv_ah_attr){
      .is_global = 1, .port_num = 1, .grh = {.dgid = s->peer.gid, .sgid_index = kGidIdx, .hop_limit = 64}};
  REQUIRE(!ibv_modify_qp(s->qp, &ready_to_receive,
                         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
  // 4.096 us * 2^17 = 0.5 s, seven times: longer than the link is down.
  struct ibv_qp_attr ready_to_send = {
      .qp_state = IBV_QPS_RTS, .timeout = 17, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1};
  REQUIRE(!ibv_modify_qp(s->qp, &ready_to_send,
                         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                             IBV_QP_MAX_QP_RD_ATOMIC));
  for (int i = 0; i < 2 * kNumSlots; i++) post_receive(s);
  meet(s);
}

static struct ibv_wc completion(struct Side *s) {
  struct ibv_wc wc;
  time_t until = time(NULL) + kDeadlineS;
  for (;;) {
    int n = ibv_poll_cq(s->cq, 1, &wc);
    REQUIRE(n >= 0);
    if (n) return wc;
    REQUIRE(time(NULL) < until, "no completion in %d s", kDeadlineS);
  }
}

static void post_write(struct Side *s, uint32_t at, uint32_t nbytes, uint32_t imm, uint32_t key) {
  struct ibv_sge bytes = {.addr = (uintptr_t)s->bytes + at, .length = nbytes, .lkey = s->mr->lkey};
  struct ibv_send_wr write = {.sg_list = &bytes, .num_sge = nbytes > 0, .send_flags = IBV_SEND_SIGNALED}, *bad;
  write.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
  write.imm_data = htobe32(imm);
  write.wr.rdma.remote_addr = s->peer.region + at;
  write.wr.rdma.rkey = key;
  REQUIRE(!ibv_post_send(s->qp, &write, &bad));
}

static void expect_sent(struct Side *s) {
  struct ibv_wc wc = completion(s);
  REQUIRE(wc.status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc.status));
}

static uint32_t expect_imm(struct Side *s) {
  struct ibv_wc wc = completion(s);
  REQUIRE(wc.status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc.status));
  REQUIRE(wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM && (wc.wc_flags & IBV_WC_WITH_IMM));
  post_receive(s);
  return be32toh(wc.imm_data);
}

// The link is down when this returns, and up again some time later.
static void flap(const char *link) {
  char command[200];
  snprintf(command, sizeof command, "ip link set %s down; (sleep 0.3; ip link set %s up) &", link, link);
  REQUIRE(!system(command));
}

// A lap of slots is written, checked and acknowledged before the next one overwrites it.
static void stream(struct Side *s, int is_writer, const char *flapped) {
  for (uint32_t start = 0; start < kNumStreamed; start += kNumSlots) {
    if (flapped && start == kNumStreamed / 2 / kNumSlots * kNumSlots) flap(flapped);
    for (uint32_t slot = 0; slot < kNumSlots && is_writer; slot++) {
      fill(s->bytes + slot * kSlotBytes, kSlotBytes, start + slot);
      post_write(s, slot * kSlotBytes, kSlotBytes, start + slot, s->peer.key);
    }
    for (uint32_t slot = 0; slot < kNumSlots; slot++) {
      if (is_writer) {
        expect_sent(s);
      } else {
        REQUIRE(expect_imm(s) == start + slot);
        check(s->bytes + slot * kSlotBytes, kSlotBytes, start + slot);
      }
    }
    meet(s);
  }
}

static void run_writer(struct Side *s, const char *flapped) {
  for (uint32_t i = 0; i < kNumSizes; i++) {
    fill(s->bytes, kSizes[i], i);
    post_write(s, 0, kSizes[i], i, s->peer.key);
    expect_sent(s);
    meet(s);
  }
  stream(s, 1, flapped);
  post_write(s, 0, 1, 0, s->peer.key ^ 0x5500);
  struct ibv_wc wc = completion(s);
  REQUIRE(wc.status == IBV_WC_REM_ACCESS_ERR, "%s", ibv_wc_status_str(wc.status));
  meet(s);
}

static void run_reader(struct Side *s) {
  for (uint32_t i = 0; i < kNumSizes; i++) {
    REQUIRE(expect_imm(s) == i);
    check(s->bytes, kSizes[i], i);
    meet(s);
  }
  stream(s, 0, NULL);
  meet(s);
}

int main(int argc, char **argv) {
  REQUIRE(argc == 3 || argc == 4, "usage: smoke NIC_A NIC_B [NETDEV]");
  int sockets[2];
  REQUIRE(!socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
  pid_t reader = fork();
  REQUIRE(reader >= 0);
  struct Side s = {.socket = sockets[reader == 0]};
  close(sockets[reader != 0]);
  side = reader == 0 ? "reader" : "writer";
  if (reader == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
  s.bytes = mmap(NULL, kRegionBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(s.bytes != MAP_FAILED);
  open_nic(&s, argv[reader == 0 ? 2 : 1]);
  connect_qp(&s);
  if (reader == 0) {
    run_reader(&s);
    return 0;
  }
  run_writer(&s, argc == 4 ? argv[3] : NULL);
  int status = 1;
  REQUIRE(waitpid(reader, &status, 0) == reader && status == 0, "the reader failed");
  printf("%s -> %s: %d sizes and a stream of %d, every byte\n", argv[1], argv[2], kNumSizes, kNumStreamed);
  return 0;
}
