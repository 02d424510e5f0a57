// Runs the stages of one step on the one thread that WebAssembly has here. See stepper.c for the calls.
#include <stdint.h>

#define IL_ABI 2
#define IL_ARGS 16

typedef void (*il_kernel)(void *, void *, void *, void *, void *, void *, void *, void *, void *, void *, void *,
                          void *, void *, void *, void *, void *, const int32_t *, int32_t);
typedef struct {
  il_kernel fn;
  void *args[IL_ARGS];
  int32_t dim, tile, mult, flags;
} il_call;

int il_abi(void) { return IL_ABI; }

int il_step(const il_call *calls, int32_t n, const int32_t *dims) {
  for (const il_call *c = calls; c < calls + n; c++) {
    void *const *a = c->args;
    int32_t chunks = c->dim < 0 ? c->mult : (dims[c->dim] + c->tile - 1) / c->tile * c->mult;
    for (int32_t chunk = 0; chunk < chunks; chunk++)
      c->fn(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], dims, chunk);
  }
  return 0;
}
