// The range kernels for processors with avx512, chosen at run time.
#if defined(__x86_64__)
// Headers first: nothing of theirs may be compiled for a processor that not everybody has.
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,bmi")
#endif

#include "vec_avx512.h"

#include "range_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace piece::cpu {
extern const Kernels kAvx512 = kernels_named("avx512");
}
#endif
