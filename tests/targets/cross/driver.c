// Replays the steps of a job (job.py has its format) on a library of kernels, and writes what each step leaves behind.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  int32_t calls, steps;
  int64_t bytes[4], out, out_bytes;
} header;
typedef struct {
  char symbol[64];
  int32_t dim, tile, mult, count;
  int64_t space[16], offset[16];
} entry;
typedef struct {
  void *fn, *args[16];
  int32_t dim, tile, mult, flags;
} call;

static void fail(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

static void take(void *into, size_t size, FILE *from) {
  if (size && fread(into, size, 1, from) != 1) fail("the job is too short");
}

static void *symbol(void *library, const char *name) {
  void *found = dlsym(library, name);
  if (!found) fail(dlerror());
  return found;
}

int main(int argc, char **argv) {
  if (argc != 4) fail("driver LIBRARY JOB THREADS");
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(dlerror());
  int (*threads)(int) = (int (*)(int))symbol(library, "il_threads");
  int (*step)(const call *, int32_t, const int32_t *, uint64_t *) = (int (*)(const call *, int32_t, const int32_t *, uint64_t *))symbol(library, "il_step");
  FILE *job = fopen(argv[2], "rb");
  if (!job) fail("cannot open the job");
  header h;
  take(&h, sizeof h, job);
  char *base[4];
  for (int i = 0; i < 4; i++) {
    size_t size = ((size_t)h.bytes[i] + 64) / 64 * 64;
    base[i] = aligned_alloc(64, size);
    if (!base[i]) fail("no memory");
    memset(base[i], 0, size);
  }
  take(base[0], (size_t)h.bytes[0], job);
  call *calls = calloc((size_t)h.calls, sizeof *calls);
  for (int i = 0; i < h.calls; i++) {
    entry e;
    take(&e, sizeof e, job);
    calls[i] = (call){.fn = symbol(library, e.symbol), .dim = e.dim, .tile = e.tile, .mult = e.mult};
    for (int j = 0; j < e.count; j++) calls[i].args[j] = base[e.space[j]] + e.offset[j];
  }
  int wanted = atoi(argv[3]);
  if (threads(wanted) != wanted) fail("cannot start the threads");
  for (int i = 0; i < h.steps; i++) {
    int32_t dims[8];
    take(dims, sizeof dims, job);
    take(base[3], (size_t)h.bytes[3], job);
    if (step(calls, h.calls, dims, NULL)) fail("the step failed");
    fwrite(base[1] + h.out, (size_t)h.out_bytes, 1, stdout);
  }
  threads(1);
  return 0;
}
