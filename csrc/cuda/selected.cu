// Work on the selected elements alone: one thread each, positions and their values read in order, the rest scattered.

#include "launch.h"

namespace piece::cuda {
namespace {

// The position that thread j works on. One outside of the tensor stops the kernel before anything is written there.
__device__ __forceinline__ int64_t position(const int64_t* __restrict__ index, int64_t j, int64_t n) {
  const int64_t i = index[j];
  assert(i >= 0 && i < n && "piece_ds: a position in index lies outside of its tensor");
  return i;
}

// body(j) for every selected element, over the whole grid.
template <typename Body>
__device__ __forceinline__ void for_each_selected(int64_t k, Body body) {
  for_each_pack<1>(Range{k, 0}, [&](auto, int64_t j) { body(j); });
}

unsigned blocks_for(int64_t k) { return static_cast<unsigned>(grid_for(k, kThreads)); }

// ---- index_to_mask ----

__global__ void __launch_bounds__(kThreads)
    set_bits_kernel(const int64_t* __restrict__ index, int64_t k, uint32_t* words, int64_t n) {
  for_each_selected(k, [&](int64_t j) {
    const int64_t i = position(index, j, n);
    atomicOr(words + i / 32, 1u << (i % 32));  // little-endian: bit i % 8 of byte i / 8
  });
}

// ---- apply_mask_ ----

// Partial sums are those of fixed ranges of 4096 selected elements, whatever the machine: their order never changes.
constexpr int kSelectedPerThread = 4;
constexpr int64_t kSelectedPerPartial = kSelectedPerThread * kThreads;

// The sum over the block; only thread 0 has it. A tree of fixed shape.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  return shared[0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    keep_kernel(const T* __restrict__ grad, int64_t n, const int64_t* __restrict__ index, int64_t k, float scale,
                bool scaled, T* __restrict__ kept, double* __restrict__ partial, int64_t* num_nonfinite) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSelectedPerPartial;
  uint32_t num_bad = 0;
  double norm = 0.0;
  // Positions first, then the gradient's entries: four of each are on their way at once.
  int64_t i[kSelectedPerThread];
  T value[kSelectedPerThread];
#pragma unroll
  for (int u = 0; u < kSelectedPerThread; ++u) {
    const int64_t j = first + u * kThreads + threadIdx.x;
    i[u] = j < k ? index[j] : -1;
  }
#pragma unroll
  for (int u = 0; u < kSelectedPerThread; ++u) {
    const bool exists = first + u * kThreads + threadIdx.x < k;
    const bool inside = i[u] >= 0 && i[u] < n;
    assert((!exists || inside) && "piece_ds: a position in index lies outside of its tensor");
    value[u] = inside ? grad[i[u]] : T{};
  }
#pragma unroll
  for (int u = 0; u < kSelectedPerThread; ++u) {
    const int64_t j = first + u * kThreads + threadIdx.x;
    if (j >= k) continue;
    if (scaled) value[u] = from_float<T>(mul(to_float(value[u]), scale));
    kept[j] = value[u];
    const float x = to_float(value[u]);
    num_bad += !is_finite(x);
    norm += static_cast<double>(x) * x;  // the square of a float is exact in fp64
  }
  const double sum = block_sum(norm);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  add_warp_to(num_nonfinite, num_bad);
}

// The first block also adds up the partial sums; the gradient is all zeros by now.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(T* __restrict__ grad, const int64_t* __restrict__ index, int64_t k, const T* __restrict__ kept,
                   const double* __restrict__ partial, int64_t num_partials, double* square_norm) {
  for_each_selected(k, [&](int64_t j) { grad[index[j]] = kept[j]; });
  if (blockIdx.x != 0) return;
  double norm = 0.0;
  for (int64_t i = threadIdx.x; i < num_partials; i += kThreads) norm += partial[i];
  const double sum = block_sum(norm);
  if (threadIdx.x == 0) *square_norm += sum;
}

// ---- gather_add_, sparse_adamw_ ----

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_add_kernel(const T* __restrict__ grad, int64_t n, const int64_t* __restrict__ index, int64_t k, float scale,
                      float* __restrict__ total) {
  for_each_selected(k, [&](int64_t j) {
    total[j] = add(total[j], mul(to_float(grad[position(index, j, n)]), scale));
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sparse_adamw_kernel(const float* __restrict__ grad, float* __restrict__ value, float* __restrict__ exp_avg,
                        float* __restrict__ exp_avg_sq, T* __restrict__ weight, int64_t n,
                        const int64_t* __restrict__ index, int64_t k, AdamW step, bool weight_holds_value) {
  for_each_selected(k, [&](int64_t j) {
    const int64_t i = position(index, j, n);
    float new_value = value[j], first = exp_avg[j], second = exp_avg_sq[j];
    const T before = from_float<T>(new_value);
    adamw(step, grad[j], new_value, first, second);
    value[j] = new_value;
    exp_avg[j] = first;
    exp_avg_sq[j] = second;
    // A line of its own for most elements: what keeps its rounding costs none.
    const T after = from_float<T>(new_value);
    if (!weight_holds_value || !same_bits(after, before)) weight[i] = after;
  });
}

}  // namespace

cudaError_t index_to_mask(const int64_t* index, int64_t k, uint32_t* words, int64_t n, cudaStream_t stream) {
  const int64_t num_words = n / 32 + (n % 32 != 0);
  if (num_words == 0) return cudaSuccess;  // words may be null then
  if (const cudaError_t error = cudaMemsetAsync(words, 0, static_cast<size_t>(num_words) * 4, stream);
      error != cudaSuccess || k == 0) {
    return error;
  }
  set_bits_kernel<<<blocks_for(k), kThreads, 0, stream>>>(index, k, words, n);
  return cudaGetLastError();
}

int64_t apply_mask_partials(int64_t k) { return k / kSelectedPerPartial + (k % kSelectedPerPartial != 0); }

cudaError_t apply_mask(DType dtype, void* grad, int64_t n, const int64_t* index, int64_t k, double scale, void* kept,
                       double* partial, double* square_norm, int64_t* num_nonfinite, cudaStream_t stream) {
  const int64_t num_partials = apply_mask_partials(k);
  if (num_partials > INT32_MAX) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* g = static_cast<T*>(grad);
    if (k > 0) {
      keep_kernel<<<static_cast<unsigned>(num_partials), kThreads, 0, stream>>>(
          g, n, index, k, static_cast<float>(scale), scale != 1.0, static_cast<T*>(kept), partial, num_nonfinite);
      if ((error = cudaGetLastError()) != cudaSuccess) return;
    }
    if (n > 0 && (error = cudaMemsetAsync(g, 0, static_cast<size_t>(n) * sizeof(T), stream)) != cudaSuccess) return;
    if (k > 0) {
      scatter_kernel<<<blocks_for(k), kThreads, 0, stream>>>(g, index, k, static_cast<const T*>(kept), partial,
                                                             num_partials, square_norm);
      error = cudaGetLastError();
    }
  });
  return error;
}

cudaError_t gather_add(DType dtype, const void* grad, int64_t n, const int64_t* index, int64_t k, float scale,
                       float* total, cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  with_type(dtype, [&](auto zero) {
    const auto* g = static_cast<const decltype(zero)*>(grad);
    gather_add_kernel<<<blocks_for(k), kThreads, 0, stream>>>(g, n, index, k, scale, total);
  });
  return cudaGetLastError();
}

cudaError_t sparse_adamw(DType dtype, const float* grad, float* value, float* exp_avg, float* exp_avg_sq, void* weight,
                         int64_t n, const int64_t* index, int64_t k, const AdamW& step, bool weight_holds_value,
                         cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  with_type(dtype, [&](auto zero) {
    auto* w = static_cast<decltype(zero)*>(weight);
    sparse_adamw_kernel<<<blocks_for(k), kThreads, 0, stream>>>(grad, value, exp_avg, exp_avg_sq, w, n, index, k, step,
                                                                weight_holds_value);
  });
  return cudaGetLastError();
}

}  // namespace piece::cuda
