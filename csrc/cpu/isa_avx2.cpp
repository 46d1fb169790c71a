// The range kernels for processors with avx2, chosen at run time.
#if defined(__x86_64__)
// Headers first: nothing of theirs may be compiled for a processor that not everybody has.
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi")
#endif

#include "vec_avx2.h"

#include "range_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace piece::cpu {
extern const Kernels kAvx2 = kernels_named("avx2");
}
#endif
