// A libcuda without a GPU. Its memory lies at addresses that nobody may touch, so that a test dies where the CPU reads
// or writes what only a NIC may; what is in it is kept aside, and exported as a file that stands for the dmabuf.
//
// -DBEFORE_11_7 leaves out what a driver of that time lacks, -DANCIENT more than can be missed.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kSuccess, kInvalidValue, kNotSupported = 801, kArena = 64 << 20, kPage = 4096, kMaxAllocations = 64 };

// What the driver is, what goes wrong, and what was seen. `fake.rs` has the same.
struct fake {
  int64_t num_gpus, can_do_rdma, exports_dmabuf, ordering, flush_options;  // the GPUs'
  int64_t init_code, pointer_code, export_code, flush_code;                // what these calls return
  int64_t exports, flushes, retained, synced;                              // calls that went well
  int64_t unbalanced;                                                      // contexts pushed and not popped
};
struct fake fake_cuda = {.num_gpus = 2, .can_do_rdma = 1, .exports_dmabuf = 1, .ordering = 100, .flush_options = 1};

// ---- memory -----------------------------------------------------------------------------------------------------

// Of a reservation only the first quarter is mapped.
enum kind { kDevice, kManaged, kHost, kIncapable, kReserved };
static struct allocation { uint64_t start, size; int kind, gpu; } allocations[kMaxAllocations];
static int num_allocations, content = -1;
static uint64_t arena, used;

static uint64_t base(void) {
  if (!arena) {
    arena = (uint64_t)mmap(NULL, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    content = memfd_create("fake-gpu-memory", MFD_CLOEXEC);
    if (ftruncate(content, kArena)) return 0;
    used = kPage;
  }
  return arena;
}

// Directly behind the last one; 0 when there is no room.
uint64_t fake_cuda_alloc(uint64_t nbytes, int kind, int gpu) {
  if (!base() || used + nbytes > kArena || num_allocations == kMaxAllocations) return 0;
  struct allocation *it = &allocations[num_allocations++];
  *it = (struct allocation){arena + used, nbytes, kind, gpu};
  used += nbytes;
  return it->start;
}
// Moves on to that offset of the next page.
void fake_cuda_align(uint64_t offset) { base(), used = (used + kPage - 1) / kPage * kPage + offset; }
void fake_cuda_free(uint64_t start) {
  for (int idx = 0; idx < num_allocations; idx++)
    if (allocations[idx].start == start) allocations[idx].size = 0;
}
int64_t fake_cuda_write(uint64_t to, const void *bytes, uint64_t nbytes) { return pwrite(content, bytes, nbytes, to - base()); }

static struct allocation *at(uint64_t address) {
  for (int idx = 0; idx < num_allocations; idx++)
    if (address - allocations[idx].start < allocations[idx].size) return &allocations[idx];
  return NULL;
}

int cuPointerGetAttribute(void *to, int attribute, uint64_t address) {
  if (fake_cuda.pointer_code) return (int)fake_cuda.pointer_code;
  struct allocation *it = at(address);
  if (!it) return kInvalidValue;
  switch (attribute) {
    case 2: *(unsigned *)to = it->kind == kHost ? 1 : 2; break;
    case 8: *(unsigned *)to = it->kind == kManaged; break;
    case 9: *(int *)to = it->gpu; break;
    case 11: *(uint64_t *)to = it->start; break;
    case 12: *(uint64_t *)to = it->kind == kReserved ? it->size * 4 : it->size; break;
    case 15: *(unsigned *)to = it->kind != kIncapable; break;
    // Small allocations share a mapping.
    case 18: *(uint64_t *)to = it->kind == kReserved ? it->size : kArena; break;
    case 19: *(uint64_t *)to = it->kind == kReserved ? it->start : base(); break;
    default: return kInvalidValue;
  }
  return kSuccess;
}
int cuPointerSetAttribute(const void *from, int attribute, uint64_t address) {
  if (attribute != 6 || !at(address)) return kInvalidValue;
  fake_cuda.synced += *(const unsigned *)from;
  return kSuccess;
}

// ---- GPUs -------------------------------------------------------------------------------------------------------

static __thread void *stack[8];
static __thread int depth;

int cuInit(unsigned flags) { return flags ? kInvalidValue : (int)fake_cuda.init_code; }
int cuDriverGetVersion(int *to) { *to = 12040; return kSuccess; }
int cuGetErrorName(int code, const char **to) { *to = code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_FAKE"; return kSuccess; }
int cuGetErrorString(int code, const char **to) { *to = code == 719 ? "unspecified launch failure" : "as the test wants it"; return kSuccess; }
int cuDeviceGetCount(int *to) { *to = (int)fake_cuda.num_gpus; return kSuccess; }
int cuDeviceGet(int *to, int ordinal) { *to = ordinal + 40; return kSuccess; }
int cuDeviceGetName(char *to, int len, int device) { snprintf(to, len, "Fake H100 %d", device - 40); return kSuccess; }
#ifndef ANCIENT
int cuDeviceGetUuid_v2(uint8_t *to, int device) {
  for (int idx = 0; idx < 16; idx++) to[idx] = (uint8_t)(idx * 16 + device - 40);
  return kSuccess;
}
#endif
int cuDeviceGetPCIBusId(char *to, int len, int device) { snprintf(to, len, "0000:%02X:00.0", 0x5A + device - 40); return kSuccess; }
int cuDeviceGetAttribute(int *to, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 116: *to = (int)fake_cuda.can_do_rdma; break;
    case 117: *to = (int)fake_cuda.flush_options; break;
    case 118: *to = (int)fake_cuda.ordering; break;
    case 124: *to = (int)fake_cuda.exports_dmabuf; break;
    default: return kInvalidValue;
  }
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(void **to, int device) {
  *to = (void *)(uintptr_t)(device * 1000);
  fake_cuda.retained++;
  return kSuccess;
}
int cuCtxPushCurrent_v2(void *context) {
  if (!context || depth == 8) return kInvalidValue;
  stack[depth++] = context;
  fake_cuda.unbalanced++;
  return kSuccess;
}
int cuCtxPopCurrent_v2(void **to) {
  if (!depth) return kInvalidValue;
  *to = stack[--depth];
  fake_cuda.unbalanced--;
  return kSuccess;
}

#if !defined ANCIENT && !defined BEFORE_11_7
int cuMemGetHandleForAddressRange(int *to, uint64_t start, size_t nbytes, unsigned type, uint64_t flags) {
  if (fake_cuda.export_code) return (int)fake_cuda.export_code;
  if (!fake_cuda.exports_dmabuf) return kNotSupported;
  if (type != 1 || flags || start % kPage || nbytes % kPage || start < base() || start + nbytes > base() + kArena) return kInvalidValue;
  char page[kPage];
  int fd = memfd_create("fake-dmabuf", MFD_CLOEXEC);
  for (size_t done = 0; done < nbytes; done += kPage)
    if (pread(content, page, kPage, start - base() + done) != kPage || write(fd, page, kPage) != kPage) return kInvalidValue;
  fake_cuda.exports++;
  *to = fd;
  return kSuccess;
}
int cuFlushGPUDirectRDMAWrites(unsigned target, unsigned scope) {
  if (target || scope != 100 || !depth) return 201;
  if (fake_cuda.flush_code) return (int)fake_cuda.flush_code;
  fake_cuda.flushes++;
  return kSuccess;
}
#endif
