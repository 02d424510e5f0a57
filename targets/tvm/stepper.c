// Runs the stages of one step on a small thread pool.
//
// A stage is a kernel over `n` independent chunks. Each thread has a run of them, so that it reads memory in order, and
// claims them one by one with an atomic counter; when its own are gone it claims those of others. A stage is over when
// all its chunks are done, not when all threads have arrived, so a thread that the system has put to sleep holds up no
// more than the chunk it has. Threads spin briefly between stages, then yield, and sleep between steps.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define IL_ABI 2
#define IL_ARGS 16
#define IL_MAX_THREADS 256
#define SPINS_BEFORE_YIELD 2000
#define SPINS_BEFORE_SLEEP 200000

typedef void (*il_kernel)(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                          void *, void *, void *, void *, void *, const int32_t *, int32_t);
typedef struct {
  il_kernel fn;
  void *args[IL_ARGS];
  int32_t dim, tile, mult, flags;
} il_call;

typedef struct {
  _Alignas(64) atomic_int done;
} stage;

static struct {
  _Alignas(64) atomic_uint generation;
  _Alignas(64) atomic_int busy;
  atomic_int sleepers;
  atomic_int stop;
  const il_call *calls;
  const int32_t *dims;
  stage *stages;
  atomic_int *next;  // chunks that were claimed: of each thread's run, a row of `stride` stages
  uint64_t *ns;
  int32_t count;
} job;

static pthread_t threads[IL_MAX_THREADS];
static int started = 1;
static int capacity, stride;
static pthread_mutex_t step_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#else
  __asm__ volatile("" ::: "memory");
#endif
}

static inline void spin(int *spins) {
  relax();
  if (++*spins % SPINS_BEFORE_YIELD == 0) sched_yield();
}

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int32_t chunks(const il_call *c, const int32_t *dims) {
  return c->dim < 0 ? c->mult : (dims[c->dim] + c->tile - 1) / c->tile * c->mult;
}

// The next chunk of stage i for a thread that claims those of thread *of, and then of the threads after it; -1: none.
static int32_t claim(int32_t i, int32_t n, int me, int *of) {
  for (; *of < me + started; ++*of) {
    int64_t t = *of % started;
    int32_t begin = (int32_t)(n * t / started), size = (int32_t)(n * (t + 1) / started) - begin;
    atomic_int *next = &job.next[t * stride + i];
    if (atomic_load_explicit(next, memory_order_relaxed) >= size) continue;
    int32_t nth = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
    if (nth < size) return begin + nth;
  }
  return -1;
}

static void run(int me) {
  for (int32_t i = 0; i < job.count; i++) {
    const il_call *c = &job.calls[i];
    stage *s = &job.stages[i];
    int32_t n = chunks(c, job.dims), chunk, made = 0;
    int timed = me == 0 && job.ns, of = me;
    uint64_t begin = timed ? now() : 0;
    void *const *a = c->args;
    for (; (chunk = claim(i, n, me, &of)) >= 0; made++)
      c->fn(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15],
            job.dims, chunk);
    if (made) atomic_fetch_add_explicit(&s->done, made, memory_order_release);
    int spins = 0;
    while (atomic_load_explicit(&s->done, memory_order_acquire) < n) spin(&spins);
    if (timed) job.ns[i] = now() - begin;
  }
}

static void *worker(void *number) {
  int me = (int)(intptr_t)number;
  unsigned seen = 0;
  for (;;) {
    int spins = 0;
    while (atomic_load_explicit(&job.generation, memory_order_acquire) == seen) {
      spin(&spins);
      if (spins < SPINS_BEFORE_SLEEP) continue;
      pthread_mutex_lock(&sleep_lock);
      atomic_fetch_add(&job.sleepers, 1);
      while (atomic_load(&job.generation) == seen) pthread_cond_wait(&wake, &sleep_lock);
      atomic_fetch_sub(&job.sleepers, 1);
      pthread_mutex_unlock(&sleep_lock);
    }
    seen = atomic_load_explicit(&job.generation, memory_order_acquire);
    if (atomic_load(&job.stop)) {
      atomic_fetch_sub(&job.busy, 1);
      return NULL;
    }
    run(me);
    atomic_fetch_sub_explicit(&job.busy, 1, memory_order_release);
  }
}

static void publish(void) {
  atomic_store_explicit(&job.busy, started - 1, memory_order_relaxed);
  atomic_fetch_add(&job.generation, 1);
  if (atomic_load(&job.sleepers)) {
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleep_lock);
  }
}

static void stop_workers(void) {
  if (started == 1) {  // steps on one thread count too, and new workers begin at 0
    atomic_store(&job.generation, 0);
    return;
  }
  atomic_store(&job.stop, 1);
  publish();
  for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
  atomic_store(&job.stop, 0);
  atomic_store(&job.generation, 0);
  started = 1;
}

int il_abi(void) { return IL_ABI; }

// Use n threads, the caller being one of them. Returns the number in use, or -1 when n is out of range.
int il_threads(int n) {
  if (n < 1 || n > IL_MAX_THREADS) return -1;
  pthread_mutex_lock(&step_lock);
  stop_workers();
  while (started < n && pthread_create(&threads[started], NULL, worker, (void *)(intptr_t)started) == 0)
    started++;
  capacity = 0;  // counters are for so many threads
  pthread_mutex_unlock(&step_lock);
  return started;
}

// Run n calls in order. `ns`, when given, receives each call's nanoseconds. Returns 0, or -1 without memory.
int il_step(const il_call *calls, int32_t n, const int32_t *dims, uint64_t *ns) {
  pthread_mutex_lock(&step_lock);
  if (n > capacity) {
    free(job.stages);
    free(job.next);
    stride = (n + 15) / 16 * 16;
    job.stages = aligned_alloc(64, sizeof(stage) * (size_t)n);
    job.next = aligned_alloc(64, sizeof(atomic_int) * (size_t)stride * (size_t)started);
    capacity = job.stages && job.next ? n : 0;
  }
  if (n > capacity) {
    pthread_mutex_unlock(&step_lock);
    return -1;
  }
  for (int32_t i = 0; i < n; i++) atomic_store_explicit(&job.stages[i].done, 0, memory_order_relaxed);
  if (n > 0) memset(job.next, 0, sizeof(atomic_int) * (size_t)stride * (size_t)started);
  job.calls = calls;
  job.count = n;
  job.dims = dims;
  job.ns = ns;
  publish();
  run(0);
  // Workers must have left before the caller may reuse the stages.
  int spins = 0;
  while (atomic_load_explicit(&job.busy, memory_order_acquire)) spin(&spins);
  pthread_mutex_unlock(&step_lock);
  return 0;
}
