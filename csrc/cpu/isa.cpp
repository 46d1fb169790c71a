// Which instruction set serves, by what the processor says; never by what the compiler's machine had.
#include <atomic>
#include <cstring>

#include "ops.h"

namespace piece::cpu {
namespace {

bool runs_here(const Kernels* kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (kernels == &kAvx2) return __builtin_cpu_supports("avx2");  // F16C is older than AVX2
  if (kernels == &kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return kernels == &kScalar;
}

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  const Kernels* best_first[] = {&kAvx512, &kAvx2, &kScalar};
#else
  const Kernels* best_first[] = {&kScalar};
#endif
  for (const Kernels* kernels : best_first) {
    if ((*name == '\0' || std::strcmp(name, kernels->name) == 0) && runs_here(kernels)) return kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{find("")};
  return kernels;
}

}  // namespace

const Kernels& active() { return *chosen().load(std::memory_order_relaxed); }

const char* select_isa(const char* name) {
  const Kernels* kernels = find(name);
  if (kernels) chosen() = kernels;
  return kernels ? kernels->name : nullptr;
}

}  // namespace piece::cpu
