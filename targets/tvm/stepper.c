// Runs the stages of one step on a small thread pool.
//
// A stage is a kernel over `n` independent chunks. Each thread has a run of them, so that it reads memory in order, and
// claims them one by one; when its own are gone it claims those of others. A stage is over when all its chunks are done,
// not when all threads have arrived, and so is a step: nobody waits for a thread that has no chunk. A thread that comes
// late, even after the step, finds nothing left to claim, since what it claims by is marked with the step's number.
//
// Between stages threads spin briefly, then let others run. Between steps they spin for about as long as a caller needs
// to prepare the next one, then sleep. Where cores are shared, which a thread learns from being put off its core, it
// sleeps at once: time spent spinning is time that the system takes back later, in the middle of a chunk perhaps.
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define IL_ABI 2
#define IL_ARGS 16
#define IL_MAX_THREADS 256
#define SPINS 64                  // looks at a counter between two looks at the clock
#define STAGE_SPIN_NS 20000       // how long a thread spins for the end of a stage
#define IDLE_SPIN_NS 2000000      // how long it spins for the next step
#define CROWDED_SPIN_NS 5000      // the same where cores are shared
#define CROWDED_FOR_NS 100000000  // how long cores count as shared after a thread was put off one

typedef void (*il_kernel)(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                          void *, void *, void *, void *, void *, const int32_t *, int32_t);
typedef struct {
  il_kernel fn;
  void *args[IL_ARGS];
  int32_t dim, tile, mult, flags;
} il_call;

typedef _Atomic uint64_t word;  // mostly a step's number << 32 | a count

typedef struct {
  word size;    // step << 32 | chunks
  word target;  // what `done` is at the end of the stage
} stage;

typedef struct {
  _Alignas(64) word done;  // chunks of all steps so far
} progress;

// What belongs to one thread alone.
typedef struct {
  uint64_t crowded_until;
  long put_off;
} self;

static struct {
  _Alignas(64) word head;  // step << 32 | stages
  atomic_uint bell;        // the step's number again, for those who sleep
  _Alignas(64) atomic_uint sleepers;
  atomic_int stop;
  // Of the step that `head` tells; a worker reads them while it has a chunk of that step, so they do not change then.
  const il_call *calls;
  const int32_t *dims;
  stage *stages;
  progress *progress;
  word *claimed;  // step << 32 | chunks that were claimed: of each thread's run, a row of `stride` stages
} job;

static pthread_t threads[IL_MAX_THREADS];
static int started = 1, crowded_always, pinned;
static int32_t capacity, stride;
static uint32_t step;
static pthread_mutex_t step_lock = PTHREAD_MUTEX_INITIALIZER;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#else
  __asm__ volatile("" ::: "memory");
#endif
}

static uint64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline uint64_t pack(uint32_t step, uint32_t count) { return (uint64_t)step << 32 | count; }
static inline uint32_t step_of(uint64_t w) { return (uint32_t)(w >> 32); }

// Whether this thread shares its core: asked after each step.
static void look_around(self *me) {
  struct rusage use;
  if (getrusage(RUSAGE_THREAD, &use)) return;
  if (use.ru_nivcsw != me->put_off) me->crowded_until = now() + CROWDED_FOR_NS;
  me->put_off = use.ru_nivcsw;
}

static inline int crowded(const self *me, uint64_t t) { return crowded_always || t < me->crowded_until; }

static int32_t chunks(const il_call *c, const int32_t *dims) {
  return c->dim < 0 ? c->mult : (dims[c->dim] + c->tile - 1) / c->tile * c->mult;
}

// The next of n chunks of stage i of step s for a thread that claims those of thread *of, then of those after it; -1: none.
static int32_t claim(uint32_t s, int32_t i, int32_t n, int me, int *of) {
  for (; *of < me + started; ++*of) {
    int64_t t = *of % started;
    int32_t begin = (int32_t)(n * t / started), size = (int32_t)(n * (t + 1) / started) - begin;
    word *claimed = &job.claimed[t * stride + i];
    uint64_t seen = atomic_load_explicit(claimed, memory_order_relaxed);
    for (;;) {
      // One that an earlier step wrote has not been touched in this one; one of a later step says that this one is over.
      int32_t later = (int32_t)(step_of(seen) - s), nth = later < 0 ? 0 : (int32_t)(uint32_t)seen;
      if (later > 0 || nth >= size) break;
      if (atomic_compare_exchange_weak_explicit(claimed, &seen, pack(s, (uint32_t)nth + 1), memory_order_relaxed,
                                                memory_order_relaxed))
        return begin + nth;
    }
  }
  return -1;
}

// Take part in step s of `count` stages until it is over; `ns`, when given, receives the time of each.
static void run(uint32_t s, int32_t count, int number, uint64_t *ns) {
  for (int32_t i = 0; i < count; i++) {
    uint64_t size = atomic_load_explicit(&job.stages[i].size, memory_order_relaxed);
    uint64_t target = atomic_load_explicit(&job.stages[i].target, memory_order_relaxed);
    if (step_of(size) != s) return;
    int32_t n = (int32_t)(uint32_t)size, chunk;
    int of = number;
    uint64_t begin = ns ? now() : 0, made = 0;
    for (; (chunk = claim(s, i, n, number, &of)) >= 0; made++) {
      const il_call *c = &job.calls[i];
      void *const *a = c->args;
      c->fn(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15],
            job.dims, chunk);
    }
    if (made) atomic_fetch_add_explicit(&job.progress[i].done, made, memory_order_release);
    uint64_t since = 0;
    for (int spins = 1; atomic_load_explicit(&job.progress[i].done, memory_order_acquire) < target; spins++) {
      relax();
      if (spins % SPINS) continue;
      if (step_of(atomic_load_explicit(&job.head, memory_order_relaxed)) != s) return;
      uint64_t t = now();
      if (!since) since = t;
      if (t - since > STAGE_SPIN_NS) sched_yield();
    }
    if (ns) ns[i] = now() - begin;
  }
}

static void nap(uint32_t seen) {
  atomic_fetch_add(&job.sleepers, 1);
  while (atomic_load(&job.bell) == seen) syscall(SYS_futex, &job.bell, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
  atomic_fetch_sub(&job.sleepers, 1);
}

static void *worker(void *number) {
  self me = {0};
  for (uint32_t seen = 0;;) {
    uint64_t head, since = 0;
    for (int spins = 1; step_of(head = atomic_load_explicit(&job.head, memory_order_acquire)) == seen; spins++) {
      relax();
      if (spins % SPINS) continue;
      uint64_t t = now();
      if (!since) since = t;
      if (t - since > (crowded(&me, t) ? CROWDED_SPIN_NS : IDLE_SPIN_NS)) nap(seen);
    }
    seen = step_of(head);
    if (atomic_load(&job.stop)) return NULL;
    run(seen, (int32_t)(uint32_t)head, (int)(intptr_t)number, NULL);
    look_around(&me);
  }
}

static void publish(int32_t count) {
  atomic_store(&job.head, pack(++step, (uint32_t)count));
  atomic_store(&job.bell, step);
  if (atomic_load(&job.sleepers)) syscall(SYS_futex, &job.bell, FUTEX_WAKE_PRIVATE, IL_MAX_THREADS, NULL, NULL, 0);
}

// Bind a thread to the core of that number, in turn, among the usable ones.
static void pin(pthread_t thread, int number, const cpu_set_t *usable) {
  int count = CPU_COUNT(usable), core = 0;
  if (!count) return;
  for (int nth = number % count; !CPU_ISSET(core, usable) || nth--; core++) {}
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  pthread_setaffinity_np(thread, sizeof one, &one);
}

// Stop the workers, and have n threads with counters for so many stages. Returns the threads in use.
static int restart(int n, int32_t stages) {
  atomic_store(&job.stop, 1);
  publish(0);
  for (int i = 1; i < started; i++) pthread_join(threads[i], NULL);
  atomic_store(&job.stop, 0);
  free(job.stages);
  free(job.progress);
  free(job.claimed);
  started = 1, step = 0, capacity = 0;
  atomic_store(&job.head, 0);
  atomic_store(&job.bell, 0);
  stride = (stages + 7) / 8 * 8;
  size_t sizes[] = {sizeof(stage) * (size_t)stride, sizeof(progress) * (size_t)stride, sizeof(word) * (size_t)stride * (size_t)n};
  void *memory[3];
  for (int i = 0; i < 3; i++)
    if ((memory[i] = aligned_alloc(64, sizes[i] + 64))) memset(memory[i], 0, sizes[i]);
  job.stages = memory[0], job.progress = memory[1], job.claimed = memory[2];
  if (memory[0] && memory[1] && memory[2]) capacity = stages;
  cpu_set_t usable;
  CPU_ZERO(&usable);
  sched_getaffinity(0, sizeof usable, &usable);
  crowded_always = CPU_COUNT(&usable) && n > CPU_COUNT(&usable);
  for (; started < n && !pthread_create(&threads[started], NULL, worker, (void *)(intptr_t)started); started++)
    if (pinned) pin(threads[started], started, &usable);
  return started;
}

int il_abi(void) { return IL_ABI; }

// Whether threads that il_threads starts from now on stay on a core each.
void il_pin(int on) { pinned = on; }

// Use n threads, the caller being one of them. Returns the number in use, or -1 when n is out of range.
int il_threads(int n) {
  if (n < 1 || n > IL_MAX_THREADS) return -1;
  pthread_mutex_lock(&step_lock);
  int got = restart(n, capacity);
  pthread_mutex_unlock(&step_lock);
  return got;
}

// Run n calls in order. `ns`, when given, receives each call's nanoseconds. Returns 0, or -1 without memory.
int il_step(const il_call *calls, int32_t n, const int32_t *dims, uint64_t *ns) {
  pthread_mutex_lock(&step_lock);
  if (n > capacity || step >= INT32_MAX) restart(started, n > capacity ? n : capacity);
  if (n > capacity) {
    pthread_mutex_unlock(&step_lock);
    return -1;
  }
  job.calls = calls;
  job.dims = dims;
  for (int32_t i = 0; i < n; i++) {
    int32_t size = chunks(&calls[i], dims);
    uint64_t before = atomic_load_explicit(&job.progress[i].done, memory_order_relaxed);
    atomic_store_explicit(&job.stages[i].target, before + (uint64_t)size, memory_order_relaxed);
    atomic_store_explicit(&job.stages[i].size, pack(step + 1, (uint32_t)size), memory_order_relaxed);
  }
  publish(n);
  run(step, n, 0, ns);
  pthread_mutex_unlock(&step_lock);
  return 0;
}
