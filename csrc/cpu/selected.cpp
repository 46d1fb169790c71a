// Work on the selected elements alone.
#include <cstring>
#include <memory>

#include "ops.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace piece::cpu {
namespace {

// Positions this far ahead are fetched: a selected element is a cache line of its own, hundreds of cycles away.
constexpr int64_t kAhead = 24;
// Bytes put together in cache and then written past it. A smaller gradient is written through the cache, because who
// comes next will read it.
constexpr int64_t kChunkBytes = 4096;
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// 16-byte aligned `to`, size % 16 == 0.
void stream_copy(char* to, const char* from, int64_t size) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < size; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  std::memcpy(to, from, size);
#endif
}

void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

struct Norm {
  double square = 0.0;
  int64_t num_nonfinite = 0;
};

template <typename T>
T scaled(T x, float scale, Norm& norm) {
  const T kept = scale == 1.0f ? x : from_float<T>(mul(to_float(x), scale));  // 1 keeps the bits of a NaN too
  const float value = to_float(kept);
  norm.square += static_cast<double>(value) * static_cast<double>(value);
  norm.num_nonfinite += !is_finite(value);
  return kept;
}

// One block of the gradient: every line of it is written once, and only lines with a selected element are read.
template <typename T>
Norm apply_block(T* grad, int64_t begin, int64_t end, const int64_t* next, const int64_t* stop, float scale,
                 bool stream) {
  constexpr int64_t kChunk = kChunkBytes / sizeof(T);
  alignas(64) T chunk[kChunk];
  std::memset(chunk, 0, sizeof(chunk));
  Norm norm;
  for (int64_t first = begin; first < end;) {
    // The first chunk ends where a cache line begins, so that all others are whole lines.
    const int64_t misaligned = reinterpret_cast<uintptr_t>(grad + first) % 64 / sizeof(T);
    const int64_t size = std::min(end - first, misaligned ? 64 / static_cast<int64_t>(sizeof(T)) - misaligned : kChunk);
    const int64_t* const chunk_begin = next;
    for (; next < stop && *next < first + size; ++next) {
      if (next + kAhead < stop) __builtin_prefetch(grad + next[kAhead]);
      chunk[*next - first] = scaled(grad[*next], scale, norm);
    }
    if (stream && size == kChunk) {
      stream_copy(reinterpret_cast<char*>(grad + first), reinterpret_cast<const char*>(chunk), kChunkBytes);
    } else {
      std::memcpy(grad + first, chunk, size * sizeof(T));
    }
    for (const int64_t* done = chunk_begin; done < next; ++done) chunk[*done - first] = T{};
    first += size;
  }
  if (stream) stream_fence();
  return norm;
}

template <typename T>
void apply_mask_typed(T* grad, int64_t n, const int64_t* index, int64_t n_index, float scale, double* square_norm,
                      int64_t* num_nonfinite) {
  const int64_t blocks = num_blocks(n);
  std::vector<Norm> norms(blocks);  // added in their order: the same norm for any number of threads
  const bool stream = n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  for_blocks(blocks, [&](int64_t block) {
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, n);
    const int64_t* first = std::lower_bound(index, index + n_index, begin);
    const int64_t* last = std::lower_bound(first, index + n_index, end);
    norms[block] = apply_block(grad, begin, end, first, last, scale, stream);
  });
  Norm total;
  for (const Norm& norm : norms) {
    total.square += norm.square;
    total.num_nonfinite += norm.num_nonfinite;
  }
  *square_norm += total.square;
  *num_nonfinite += total.num_nonfinite;
}

template <typename T>
void gather_add_typed(const T* grad, const int64_t* index, int64_t n, float scale, float* total) {
  for_blocks(num_blocks(n), [&](int64_t block) {
    const int64_t last = std::min((block + 1) * kBlock, n);
    for (int64_t i = block * kBlock; i < last; ++i) {
      if (i + kAhead < last) __builtin_prefetch(grad + index[i + kAhead]);
      total[i] = add(total[i], mul(to_float(grad[index[i]]), scale));
    }
  });
}

template <typename T>
void scatter(T* weight, const int64_t* index, const float* value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) weight[index[i]] = from_float<T>(value[i]);
}

constexpr int64_t kAdamWBlock = 1 << 12;  // 4 of fp32 and the positions: 96 KiB, and a unit of sharing work
constexpr int64_t kAdamWRun = 256;        // their weights' lines are on their way while their step is computed

template <typename T>
void sparse_adamw_typed(const AdamW& step, const float* grad, float* value, float* exp_avg, float* exp_avg_sq,
                        T* weight, const int64_t* index, int64_t n) {
  for_blocks(num_blocks(n, kAdamWBlock), [&](int64_t block) {
    const int64_t end = std::min((block + 1) * kAdamWBlock, n);
    for (int64_t first = block * kAdamWBlock; first < end; first += kAdamWRun) {
      const int64_t size = std::min(kAdamWRun, end - first);
      for (int64_t i = 0; i < size; ++i) __builtin_prefetch(weight + index[first + i], 1);
      active().adamw(step, grad + first, value + first, exp_avg + first, exp_avg_sq + first, size);
      scatter(weight, index + first, value + first, size);
    }
  });
}

}  // namespace

void apply_mask(DType dtype, void* grad, int64_t n, const int64_t* index, int64_t n_index, bool ascending,
                double scale, double* square_norm, int64_t* num_nonfinite) {
  std::vector<int64_t> sorted;
  if (!ascending) {
    sorted.assign(index, index + n_index);
    std::sort(sorted.begin(), sorted.end());
    index = sorted.data();
  }
  const float factor = static_cast<float>(scale);
  if (dtype == kFloat32) apply_mask_typed(static_cast<float*>(grad), n, index, n_index, factor, square_norm, num_nonfinite);
  if (dtype == kBFloat16) apply_mask_typed(static_cast<bf16*>(grad), n, index, n_index, factor, square_norm, num_nonfinite);
  if (dtype == kFloat16) apply_mask_typed(static_cast<fp16*>(grad), n, index, n_index, factor, square_norm, num_nonfinite);
}

void gather_add(DType dtype, const void* grad, const int64_t* index, int64_t n, float scale, float* total) {
  if (dtype == kFloat32) gather_add_typed(static_cast<const float*>(grad), index, n, scale, total);
  if (dtype == kBFloat16) gather_add_typed(static_cast<const bf16*>(grad), index, n, scale, total);
  if (dtype == kFloat16) gather_add_typed(static_cast<const fp16*>(grad), index, n, scale, total);
}

void sparse_adamw(DType dtype, const AdamW& step, const float* grad, float* value, float* exp_avg, float* exp_avg_sq,
                  void* weight, const int64_t* index, int64_t n) {
  auto run = [&](auto* typed) { sparse_adamw_typed(step, grad, value, exp_avg, exp_avg_sq, typed, index, n); };
  if (dtype == kFloat32) run(static_cast<float*>(weight));
  if (dtype == kBFloat16) run(static_cast<bf16*>(weight));
  if (dtype == kFloat16) run(static_cast<fp16*>(weight));
}

}  // namespace piece::cpu
