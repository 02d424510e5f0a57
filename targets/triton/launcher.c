// Loads a GPU's kernels and enqueues a whole step of them in one call, on CUDA or HIP.
//
// The driver's library is opened when a device is, and its functions are found by name, so that one binary serves
// both and needs no vendor header. Where the two APIs differ only in a type (a device address is an integer to CUDA
// and a pointer to HIP) both are 64 bits wide and passed alike. All work goes to one stream in order.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IL_GPU_ABI 1
#define IL_ARGS 24
#define OWN_FAILURE (-1)
// Shared memory that a CUDA kernel may take without asking.
#define FREE_SHARED (48u << 10)
#define STREAM_NON_BLOCKING 1u
// Nothing is prohibited while capturing: a driver may still load code when a kernel is first launched.
#define CAPTURE_RELAXED 2
#define ATTRIBUTE_MAJOR 75
#define ATTRIBUTE_MINOR 76
#define ATTRIBUTE_MAX_DYNAMIC_SHARED 8

// Field, name in CUDA's driver API, name in HIP (NULL: not used there), parameters; all return 0 or an error code.
#define FUNCTIONS(X) \
  X(init, "cuInit", "hipInit", (unsigned flags)) \
  X(device_get, "cuDeviceGet", "hipDeviceGet", (int *device, int ordinal)) \
  X(device_name, "cuDeviceGetName", "hipDeviceGetName", (char *name, int bytes, int device)) \
  X(attribute, "cuDeviceGetAttribute", NULL, (int *value, int attribute, int device)) \
  X(capability, NULL, "hipDeviceComputeCapability", (int *major, int *minor, int device)) \
  X(retain, "cuDevicePrimaryCtxRetain", NULL, (void **context, int device)) \
  X(release, "cuDevicePrimaryCtxRelease_v2", NULL, (int device)) \
  X(set_context, "cuCtxSetCurrent", NULL, (void *context)) \
  X(set_device, NULL, "hipSetDevice", (int device)) \
  X(memory_info, "cuMemGetInfo_v2", "hipMemGetInfo", (size_t *free_bytes, size_t *total_bytes)) \
  X(stream_create, "cuStreamCreate", "hipStreamCreateWithFlags", (void **stream, unsigned flags)) \
  X(stream_destroy, "cuStreamDestroy_v2", "hipStreamDestroy", (void *stream)) \
  X(stream_sync, "cuStreamSynchronize", "hipStreamSynchronize", (void *stream)) \
  X(module_load, "cuModuleLoadData", "hipModuleLoadData", (void **module, const void *image)) \
  X(module_unload, "cuModuleUnload", "hipModuleUnload", (void *module)) \
  X(module_function, "cuModuleGetFunction", "hipModuleGetFunction", \
    (void **function, void *module, const char *name)) \
  X(function_set, "cuFuncSetAttribute", NULL, (void *function, int attribute, int value)) \
  X(alloc, "cuMemAlloc_v2", "hipMalloc", (uint64_t *address, size_t bytes)) \
  X(free, "cuMemFree_v2", "hipFree", (uint64_t address)) \
  X(pin, "cuMemHostAlloc", "hipHostMalloc", (void **p, size_t bytes, unsigned flags)) \
  X(unpin, "cuMemFreeHost", "hipHostFree", (void *p)) \
  X(upload, "cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync", \
    (uint64_t to, const void *from, size_t bytes, void *stream)) \
  X(download, "cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync", \
    (void *to, uint64_t from, size_t bytes, void *stream)) \
  X(copy, "cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync", \
    (uint64_t to, uint64_t from, size_t bytes, void *stream)) \
  X(set, "cuMemsetD8Async", "hipMemsetD8Async", (uint64_t to, unsigned char value, size_t bytes, void *stream)) \
  X(launch, "cuLaunchKernel", "hipModuleLaunchKernel", \
    (void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, \
     void *stream, void **params, void **extra)) \
  X(capture_begin, "cuStreamBeginCapture_v2", "hipStreamBeginCapture", (void *stream, int mode)) \
  X(capture_end, "cuStreamEndCapture", "hipStreamEndCapture", (void *stream, void **graph)) \
  X(graph_make, "cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags", \
    (void **exec, void *graph, unsigned long long flags)) \
  X(graph_launch, "cuGraphLaunch", "hipGraphLaunch", (void *exec, void *stream)) \
  X(graph_destroy, "cuGraphDestroy", "hipGraphDestroy", (void *graph)) \
  X(exec_destroy, "cuGraphExecDestroy", "hipGraphExecDestroy", (void *exec)) \
  X(event_create, "cuEventCreate", "hipEventCreateWithFlags", (void **event, unsigned flags)) \
  X(event_destroy, "cuEventDestroy_v2", "hipEventDestroy", (void *event)) \
  X(event_record, "cuEventRecord", "hipEventRecord", (void *event, void *stream)) \
  X(event_elapsed, "cuEventElapsedTime", "hipEventElapsedTime", (float *ms, void *from, void *to)) \
  X(error_text, "cuGetErrorString", NULL, (int code, const char **text))

typedef struct {
#define FIELD(field, cuda, hip, params) int(*field) params;
  FUNCTIONS(FIELD)
#undef FIELD
  const char *(*hip_error_text)(int code);
  int hip, device;
  void *context, *stream;
  void **modules;
  size_t count, capacity;
} il_gpu;

typedef struct {
  void *function;
  uint64_t args[IL_ARGS];
  int32_t nargs, dim, tile, mult, least, most;
  uint32_t threads, shared;
} il_launch;

static const struct {
  const char *name[2];
  size_t offset;
} table[] = {
#define ROW(field, cuda, hip, params) {{cuda, hip}, offsetof(il_gpu, field)},
    FUNCTIONS(ROW)
#undef ROW
};

enum {
#define NUMBER(field, cuda, hip, params) F_##field,
  FUNCTIONS(NUMBER)
#undef NUMBER
};

static const char *const libraries[2][5] = {
    {"libcuda.so.1"},
    {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "/opt/rocm/lib/libamdhip64.so"},
};
static const char *const install[2] = {
    "install the NVIDIA driver, and in a container pass the GPU through",
    "install ROCm 6 or later, or put its folder in LD_LIBRARY_PATH",
};

static _Thread_local char message[768];

__attribute__((format(printf, 1, 2))) static int refuse(const char *format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(message, sizeof message, format, list);
  va_end(list);
  return OWN_FAILURE;
}

// A driver call failed: its name, the code and what the driver says of it.
static int fail(il_gpu *g, int which, int code) {
  const char *text = NULL;
  if (g->hip)
    text = g->hip_error_text(code);
  else if (g->error_text(code, &text))
    text = NULL;
  refuse("%s: error %d, %s", table[which].name[g->hip], code, text ? text : "which the driver does not know");
  return code;
}

// Adds to the text of a failure what it was about.
__attribute__((format(printf, 2, 3))) static int about(int code, const char *format, ...) {
  size_t used = strlen(message);
  va_list list;
  va_start(list, format);
  vsnprintf(message + used, sizeof message - used, format, list);
  va_end(list);
  return code;
}

#define CALL(field, ...) \
  do { \
    int code_ = g->field(__VA_ARGS__); \
    if (__builtin_expect(code_, 0)) return fail(g, F_##field, code_); \
  } while (0)

// CUDA contexts and HIP devices are current per thread.
#define ENTER(gpu) \
  il_gpu *g = (gpu); \
  do { \
    int code_ = enter(g); \
    if (__builtin_expect(code_, 0)) return code_; \
  } while (0)

static int enter(il_gpu *g) {
  if (g->hip)
    CALL(set_device, g->device);
  else
    CALL(set_context, g->context);
  return 0;
}

static void *open_library(int hip, const char **name) {
  char why[256] = "";
  for (int i = 0; libraries[hip][i]; i++) {
    void *library = dlopen(*name = libraries[hip][i], RTLD_NOW | RTLD_LOCAL);
    if (library) return library;
    if (!i) snprintf(why, sizeof why, "%s", dlerror());
  }
  refuse("the %s driver library %s cannot be loaded (%s): %s", hip ? "HIP" : "CUDA", libraries[hip][0], why,
         install[hip]);
  return NULL;
}

static int bind(il_gpu *g) {
  const char *file;
  void *library = open_library(g->hip, &file);  // stays open: drivers do not survive being unloaded
  if (!library) return OWN_FAILURE;
  const char *missing = NULL;
  for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
    const char *name = table[i].name[g->hip];
    void *found = name ? dlsym(library, name) : NULL;
    if (name && !found) missing = name;
    memcpy((char *)g + table[i].offset, &found, sizeof found);
  }
  if (g->hip) {
    void *found = dlsym(library, "hipGetErrorString");
    if (!found) missing = "hipGetErrorString";
    memcpy(&g->hip_error_text, &found, sizeof found);
  }
  return missing ? refuse("%s has no function %s: the driver is too old, install a newer one", file, missing) : 0;
}

static int start(il_gpu *g, int32_t ordinal) {
  int code = bind(g);
  if (code) return code;
  CALL(init, 0);
  if ((code = g->device_get(&g->device, ordinal)))
    return about(fail(g, F_device_get, code), " (GPU number %d)", ordinal);
  if (!g->hip) CALL(retain, &g->context, g->device);
  if ((code = enter(g))) return code;
  CALL(stream_create, &g->stream, STREAM_NON_BLOCKING);
  return 0;
}

// Goes on after a failure, and reports the first.
static int stop(il_gpu *g) {
  int first = 0, code;
#define LAST(field, ...) \
  if ((code = g->field(__VA_ARGS__)) && !first) first = fail(g, F_##field, code)
  if (g->stream) {
    first = enter(g);
    LAST(stream_sync, g->stream);
    for (size_t i = 0; i < g->count; i++) LAST(module_unload, g->modules[i]);
    LAST(stream_destroy, g->stream);
  }
  if (g->context) LAST(release, g->device);
#undef LAST
  free(g->modules);
  free(g);
  return first;
}

int32_t il_gpu_abi(void) { return IL_GPU_ABI; }

// What failed last in this thread.
const char *il_gpu_error(void) { return message; }

// Opens GPU `ordinal` of driver "cuda" or "hip". Like every function below: 0, or an error with il_gpu_error's text.
int il_gpu_open(const char *driver, int32_t ordinal, void **gpu) {
  *gpu = NULL;
  if (strcmp(driver, "cuda") && strcmp(driver, "hip")) return refuse("there is no driver '%s', only cuda and hip", driver);
  il_gpu *g = calloc(1, sizeof *g);
  if (!g) return refuse("no memory");
  g->hip = !strcmp(driver, "hip");
  int code = start(g, ordinal);
  if (code) {
    char kept[sizeof message];
    memcpy(kept, message, sizeof kept);
    stop(g);
    memcpy(message, kept, sizeof kept);
    return code;
  }
  *gpu = g;
  return 0;
}

// Memory and graphs must have been given back.
int il_gpu_close(void *gpu) { return gpu ? stop(gpu) : 0; }

int il_gpu_info(void *gpu, char name[256], uint64_t *free_bytes, uint64_t *total_bytes, int32_t *major,
                int32_t *minor) {
  ENTER(gpu);
  size_t available, total;
  CALL(device_name, name, 256, g->device);
  CALL(memory_info, &available, &total);
  *free_bytes = available;
  *total_bytes = total;
  if (g->hip) {
    CALL(capability, major, minor, g->device);
  } else {
    CALL(attribute, major, ATTRIBUTE_MAJOR, g->device);
    CALL(attribute, minor, ATTRIBUTE_MINOR, g->device);
  }
  return 0;
}

// The module lives as long as the GPU is open, and so must `image`, which HIP does not copy.
int il_gpu_module(void *gpu, const void *image, void **module) {
  ENTER(gpu);
  if (g->count == g->capacity) {
    size_t capacity = g->capacity ? 2 * g->capacity : 64;
    void **grown = realloc(g->modules, capacity * sizeof *grown);
    if (!grown) return refuse("no memory");
    g->modules = grown;
    g->capacity = capacity;
  }
  CALL(module_load, module, image);
  g->modules[g->count++] = *module;
  return 0;
}

int il_gpu_function(void *gpu, void *module, const char *name, uint32_t shared, void **function) {
  ENTER(gpu);
  int code = g->module_function(function, module, name);
  if (code) return about(fail(g, F_module_function, code), " (kernel %s)", name);
  if (!g->hip && shared > FREE_SHARED && (code = g->function_set(*function, ATTRIBUTE_MAX_DYNAMIC_SHARED, (int)shared)))
    return about(fail(g, F_function_set, code), " (%u bytes of shared memory for kernel %s)", shared, name);
  return 0;
}

int il_gpu_alloc(void *gpu, uint64_t bytes, uint64_t *address) {
  ENTER(gpu);
  int code = g->alloc(address, bytes);
  return code ? about(fail(g, F_alloc, code), " (%llu bytes)", (unsigned long long)bytes) : 0;
}

int il_gpu_free(void *gpu, uint64_t address) {
  ENTER(gpu);
  CALL(free, address);
  return 0;
}

int il_gpu_pinned(void *gpu, uint64_t bytes, void **p) {
  ENTER(gpu);
  int code = g->pin(p, bytes, 0);
  return code ? about(fail(g, F_pin, code), " (%llu bytes)", (unsigned long long)bytes) : 0;
}

int il_gpu_unpin(void *gpu, void *p) {
  ENTER(gpu);
  CALL(unpin, p);
  return 0;
}

int il_gpu_upload(void *gpu, uint64_t to, const void *from, uint64_t bytes) {
  ENTER(gpu);
  CALL(upload, to, from, bytes, g->stream);
  return 0;
}

int il_gpu_download(void *gpu, void *to, uint64_t from, uint64_t bytes) {
  ENTER(gpu);
  CALL(download, to, from, bytes, g->stream);
  return 0;
}

int il_gpu_copy(void *gpu, uint64_t to, uint64_t from, uint64_t bytes) {
  ENTER(gpu);
  CALL(copy, to, from, bytes, g->stream);
  return 0;
}

int il_gpu_zero(void *gpu, uint64_t to, uint64_t bytes) {
  ENTER(gpu);
  CALL(set, to, 0, bytes, g->stream);
  return 0;
}

int il_gpu_sync(void *gpu) {
  ENTER(gpu);
  CALL(stream_sync, g->stream);
  return 0;
}

// Blocks of a launch in a step of these dims; 0 skips it.
static int64_t blocks(const il_launch *l, const int32_t *dims) {
  if (l->dim < 0) return l->mult;
  int32_t n = dims[l->dim];
  if (n < l->least || n > l->most) return 0;
  return ((int64_t)n + l->tile - 1) / l->tile * l->mult;
}

static int enqueue(il_gpu *g, const il_launch *l, int64_t grid) {
  static const uint64_t zero;  // for Triton's global and profile scratch, which no kernel here uses
  void *params[IL_ARGS + 2];
  int32_t n = l->nargs;
  for (int32_t i = 0; i < n; i++) params[i] = (void *)&l->args[i];
  params[n] = params[n + 1] = (void *)&zero;
  if (__builtin_expect(grid > INT32_MAX, 0)) return refuse("a launch of %lld blocks is too large", (long long)grid);
  CALL(launch, l->function, (unsigned)grid, 1, 1, l->threads, 1, 1, l->shared, g->stream, params, NULL);
  return 0;
}

static int enqueue_all(il_gpu *g, const il_launch *launches, int32_t count, const int32_t *dims) {
  for (int32_t i = 0; i < count; i++) {
    const il_launch *l = &launches[i];
    int64_t grid = blocks(l, dims);
    int code = grid > 0 ? enqueue(g, l, grid) : 0;
    if (__builtin_expect(code, 0))
      return about(code, " (launch %d: %lld blocks of %u threads, %u bytes of shared memory)", i, (long long)grid,
                   l->threads, l->shared);
  }
  return 0;
}

int il_gpu_step(void *gpu, const il_launch *launches, int32_t count, const int32_t *dims) {
  ENTER(gpu);
  return enqueue_all(g, launches, count, dims);
}

int il_gpu_capture(void *gpu, const il_launch *launches, int32_t count, const int32_t *dims, void **graph) {
  ENTER(gpu);
  void *recorded = NULL;
  *graph = NULL;
  CALL(capture_begin, g->stream, CAPTURE_RELAXED);
  int code = enqueue_all(g, launches, count, dims);
  int end = g->capture_end(g->stream, &recorded);  // also after a failure, or the stream stays unusable
  if (!code && end) code = fail(g, F_capture_end, end);
  if (!code && (code = g->graph_make(graph, recorded, 0))) fail(g, F_graph_make, code);
  if (recorded) g->graph_destroy(recorded);
  return code;
}

int il_gpu_replay(void *gpu, void *graph) {
  ENTER(gpu);
  CALL(graph_launch, graph, g->stream);
  return 0;
}

int il_gpu_drop(void *gpu, void *graph) {
  ENTER(gpu);
  CALL(exec_destroy, graph);
  return 0;
}

static int time_all(il_gpu *g, const il_launch *launches, int32_t count, const int32_t *dims, float *us,
                    void **events) {
  int32_t last = 0;
  for (int32_t i = 0; i <= count; i++) CALL(event_create, &events[i], 0);
  CALL(event_record, events[0], g->stream);
  for (int32_t i = 0; i < count; i++) {
    us[i] = 0;
    int64_t grid = blocks(&launches[i], dims);
    if (grid <= 0) continue;
    int code = enqueue(g, &launches[i], grid);
    if (code) return about(code, " (launch %d)", i);
    CALL(event_record, events[i + 1], g->stream);
  }
  CALL(stream_sync, g->stream);
  for (int32_t i = 0; i < count; i++) {
    if (blocks(&launches[i], dims) <= 0) continue;
    CALL(event_elapsed, &us[i], events[last], events[i + 1]);
    us[i] *= 1000;  // the drivers count milliseconds
    last = i + 1;
  }
  return 0;
}

// Runs a step to its end; `us` receives each launch's microseconds, 0 for those that were skipped.
int il_gpu_time(void *gpu, const il_launch *launches, int32_t count, const int32_t *dims, float *us) {
  ENTER(gpu);
  void **events = calloc((size_t)count + 1, sizeof *events);
  if (!events) return refuse("no memory");
  int code = time_all(g, launches, count, dims, us, events);
  for (int32_t i = 0; i <= count; i++)
    if (events[i]) g->event_destroy(events[i]);
  free(events);
  return code;
}
