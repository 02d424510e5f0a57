// A GPU driver without a GPU: libcuda.so.1 and libamdhip64.so in one, device memory being the process's own.
//
// Work given to a stream is kept until something waits for it, as on a GPU, so that memory which is changed too early
// shows. Kernels are not run: a launch calls back, if anybody asked for it, with the values of its parameters, whose
// number and sizes come from the code itself (.nv.info of a cubin, the metadata note of a code object). New memory
// is full of junk. The mock_ functions at the end are for tests.
#include <elf.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, NO_BINARY = 209, NOT_FOUND = 500, CAPTURING = 900 };
enum { MAX_PARAMETERS = 64, JUNK = 0xA5, MACHINE_CUDA = 190, MACHINE_AMD = 224 };

typedef void (*launch_fn)(const char *name, unsigned grid, unsigned block, unsigned shared, int count,
                          const uint64_t *params);
typedef struct kernel {
  char name[256];
  int count, sizes[MAX_PARAMETERS], looked_up;
  unsigned shared;  // dynamic shared memory that a launch may take
  struct kernel *next, *older;  // in its module, and among all that were looked up
} kernel;
typedef struct { kernel *kernels; } module;
typedef struct { float ms; } event;
typedef struct work work;
struct work {
  enum { COPY, SET, LAUNCH, GRAPH, RECORD } kind;
  uint8_t *to;
  const uint8_t *from;
  size_t bytes;
  int value;
  kernel *kernel;
  unsigned grid, block, shared;
  uint64_t params[MAX_PARAMETERS];
  const struct list *graph;
  event *event;
};
typedef struct list {
  work *items;
  size_t count, capacity;
} list;
typedef struct { list pending, *captured; } stream;
typedef struct {
  uint8_t *base;
  size_t bytes;
  int pinned;
} block;

static struct { const char *name; uint64_t value; } settings[] = {
    {"major", 9}, {"minor", 0}, {"total", 1u << 30}, {"devices", 1}, {"broken", 0}};
enum { MAJOR, MINOR, TOTAL, DEVICES, BROKEN };
static block blocks[4096];
static stream *streams[16];
static kernel *loaded;
static launch_fn on_launch;
static int contexts, live;
static int64_t pageable, launched;
static float clock_ms;
static _Thread_local int hip, current;

static void push(stream *s, work w) {
  list *l = s->captured ? s->captured : &s->pending;
  if (l->count == l->capacity) {
    l->capacity = l->capacity ? 2 * l->capacity : 64;
    l->items = realloc(l->items, l->capacity * sizeof *l->items);
  }
  l->items[l->count++] = w;
}

static void run(const list *l) {
  for (size_t i = 0; i < l->count; i++) {
    const work *w = &l->items[i];
    switch (w->kind) {
      case COPY: memmove(w->to, w->from, w->bytes); break;
      case SET: memset(w->to, w->value, w->bytes); break;
      case GRAPH: run(w->graph); break;
      case RECORD: w->event->ms = clock_ms; break;
      case LAUNCH:
        launched++;
        clock_ms += (float)w->grid;
        if (on_launch) on_launch(w->kernel->name, w->grid, w->block, w->shared, w->kernel->count, w->params);
    }
  }
}

static void drain(stream *s) {
  run(&s->pending);
  s->pending.count = 0;
}

static void drain_all(void) {
  for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
    if (streams[i]) drain(streams[i]);
}

// The block in which [address, address + bytes) lies.
static block *find(uint64_t address, size_t bytes, int pinned) {
  for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
    block *b = &blocks[i];
    uint64_t base = (uint64_t)(uintptr_t)b->base;
    if (base && b->pinned == pinned && address >= base && address - base <= b->bytes && bytes <= b->bytes - (address - base))
      return b;
  }
  return NULL;
}

static size_t used(void) {
  size_t sum = 0;
  for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
    if (blocks[i].base && !blocks[i].pinned) sum += blocks[i].bytes;
  return sum;
}

static int allocate(void **p, size_t bytes, int pinned) {
  if (!bytes) return INVALID_VALUE;
  if (!pinned && bytes > settings[TOTAL].value - used()) return OUT_OF_MEMORY;
  for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
    if (!blocks[i].base) {
      size_t rounded = (bytes + 255) / 256 * 256;
      blocks[i] = (block){aligned_alloc(256, rounded), bytes, pinned};
      memset(*p = blocks[i].base, JUNK, rounded);
      live++;
      return 0;
    }
  return OUT_OF_MEMORY;
}

static int release(uint64_t address, int pinned) {
  block *b = find(address, 0, pinned);
  if (!b || (uint64_t)(uintptr_t)b->base != address) return INVALID_VALUE;
  drain_all();
  free(b->base);
  b->base = NULL;
  live--;
  return 0;
}

// Parameters of the kernels of a cubin: sections .nv.info.<kernel>, attribute KPARAM_INFO (0x17).
static void read_cubin(module *m, const uint8_t *image, const Elf64_Shdr *section, const char *name) {
  if (strncmp(name, ".nv.info.", 9)) return;
  kernel *k = calloc(1, sizeof *k);
  snprintf(k->name, sizeof k->name, "%s", name + 9);
  k->shared = 48u << 10;
  const uint8_t *at = image + section->sh_offset, *end = at + section->sh_size;
  while (at + 4 <= end) {
    uint8_t format = at[0], attribute = at[1];
    uint16_t value, ordinal;
    uint32_t flags;
    memcpy(&value, at + 2, 2);
    at += 4;
    if (format != 4) continue;  // the value is all there is
    if (attribute == 0x17 && value >= 12 && at + 12 <= end) {
      memcpy(&ordinal, at + 4, 2);
      memcpy(&flags, at + 8, 4);
      if (ordinal < MAX_PARAMETERS) {
        k->sizes[ordinal] = (int)(flags >> 18);
        if (ordinal >= k->count) k->count = ordinal + 1;
      }
    }
    at += value;
  }
  k->next = m->kernels;
  m->kernels = k;
}

typedef struct {
  const uint8_t *at, *end;
} reader;
typedef struct {
  enum { INTEGER, STRING, ARRAY, MAP, OTHER } kind;
  uint64_t n;  // the integer, the bytes of a string, the entries of the others
  const char *text;
} value;

static uint64_t big_endian(reader *r, int bytes) {
  uint64_t n = 0;
  for (; bytes && r->at < r->end; bytes--) n = n << 8 | *r->at++;
  return n;
}

// The head of a msgpack value: all of an integer or a string.
static value head(reader *r) {
  value v = {OTHER, 0, NULL};
  uint8_t b = r->at < r->end ? *r->at++ : 0xc0;
  if (b < 0x80) v = (value){INTEGER, b, NULL};
  else if (b < 0x90) v = (value){MAP, b & 15u, NULL};
  else if (b < 0xa0) v = (value){ARRAY, b & 15u, NULL};
  else if (b < 0xc0) v = (value){STRING, b & 31u, NULL};
  else if (b >= 0xc4 && b <= 0xc6) v = (value){STRING, big_endian(r, 1 << (b - 0xc4)), NULL};
  else if (b == 0xca || b == 0xcb) big_endian(r, b == 0xca ? 4 : 8);
  else if (b >= 0xcc && b <= 0xcf) v = (value){INTEGER, big_endian(r, 1 << (b - 0xcc)), NULL};
  else if (b >= 0xd0 && b <= 0xd3) v = (value){INTEGER, big_endian(r, 1 << (b - 0xd0)), NULL};
  else if (b >= 0xd9 && b <= 0xdb) v = (value){STRING, big_endian(r, 1 << (b - 0xd9)), NULL};
  else if (b == 0xdc || b == 0xdd) v = (value){ARRAY, big_endian(r, b == 0xdc ? 2 : 4), NULL};
  else if (b == 0xde || b == 0xdf) v = (value){MAP, big_endian(r, b == 0xde ? 2 : 4), NULL};
  if (v.kind == STRING) {
    v.text = (const char *)r->at;
    r->at = v.n <= (uint64_t)(r->end - r->at) ? r->at + v.n : r->end;
  }
  return v;
}

static void skip(reader *r) {
  value v = head(r);
  uint64_t n = v.kind == ARRAY ? v.n : v.kind == MAP ? 2 * v.n : 0;
  for (; n && r->at < r->end; n--) skip(r);
}

static int is(value v, const char *text) { return v.text && v.n == strlen(text) && !memcmp(v.text, text, v.n); }

static void read_argument(reader *r, kernel *k) {
  value map = head(r);
  uint64_t size = 0;
  int hidden = 0;
  for (uint64_t i = 0; map.kind == MAP && i < map.n; i++) {
    value key = head(r);
    if (is(key, ".size")) size = head(r).n;
    else if (is(key, ".value_kind")) {
      value kind = head(r);
      hidden = kind.text && kind.n > 7 && !memcmp(kind.text, "hidden_", 7);
    } else skip(r);
  }
  if (!hidden && k->count < MAX_PARAMETERS) k->sizes[k->count++] = (int)size;
}

// Parameters of the kernels of a code object: the note's amdhsa.kernels[].args[], without the compiler's own.
static void read_metadata(module *m, reader r) {
  value top = head(&r);
  for (uint64_t i = 0; top.kind == MAP && i < top.n; i++) {
    if (!is(head(&r), "amdhsa.kernels")) {
      skip(&r);
      continue;
    }
    value all = head(&r);
    for (uint64_t j = 0; all.kind == ARRAY && j < all.n; j++) {
      kernel *k = calloc(1, sizeof *k);
      k->shared = 64u << 10;
      value map = head(&r);
      for (uint64_t f = 0; map.kind == MAP && f < map.n; f++) {
        value key = head(&r);
        if (is(key, ".name")) {
          value name = head(&r);
          snprintf(k->name, sizeof k->name, "%.*s", (int)name.n, name.text);
        } else if (is(key, ".args")) {
          value args = head(&r);
          for (uint64_t a = 0; args.kind == ARRAY && a < args.n; a++) read_argument(&r, k);
        } else skip(&r);
      }
      k->next = m->kernels;
      m->kernels = k;
    }
  }
}

static void read_notes(module *m, const uint8_t *image, const Elf64_Shdr *section) {
  const uint8_t *at = image + section->sh_offset, *end = at + section->sh_size;
  while (at + sizeof(Elf64_Nhdr) <= end) {
    Elf64_Nhdr note;
    memcpy(&note, at, sizeof note);
    const uint8_t *name = at + sizeof note, *data = name + (note.n_namesz + 3) / 4 * 4;
    if (note.n_type == 32 && note.n_namesz == 7 && !memcmp(name, "AMDGPU", 7))
      read_metadata(m, (reader){data, data + note.n_descsz});
    at = data + (note.n_descsz + 3) / 4 * 4;
  }
}

// The functions, once for both drivers. The context checks are CUDA's.
#define WORKS \
  do { \
    if (settings[BROKEN].value) return (int)settings[BROKEN].value; \
    if (!hip && !current) return INVALID_CONTEXT; \
  } while (0)

static int init(unsigned flags) { return flags ? INVALID_VALUE : settings[DEVICES].value ? 0 : NO_DEVICE; }
static int device_get(int *device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && (uint64_t)ordinal < settings[DEVICES].value ? 0 : INVALID_DEVICE;
}
static int device_name(char *name, int bytes, int device) {
  snprintf(name, (size_t)bytes, "Mock GPU %d", device);
  return 0;
}
static int attribute(int *v, int which, int device) {
  (void)device;
  *v = which == 75 ? (int)settings[MAJOR].value : which == 76 ? (int)settings[MINOR].value : -1;
  return *v < 0 ? INVALID_VALUE : 0;
}
static int capability(int *major, int *minor, int device) {
  return attribute(major, 75, device) || attribute(minor, 76, device);
}
static int retain(void **context, int device) {
  (void)device;
  *context = &contexts;
  contexts++;
  live++;
  return 0;
}
static int release_context(int device) {
  (void)device;
  if (!contexts) return INVALID_CONTEXT;
  contexts--;
  live--;
  return 0;
}
static int set_context(void *context) {
  current = contexts && context == &contexts;
  return current ? 0 : INVALID_CONTEXT;
}
static int set_device(int device) { return device_get(&device, device); }
static int memory_info(size_t *available, size_t *total) {
  WORKS;
  *total = settings[TOTAL].value;
  *available = *total - used();
  return 0;
}
static int stream_create(void **s, unsigned flags) {
  WORKS;
  if (flags != 1) return INVALID_VALUE;
  for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
    if (!streams[i]) {
      *s = streams[i] = calloc(1, sizeof(stream));
      live++;
      return 0;
    }
  return OUT_OF_MEMORY;
}
static int stream_destroy(void *s) {
  for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
    if (streams[i] == s) {
      drain(s);
      free(streams[i]->pending.items);
      free(s);
      streams[i] = NULL;
      live--;
      return 0;
    }
  return INVALID_VALUE;
}
static int stream_sync(void *s) {
  WORKS;
  if (((stream *)s)->captured) return CAPTURING;
  drain(s);
  return 0;
}
static int module_load(void **made, const void *data) {
  WORKS;
  const uint8_t *image = data;
  const Elf64_Ehdr *elf = data;
  if (memcmp(image, ELFMAG, SELFMAG)) return INVALID_IMAGE;
  if (elf->e_machine != (hip ? MACHINE_AMD : MACHINE_CUDA)) return NO_BINARY;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + elf->e_shoff);
  const char *names = (const char *)image + sections[elf->e_shstrndx].sh_offset;
  module *m = calloc(1, sizeof *m);
  for (int i = 0; i < elf->e_shnum; i++) {
    if (!hip) read_cubin(m, image, &sections[i], names + sections[i].sh_name);
    else if (sections[i].sh_type == SHT_NOTE) read_notes(m, image, &sections[i]);
  }
  *made = m;
  live++;
  return 0;
}
static int module_unload(void *m) {
  free(m);  // its kernels stay, for mock_parameters
  live--;
  return 0;
}
static int module_function(void **function, void *from, const char *name) {
  WORKS;
  module *m = from;
  for (kernel *k = m->kernels; k; k = k->next)
    if (!strcmp(k->name, name)) {
      *function = k;
      if (!k->looked_up) {
        k->looked_up = 1;
        k->older = loaded;
        loaded = k;
      }
      return 0;
    }
  return NOT_FOUND;
}
static int function_set(void *function, int which, int v) {
  WORKS;
  if (which != 8 || v < 0 || v > 227 << 10) return INVALID_VALUE;
  ((kernel *)function)->shared = (unsigned)v;
  return 0;
}
static int alloc(void **address, size_t bytes) {
  WORKS;
  return allocate(address, bytes, 0);
}
static int free_(void *address) {
  WORKS;
  return release((uint64_t)(uintptr_t)address, 0);
}
static int pin(void **p, size_t bytes, unsigned flags) {
  WORKS;
  return flags ? INVALID_VALUE : allocate(p, bytes, 1);
}
static int unpin(void *p) {
  WORKS;
  return release((uint64_t)(uintptr_t)p, 1);
}
static int upload(void *to, const void *from, size_t bytes, void *s) {
  WORKS;
  if (!find((uint64_t)(uintptr_t)to, bytes, 0)) return INVALID_VALUE;
  if (find((uint64_t)(uintptr_t)from, bytes, 1)) {
    push(s, (work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
  } else {  // read before the call returns
    pageable++;
    drain(s);
    memcpy(to, from, bytes);
  }
  return 0;
}
static int download(void *to, void *from, size_t bytes, void *s) {
  WORKS;
  if (!find((uint64_t)(uintptr_t)from, bytes, 0)) return INVALID_VALUE;
  if (!find((uint64_t)(uintptr_t)to, bytes, 1)) pageable++;
  push(s, (work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
  return 0;
}
static int copy(void *to, void *from, size_t bytes, void *s) {
  WORKS;
  if (!find((uint64_t)(uintptr_t)to, bytes, 0) || !find((uint64_t)(uintptr_t)from, bytes, 0)) return INVALID_VALUE;
  push(s, (work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
  return 0;
}
static int set(void *to, unsigned char v, size_t bytes, void *s) {
  WORKS;
  if (!find((uint64_t)(uintptr_t)to, bytes, 0)) return INVALID_VALUE;
  push(s, (work){.kind = SET, .to = to, .value = v, .bytes = bytes});
  return 0;
}
static int launch(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *s, void **params, void **extra) {
  WORKS;
  kernel *k = function;
  if (!gx || gy != 1 || gz != 1 || !bx || bx > 1024 || by != 1 || bz != 1 || shared > k->shared || extra)
    return INVALID_VALUE;
  if (!on_launch && !((stream *)s)->captured) {
    launched++;
    return 0;
  }
  work w = {.kind = LAUNCH, .kernel = k, .grid = gx, .block = bx, .shared = shared};
  for (int i = 0; i < k->count; i++) {
    if (k->sizes[i] != 8) return INVALID_VALUE;
    memcpy(&w.params[i], params[i], 8);
  }
  push(s, w);
  return 0;
}
static int capture_begin(void *s, int mode) {
  WORKS;
  if (mode < 0 || mode > 2 || ((stream *)s)->captured) return INVALID_VALUE;
  ((stream *)s)->captured = calloc(1, sizeof(list));
  live++;
  return 0;
}
static int capture_end(void *s, void **graph) {
  WORKS;
  *graph = ((stream *)s)->captured;
  ((stream *)s)->captured = NULL;
  return *graph ? 0 : INVALID_VALUE;
}
static int graph_make(void **exec, void *graph, unsigned long long flags) {
  WORKS;
  const list *from = graph;
  list *made = calloc(1, sizeof *made);
  if (flags || !made) return INVALID_VALUE;
  made->count = made->capacity = from->count;
  made->items = malloc(from->count * sizeof *made->items + 1);
  if (from->count) memcpy(made->items, from->items, from->count * sizeof *made->items);
  *exec = made;
  live++;
  return 0;
}
static int graph_launch(void *exec, void *s) {
  WORKS;
  push(s, (work){.kind = GRAPH, .graph = exec});
  return 0;
}
static int graph_destroy(void *graph) {
  WORKS;
  drain_all();
  free(((list *)graph)->items);
  free(graph);
  live--;
  return 0;
}
static int event_create(void **made, unsigned flags) {
  WORKS;
  *made = calloc(1, sizeof(event));
  live++;
  return flags ? INVALID_VALUE : 0;
}
static int event_destroy(void *e) {
  WORKS;
  drain_all();
  free(e);
  live--;
  return 0;
}
static int event_record(void *e, void *s) {
  WORKS;
  push(s, (work){.kind = RECORD, .event = e});
  return 0;
}
static int event_elapsed(float *ms, void *from, void *to) {
  WORKS;
  *ms = ((event *)to)->ms - ((event *)from)->ms;
  return 0;
}

// CUDA's name, HIP's name, the function above, its parameters, its arguments.
#define BOTH(X) \
  X(cuInit, hipInit, init, (unsigned a), (a)) \
  X(cuDeviceGet, hipDeviceGet, device_get, (int *a, int b), (a, b)) \
  X(cuDeviceGetName, hipDeviceGetName, device_name, (char *a, int b, int c), (a, b, c)) \
  X(cuMemGetInfo_v2, hipMemGetInfo, memory_info, (size_t *a, size_t *b), (a, b)) \
  X(cuStreamCreate, hipStreamCreateWithFlags, stream_create, (void **a, unsigned b), (a, b)) \
  X(cuStreamDestroy_v2, hipStreamDestroy, stream_destroy, (void *a), (a)) \
  X(cuStreamSynchronize, hipStreamSynchronize, stream_sync, (void *a), (a)) \
  X(cuModuleLoadData, hipModuleLoadData, module_load, (void **a, const void *b), (a, b)) \
  X(cuModuleUnload, hipModuleUnload, module_unload, (void *a), (a)) \
  X(cuModuleGetFunction, hipModuleGetFunction, module_function, (void **a, void *b, const char *c), (a, b, c)) \
  X(cuMemAlloc_v2, hipMalloc, alloc, (void **a, size_t b), (a, b)) \
  X(cuMemFree_v2, hipFree, free_, (void *a), (a)) \
  X(cuMemHostAlloc, hipHostMalloc, pin, (void **a, size_t b, unsigned c), (a, b, c)) \
  X(cuMemFreeHost, hipHostFree, unpin, (void *a), (a)) \
  X(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync, upload, (void *a, const void *b, size_t c, void *d), (a, b, c, d)) \
  X(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync, download, (void *a, void *b, size_t c, void *d), (a, b, c, d)) \
  X(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync, copy, (void *a, void *b, size_t c, void *d), (a, b, c, d)) \
  X(cuMemsetD8Async, hipMemsetD8Async, set, (void *a, unsigned char b, size_t c, void *d), (a, b, c, d)) \
  X(cuLaunchKernel, hipModuleLaunchKernel, launch, \
    (void *a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f, unsigned g, unsigned h, void *i, \
     void **j, void **k), (a, b, c, d, e, f, g, h, i, j, k)) \
  X(cuStreamBeginCapture_v2, hipStreamBeginCapture, capture_begin, (void *a, int b), (a, b)) \
  X(cuStreamEndCapture, hipStreamEndCapture, capture_end, (void *a, void **b), (a, b)) \
  X(cuGraphInstantiateWithFlags, hipGraphInstantiateWithFlags, graph_make, \
    (void **a, void *b, unsigned long long c), (a, b, c)) \
  X(cuGraphLaunch, hipGraphLaunch, graph_launch, (void *a, void *b), (a, b)) \
  X(cuGraphDestroy, hipGraphDestroy, graph_destroy, (void *a), (a)) \
  X(cuGraphExecDestroy, hipGraphExecDestroy, graph_destroy, (void *a), (a)) \
  X(cuEventCreate, hipEventCreateWithFlags, event_create, (void **a, unsigned b), (a, b)) \
  X(cuEventDestroy_v2, hipEventDestroy, event_destroy, (void *a), (a)) \
  X(cuEventRecord, hipEventRecord, event_record, (void *a, void *b), (a, b)) \
  X(cuEventElapsedTime, hipEventElapsedTime, event_elapsed, (float *a, void *b, void *c), (a, b, c))
// Driver (1 is HIP), name, function, parameters, arguments.
#define SINGLE(X) \
  X(0, cuDeviceGetAttribute, attribute, (int *a, int b, int c), (a, b, c)) \
  X(0, cuDevicePrimaryCtxRetain, retain, (void **a, int b), (a, b)) \
  X(0, cuDevicePrimaryCtxRelease_v2, release_context, (int a), (a)) \
  X(0, cuCtxSetCurrent, set_context, (void *a), (a)) \
  X(0, cuFuncSetAttribute, function_set, (void *a, int b, int c), (a, b, c)) \
  X(1, hipDeviceComputeCapability, capability, (int *a, int *b, int c), (a, b, c)) \
  X(1, hipSetDevice, set_device, (int a), (a))

#define PAIR_NUMBERS(cuda, hip_, impl, declared, passed) N_##cuda, N_##hip_,
#define NUMBER(is_hip, name, impl, declared, passed) N_##name,
enum { BOTH(PAIR_NUMBERS) SINGLE(NUMBER) CALLS };
static struct {
  const char *name;
  int64_t count;
  int fail;
} calls[] = {
#define PAIR_NAMES(cuda, hip_, impl, declared, passed) {#cuda, 0, 0}, {#hip_, 0, 0},
#define NAME(is_hip, name, impl, declared, passed) {#name, 0, 0},
    BOTH(PAIR_NAMES) SINGLE(NAME)};

#define DEFINE(is_hip, name_, impl, declared, passed) \
  int name_ declared { \
    int code = calls[N_##name_].fail; \
    calls[N_##name_].count++; \
    calls[N_##name_].fail = 0; \
    hip = is_hip; \
    if (N_##name_ == N_cuStreamEndCapture || N_##name_ == N_hipStreamEndCapture) { \
      int ended = impl passed; /* also when it fails */ \
      return code ? code : ended; \
    } \
    return code ? code : impl passed; \
  }
#define DEFINE_PAIR(cuda, hip_, impl, declared, passed) \
  DEFINE(0, cuda, impl, declared, passed) DEFINE(1, hip_, impl, declared, passed)
BOTH(DEFINE_PAIR)
SINGLE(DEFINE)

const char *hipGetErrorString(int code) {
  switch (code) {
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_DEVICE: return "invalid device ordinal";
    case NO_BINARY: return "no kernel image is available for execution on the device";
    case NOT_FOUND: return "named symbol not found";
    default: return "mock error";
  }
}
int cuGetErrorString(int code, const char **text) {
  *text = hipGetErrorString(code);
  return 0;
}

// Calls `fn` for every kernel that runs, when its turn comes; NULL stops that.
void mock_on_launch(launch_fn fn) { on_launch = fn; }

// The next call of this name gives an error. Returns 0, or -1 when there is no such call.
int mock_fail(const char *name, int code) {
  for (int i = 0; i < CALLS; i++)
    if (!strcmp(calls[i].name, name)) {
      calls[i].fail = code;
      return 0;
    }
  return -1;
}

// Calls of this name since the last reset, or -1 when there is none of that name.
int64_t mock_calls(const char *name) {
  for (int i = 0; i < CALLS; i++)
    if (!strcmp(calls[i].name, name)) return calls[i].count;
  return -1;
}

// Compute capability, bytes of memory, number of devices, code with which everything fails. 0, or -1: no such setting.
int mock_set(const char *name, uint64_t v) {
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
    if (!strcmp(settings[i].name, name)) {
      settings[i].value = v;
      return 0;
    }
  return -1;
}

// Number and sizes of the parameters of the kernel of this name that was found last, or -1.
int mock_parameters(const char *name, int32_t *sizes, int32_t most) {
  for (kernel *k = loaded; k; k = k->older)
    if (!strcmp(k->name, name)) {
      for (int i = 0; i < k->count && i < most; i++) sizes[i] = k->sizes[i];
      return k->count;
    }
  return -1;
}

// Kernels that have run; copies of memory that is not pinned; things made and not given back.
int64_t mock_launched(void) { return launched; }
int64_t mock_pageable(void) { return pageable; }
int64_t mock_live(void) { return live; }

// Settings, counts and failures as in the beginning; what is live stays.
void mock_reset(void) {
  static const uint64_t initial[] = {9, 0, 1u << 30, 1, 0};
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) settings[i].value = initial[i];
  for (int i = 0; i < CALLS; i++) calls[i].count = calls[i].fail = 0;
  on_launch = NULL;
  pageable = launched = 0;
}
