// Many small steps over plain memory, on 1 to `most` threads, some of which fall asleep in a chunk now and then: each
// chunk must run once a step, and see all that the stage before it wrote. Aborts where one does not; a sanitizer sees more.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct {
  void *fn, *args[16];
  int32_t dim, tile, mult, flags;
} il_call;
int il_threads(int);
int il_step(const il_call *, int32_t, const int32_t *, uint64_t *);

#define STAGES 40
#define CHUNKS 30
static int32_t marks[STAGES][CHUNKS], sizes[STAGES];

static unsigned next(unsigned *seed) { return (*seed = *seed * 1664525u + 1013904223u) >> 16; }

static void rest(long ns) { nanosleep(&(struct timespec){0, ns}, NULL); }

static void mark(int32_t *mine, int32_t *before, int32_t *size, void *a3, void *a4, void *a5, void *a6, void *a7, void *a8,
                 void *a9, void *a10, void *a11, void *a12, void *a13, void *a14, void *a15, const int32_t *dims,
                 int32_t chunk) {
  for (int32_t i = 0; before && i < *size; i++)
    if (before[i] != *dims) abort();
  if (mine[chunk] == *dims) abort();
  mine[chunk] = *dims;
  unsigned seed = (unsigned)(chunk * 7919 + *dims);
  if (next(&seed) % 97 == 0) rest(next(&seed));
}

int main(int count, char **args) {
  if (count != 3) return 2;
  unsigned seed = 1;
  int32_t dims[5] = {0};
  for (int threads = 1; threads <= atoi(args[1]); threads *= 2) {
    if (il_threads(threads) != threads) return 3;
    for (int step = 0; step < atoi(args[2]); step++) {
      il_call calls[STAGES] = {0};
      int32_t stages = 1 + (int32_t)(next(&seed) % STAGES);
      ++*dims;
      for (int32_t i = 0; i < stages; i++) {
        sizes[i] = (int32_t)(next(&seed) % CHUNKS);
        calls[i] = (il_call){.fn = (void *)mark, .args = {marks[i]}, .dim = -1, .tile = 1, .mult = sizes[i]};
        if (i) calls[i].args[1] = marks[i - 1], calls[i].args[2] = &sizes[i - 1];
      }
      if (il_step(calls, stages, dims, NULL)) return 4;
      for (int32_t i = 0; i < stages; i++)
        for (int32_t j = 0; j < sizes[i]; j++)
          if (marks[i][j] != *dims) abort();
      if (next(&seed) % 64 == 0) rest(3000000);  // long enough that workers fall asleep
    }
  }
  il_threads(1);
  puts("done");
}
