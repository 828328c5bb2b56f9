/* A libcuda.so.1 for machines without a GPU: as much of the driver as etha_ray calls, with memory of the host for that of the devices.
 *
 * What other processes open are real files and descriptors, so handles, permissions, and who keeps what alive are real too. Like the driver
 * it wants to be initialised, and a context to be current on the calling thread; memory that was mapped cannot be touched before its use
 * is allowed. FAKE_CUDA_DEVICES lists the GPUs of the host that this process sees ("0,1"); FAKE_CUDA_NO_PEERS forbids peer access.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct { char bytes[16]; } CUuuid;
typedef struct { char reserved[64]; } CUipcMemHandle;
typedef struct { int type, id; } CUmemLocation;
typedef struct { CUmemLocation location; int flags; } CUmemAccessDesc;
typedef struct { int type, requestedHandleTypes; CUmemLocation location; void *win32; unsigned char flags[8]; } CUmemAllocationProp;
typedef unsigned long long CUmemGenericAllocationHandle;

enum { OK = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, MAP_FAILED_ = 205,
       NO_PEERS = 217, INVALID_HANDLE = 400, NOT_PERMITTED = 800, NOT_SUPPORTED = 801 };
enum { FREE, MALLOC, POOL, OPENED, RESERVED, MAPPED };

typedef struct { int kind; CUdeviceptr base; size_t size; int fd, device, refs, chunk; unsigned long long id; char handle[64]; } Range;
typedef struct { int fd, device, handles, mappings, types; size_t size; } Chunk;
typedef struct { char magic[8]; long long pid, fd, device; unsigned long long size, id; } Ipc;

#define LIMIT 4096
static Range ranges[LIMIT];
static Chunk chunks[LIMIT];
static unsigned long long ids = 1;
static int initialised, count, devices[8];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int contexts[16], depth;
static char failing[64];
static int failing_with;

static CUresult refused(const char *name, int wants_context) {
  if (failing[0] && !strcmp(failing, name)) { failing[0] = 0; return failing_with; }
  if (!initialised) return NOT_INITIALIZED;
  return wants_context && !depth ? INVALID_CONTEXT : OK;
}
#define ENTER(wants_context) do { CUresult r_ = refused(__func__, wants_context); if (r_) return r_; pthread_mutex_lock(&lock); } while (0)
#define LEAVE(result) do { int r_ = (result); pthread_mutex_unlock(&lock); return r_; } while (0)

static Range *find(CUdeviceptr at, int first, int last) {
  for (int i = 0; i < LIMIT; i++)
    if (ranges[i].kind >= first && ranges[i].kind <= last && at >= ranges[i].base && at < ranges[i].base + ranges[i].size) return &ranges[i];
  return NULL;
}
static Range *add(int kind, CUdeviceptr base, size_t size, int fd, int device) {
  for (int i = 0; i < LIMIT; i++)
    if (!ranges[i].kind) {
      ranges[i] = (Range){.kind = kind, .base = base, .size = size, .fd = fd, .device = device, .refs = 1, .chunk = -1, .id = ids++};
      return &ranges[i];
    }
  abort();
}
static size_t paged(size_t size) { return (size + 4095) & ~(size_t)4095; }
static int file_of(size_t size) {
  int fd = memfd_create("fake gpu", 0);
  if (ftruncate(fd, paged(size))) abort();
  return fd;
}
static void drop_chunk(int at) {
  if (!chunks[at].handles && !chunks[at].mappings) { close(chunks[at].fd); chunks[at].size = 0; }
}
static int add_chunk(int fd, size_t size, int device, int types) {
  for (int i = 0; i < LIMIT; i++)
    if (!chunks[i].size) { chunks[i] = (Chunk){fd, device, 1, 0, types, size}; return i; }
  abort();
}

/* --- for tests */
void fake_fail(const char *call, int code) { snprintf(failing, sizeof failing, "%s", call); failing_with = code; }
int fake_device_of(CUdeviceptr at) { Range *r = find(at, MALLOC, OPENED); if (!r) r = find(at, MAPPED, MAPPED); return r ? r->device : -1; }
int fake_held(void) { /* what this process took of others and has not given back, and chunks */
  int held = 0;
  for (int i = 0; i < LIMIT; i++) held += (ranges[i].kind >= OPENED) + (chunks[i].size && chunks[i].handles);
  return held;
}

/* --- the driver */
CUresult cuInit(unsigned flags) {
  const char *list = getenv("FAKE_CUDA_DEVICES");
  char text[64];
  snprintf(text, sizeof text, "%s", list ? list : "0");
  count = 0;
  for (char *save, *one = strtok_r(text, ",", &save); one; one = strtok_r(NULL, ",", &save)) devices[count++] = atoi(one);
  initialised = 1;
  return flags ? INVALID_VALUE : OK;
}
CUresult cuGetErrorName(CUresult error, const char **text) {
  static const struct { int code; const char *name; } names[] = {
      {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {3, "CUDA_ERROR_NOT_INITIALIZED"}, {101, "CUDA_ERROR_INVALID_DEVICE"},
      {201, "CUDA_ERROR_INVALID_CONTEXT"}, {205, "CUDA_ERROR_MAP_FAILED"}, {217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"},
      {400, "CUDA_ERROR_INVALID_HANDLE"}, {800, "CUDA_ERROR_NOT_PERMITTED"}, {801, "CUDA_ERROR_NOT_SUPPORTED"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == error) { *text = names[i].name; return OK; }
  *text = NULL;
  return INVALID_VALUE;
}
CUresult cuDeviceGetCount(int *found) { ENTER(0); *found = count; LEAVE(OK); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER(0);
  if (ordinal < 0 || ordinal >= count) LEAVE(INVALID_DEVICE);
  *device = ordinal;
  LEAVE(OK);
}
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
  ENTER(0);
  if (device < 0 || device >= count) LEAVE(INVALID_DEVICE);
  memset(uuid, 0xa0 + devices[device], sizeof *uuid);
  LEAVE(OK);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  ENTER(0);
  if (device < 0 || device >= count) LEAVE(INVALID_DEVICE);
  *context = (CUcontext)(intptr_t)(device + 1);
  LEAVE(OK);
}
CUresult cuCtxPushCurrent_v2(CUcontext context) { ENTER(0); contexts[depth++] = (int)(intptr_t)context - 1; LEAVE(OK); }
CUresult cuCtxPopCurrent_v2(CUcontext *context) {
  ENTER(1);
  *context = (CUcontext)(intptr_t)(contexts[--depth] + 1);
  LEAVE(OK);
}
static CUresult allocate(CUdeviceptr *at, size_t size, int kind) {
  int fd = file_of(size);
  void *base = mmap(NULL, paged(size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return 2;
  *at = (CUdeviceptr)(uintptr_t)base;
  add(kind, *at, size, fd, contexts[depth - 1]);
  return OK;
}
CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t size) { ENTER(1); LEAVE(allocate(at, size, MALLOC)); }
CUresult cuMemAllocAsync(CUdeviceptr *at, size_t size, void *stream) { (void)stream; ENTER(1); LEAVE(allocate(at, size, POOL)); }
CUresult cuMemFree_v2(CUdeviceptr at) {
  ENTER(1);
  Range *r = find(at, MALLOC, POOL);
  if (!r || r->base != at) LEAVE(INVALID_VALUE);
  munmap((void *)(uintptr_t)r->base, paged(r->size));
  close(r->fd);
  r->kind = FREE;
  LEAVE(OK);
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr at) {
  ENTER(1);
  Range *r = find(at, MALLOC, OPENED);
  if (!r) r = find(at, MAPPED, MAPPED);
  if (!r) LEAVE(INVALID_VALUE);
  *base = r->base;
  *size = r->size;
  LEAVE(OK);
}
CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr at) {
  ENTER(1);
  Range *r = find(at, MALLOC, OPENED);
  if (!r) r = find(at, MAPPED, MAPPED);
  if (!r) LEAVE(INVALID_VALUE);
  if (attribute == 7) *(unsigned long long *)data = r->id;
  else if (attribute == 10) *(unsigned *)data = r->kind == MALLOC;
  else LEAVE(INVALID_VALUE);
  LEAVE(OK);
}
CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr at) {
  ENTER(1);
  Range *r = find(at, MALLOC, MALLOC);
  if (!r) LEAVE(INVALID_VALUE);
  Ipc ipc = {"fakecud", getpid(), r->fd, devices[r->device], r->size, r->id};
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &ipc, sizeof ipc);
  LEAVE(OK);
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *at, CUipcMemHandle handle, unsigned flags) {
  ENTER(1);
  Ipc ipc;
  memcpy(&ipc, &handle, sizeof ipc);
  if (flags != 1 || strcmp(ipc.magic, "fakecud")) LEAVE(INVALID_VALUE);
  if (ipc.pid == getpid()) LEAVE(INVALID_CONTEXT);
  if (getenv("FAKE_CUDA_NO_PEERS") && ipc.device != devices[contexts[depth - 1]]) LEAVE(NO_PEERS);
  for (int i = 0; i < LIMIT; i++)
    if (ranges[i].kind == OPENED && !memcmp(ranges[i].handle, &handle, 64)) { ranges[i].refs++; *at = ranges[i].base; LEAVE(OK); }
  char path[64];
  snprintf(path, sizeof path, "/proc/%lld/fd/%lld", ipc.pid, ipc.fd);
  int fd = open(path, O_RDWR | O_CLOEXEC);
  struct stat info;
  if (fd < 0) LEAVE(INVALID_HANDLE);
  if (fstat(fd, &info) || (unsigned long long)info.st_size != paged(ipc.size)) { close(fd); LEAVE(INVALID_HANDLE); }
  void *base = mmap(NULL, paged(ipc.size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (base == MAP_FAILED) LEAVE(MAP_FAILED_);
  *at = (CUdeviceptr)(uintptr_t)base;
  memcpy(add(OPENED, *at, ipc.size, -1, contexts[depth - 1])->handle, &handle, 64);
  LEAVE(OK);
}
CUresult cuIpcCloseMemHandle(CUdeviceptr at) {
  ENTER(1);
  Range *r = find(at, OPENED, OPENED);
  if (!r || r->base != at) LEAVE(INVALID_VALUE);
  if (!--r->refs) { munmap((void *)(uintptr_t)at, paged(r->size)); r->kind = FREE; }
  LEAVE(OK);
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *chunk, size_t size, const CUmemAllocationProp *prop, unsigned long long flags) {
  ENTER(1);
  if (flags || !size || size % 4096 || prop->type != 1 || prop->location.type != 1) LEAVE(INVALID_VALUE);
  *chunk = add_chunk(file_of(size), size, prop->location.id, prop->requestedHandleTypes) + 1;
  LEAVE(OK);
}
CUresult cuMemRelease(CUmemGenericAllocationHandle chunk) {
  ENTER(0);
  if (!chunk || chunk > LIMIT || !chunks[chunk - 1].handles) LEAVE(INVALID_VALUE);
  chunks[chunk - 1].handles--;
  drop_chunk(chunk - 1);
  LEAVE(OK);
}
CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *chunk, void *at) {
  ENTER(1);
  Range *r = find((CUdeviceptr)(uintptr_t)at, MAPPED, MAPPED);
  if (!r) LEAVE(INVALID_VALUE);
  chunks[r->chunk].handles++;
  *chunk = r->chunk + 1;
  LEAVE(OK);
}
CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle chunk, int type, unsigned long long flags) {
  ENTER(1);
  if (flags || !chunk || chunk > LIMIT || !(chunks[chunk - 1].types & type)) LEAVE(INVALID_VALUE);
  Chunk *c = &chunks[chunk - 1];
  if (type == 1) { *(int *)shareable = dup(c->fd); LEAVE(OK); }
  char path[64] = {0};
  snprintf(path, sizeof path, "/proc/%d/fd/%d", getpid(), c->fd);
  memcpy(shareable, path, 64);
  LEAVE(OK);
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *chunk, void *shareable, int type) {
  ENTER(1);
  int fd = type == 1 ? dup((int)(intptr_t)shareable) : open((char *)shareable, O_RDWR | O_CLOEXEC);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) || !S_ISREG(info.st_mode)) { close(fd); LEAVE(INVALID_HANDLE); }
  *chunk = add_chunk(fd, info.st_size, contexts[depth - 1], type) + 1;
  LEAVE(OK);
}
CUresult cuMemAddressReserve(CUdeviceptr *at, size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags) {
  ENTER(1);
  if (!size || size % 4096 || alignment || wish || flags) LEAVE(INVALID_VALUE);
  void *base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) LEAVE(2);
  *at = (CUdeviceptr)(uintptr_t)base;
  add(RESERVED, *at, size, -1, contexts[depth - 1]);
  LEAVE(OK);
}
CUresult cuMemAddressFree(CUdeviceptr at, size_t size) {
  ENTER(1);
  Range *r = find(at, RESERVED, RESERVED);
  if (!r || r->base != at || r->size != size) LEAVE(INVALID_VALUE);
  for (int i = 0; i < LIMIT; i++)
    if (ranges[i].kind == MAPPED && ranges[i].base >= at && ranges[i].base < at + size) LEAVE(INVALID_VALUE);
  munmap((void *)(uintptr_t)at, size);
  r->kind = FREE;
  LEAVE(OK);
}
CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, CUmemGenericAllocationHandle chunk, unsigned long long flags) {
  ENTER(1);
  Range *r = find(at, RESERVED, RESERVED);
  if (!r || at + size > r->base + r->size || offset || flags || !chunk || chunk > LIMIT || size > chunks[chunk - 1].size || size % 4096)
    LEAVE(INVALID_VALUE);
  Chunk *c = &chunks[chunk - 1];
  if (mmap((void *)(uintptr_t)at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, c->fd, 0) == MAP_FAILED) LEAVE(MAP_FAILED_);
  add(MAPPED, at, size, -1, c->device)->chunk = chunk - 1;
  c->mappings++;
  LEAVE(OK);
}
CUresult cuMemSetAccess(CUdeviceptr at, size_t size, const CUmemAccessDesc *access, size_t descriptions) {
  ENTER(1);
  if (descriptions != 1 || access->location.type != 1 || access->location.id >= count || access->flags != 3) LEAVE(INVALID_VALUE);
  for (CUdeviceptr each = at; each < at + size;) {
    Range *r = find(each, MAPPED, MAPPED);
    if (!r || r->base != each) LEAVE(INVALID_VALUE);
    each += r->size;
  }
  LEAVE(mprotect((void *)(uintptr_t)at, size, PROT_READ | PROT_WRITE) ? INVALID_VALUE : OK);
}
CUresult cuMemUnmap(CUdeviceptr at, size_t size) {
  ENTER(1);
  Range *r = find(at, MAPPED, MAPPED);
  if (!r || r->base != at || r->size != size) LEAVE(INVALID_VALUE);
  mmap((void *)(uintptr_t)at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  chunks[r->chunk].mappings--;
  drop_chunk(r->chunk);
  r->kind = FREE;
  LEAVE(OK);
}
