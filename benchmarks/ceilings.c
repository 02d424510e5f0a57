// What this machine can do at most, right now: reading memory, and multiply-adds in registers.
//
//   ceilings quick THREADS     one JSON object, about a second
//
// bw_4k, bw_huge: GB/s of reading from 4 KiB and 2 MiB pages, the median of several passes, as the work that is compared
// with it has a median: in a virtual machine whose cores the host moves, single passes may be nearly twice as fast. The
// others are the best of a few rounds. fp32: GFLOP/s of fused multiply-adds. bf16: the same of dot products of bf16 pairs,
// where the processor has them. int8: of dot products of int8 quadruples, with AVX2 in the three instructions that they
// take there. A multiply-add is two operations.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { ROUNDS = 4, PASSES = 5, MAX_THREADS = 256, CHAINS = 12 };
static const size_t REGION = (size_t)384 << 20;
static const long STEPS = 16000000;

// One register of floats, and the constraint that keeps a value in one.
#if defined(__AVX512F__)
enum { LANES = 16 };
#define KEEP(value) __asm__("" : "+v"(value))
#elif defined(__x86_64__)
#if defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
#define KEEP(value) __asm__("" : "+x"(value))
#elif defined(__aarch64__)
enum { LANES = 4 };
#define KEEP(value) __asm__("" : "+w"(value))
#else
enum { LANES = 4 };
#define KEEP(value) __asm__("" : "+m"(value))
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint64_t words __attribute__((vector_size(64)));

typedef struct {
  double (*run)(const char *from, size_t bytes);  // returns the operations or bytes done
  const char *from;
  size_t bytes;
  pthread_barrier_t *start;
  double begin, end, amount;
} share;

static volatile double sink;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double read_all(const char *from, size_t bytes) {
  words a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t at = 0; at + 256 <= bytes; at += 256) {
    const words *p = (const words *)(from + at);
    a ^= p[0];
    b ^= p[1];
    c ^= p[2];
    d ^= p[3];
  }
  a ^= b ^ c ^ d;
  sink = (double)a[0];
  return (double)bytes;
}

// Twelve independent chains keep both multiply-add units busy; KEEP keeps the loop from being folded.
static double multiply_add(const char *unused, size_t none) {
  (void)unused, (void)none;
  vec sum[CHAINS], x, y;
  for (int i = 0; i < CHAINS; i++) sum[i] = (vec){0};
  for (int i = 0; i < LANES; i++) x[i] = 1.0f + (float)i, y[i] = 1e-9f;
  for (long step = 0; step < STEPS; step++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) {
      sum[i] += x * y;  // contracted to one instruction where there is one
      KEEP(sum[i]);
    }
  }
  for (int i = 1; i < CHAINS; i++) sum[0] += sum[i];
  sink = (double)sum[0][0];
  return (double)STEPS * CHAINS * LANES * 2;
}

#if defined(__AVX512BF16__)
static double dot_pairs(const char *unused, size_t none) {
  (void)unused, (void)none;
  __m512 sum[CHAINS];
  __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x3000);
  for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_setzero_ps();
  for (long step = 0; step < STEPS; step++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) {
      sum[i] = _mm512_dpbf16_ps(sum[i], x, y);
      KEEP(sum[i]);
    }
  }
  for (int i = 1; i < CHAINS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  sink = (double)_mm512_reduce_add_ps(sum[0]);
  return (double)STEPS * CHAINS * 32 * 2;
}
#endif

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#if defined(__AVX512VNNI__)
typedef __m512i bytes;
#define DOT(sum, x, y) _mm512_dpbusd_epi32(sum, x, y)
#else
typedef __m256i bytes;
#define DOT(sum, x, y) _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1)))
#endif
static double dot_quadruples(const char *unused, size_t none) {
  (void)unused, (void)none;
  bytes sum[CHAINS], x, y;
  memset(sum, 0, sizeof sum);
  memset(&x, 1, sizeof x);
  memset(&y, 1, sizeof y);
  for (long step = 0; step < STEPS; step++) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) {
      KEEP(x);  // a product of its own for each sum
      sum[i] = DOT(sum[i], x, y);
      KEEP(sum[i]);
    }
  }
  int total = 0, first;
  for (int i = 0; i < CHAINS; i++) memcpy(&first, &sum[i], sizeof first), total += first;
  sink = (double)total;
  return (double)STEPS * CHAINS * sizeof(bytes) * 2;
}
#define INT8
#endif

static void *work(void *of) {
  share *s = of;
  pthread_barrier_wait(s->start);
  s->begin = now();
  s->amount = s->run(s->from, s->bytes);
  s->end = now();
  return 0;
}

// Runs `run` on all threads at once, each with its part of `from`; returns 1e9 of what was done a second.
static double rate(double (*run)(const char *, size_t), const char *from, int threads) {
  pthread_t ids[MAX_THREADS];
  share shares[MAX_THREADS];
  pthread_barrier_t start;
  pthread_barrier_init(&start, 0, (unsigned)threads);
  size_t part = REGION / (size_t)threads / 4096 * 4096;
  for (int i = 0; i < threads; i++) {
    shares[i] = (share){.run = run, .from = from + (size_t)i * part, .bytes = part, .start = &start};
    if (pthread_create(&ids[i], 0, work, &shares[i])) exit(3);
  }
  double begin = 1e300, end = 0, amount = 0;
  for (int i = 0; i < threads; i++) {
    pthread_join(ids[i], 0);
    if (shares[i].begin < begin) begin = shares[i].begin;
    if (shares[i].end > end) end = shares[i].end;
    amount += shares[i].amount;
  }
  pthread_barrier_destroy(&start);
  return amount / (end - begin) * 1e-9;
}

static char *region(int advice) {
  const size_t huge = (size_t)2 << 20;
  char *p = mmap(0, REGION + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    perror("mmap");
    exit(3);
  }
  p = (char *)(((uintptr_t)p + huge - 1) / huge * huge);
  madvise(p, REGION, advice);
  memset(p, 1, REGION);
  return p;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  int threads = argc == 3 && !strcmp(argv[1], "quick") ? atoi(argv[2]) : 0;
  if (threads < 1 || threads > MAX_THREADS) {
    fprintf(stderr, "usage: ceilings quick THREADS\n");
    return 2;
  }
  char *small = region(MADV_NOHUGEPAGE), *big = region(MADV_HUGEPAGE);
  struct {
    const char *name;
    double (*run)(const char *, size_t);
    const char *from;
    int passes;
    double got[ROUNDS * PASSES];
  } probes[] = {
    {"bw_4k", read_all, small, PASSES, {0}},
    {"bw_huge", read_all, big, PASSES, {0}},
    {"fp32", multiply_add, small, 1, {0}},
#if defined(__AVX512BF16__)
    {"bf16", dot_pairs, small, 1, {0}},
#endif
#if defined(INT8)
    {"int8", dot_quadruples, small, 1, {0}},
#endif
  };
  int count = (int)(sizeof probes / sizeof *probes);
  for (int round = 0; round < ROUNDS; round++)
    for (int i = 0; i < count; i++)
      for (int pass = 0; pass < probes[i].passes; pass++)
        probes[i].got[round * probes[i].passes + pass] = rate(probes[i].run, probes[i].from, threads);
  for (int i = 0; i < count; i++) {
    int taken = ROUNDS * probes[i].passes, wanted = probes[i].passes == 1 ? taken - 1 : taken / 2;
    qsort(probes[i].got, (size_t)taken, sizeof(double), ascending);
    printf("%s\"%s\": %.2f", i ? ", " : "{", probes[i].name, probes[i].got[wanted]);
  }
  printf("}\n");
  return 0;
}
