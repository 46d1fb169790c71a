// Work on the selected elements alone: one thread each, positions and their values read in order, the rest scattered.
// What is written may be a list of tensors (runs.h).

#include <type_traits>

#include "runs.h"

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

// partial is null where no norm is wanted, num_nonfinite where no count is.
template <typename T, typename Target>
__global__ void __launch_bounds__(kThreads)
    keep_kernel(const __grid_constant__ Target target, const int64_t* __restrict__ index, int64_t k, float scale, bool scaled,
                T* __restrict__ kept, double* __restrict__ partial, int64_t* num_nonfinite) {
  const auto places = target.open();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSelectedPerPartial;
  uint32_t num_bad = 0;
  double norm = 0.0;
  // Positions first, then the gradient's entries: four of each are on their way at once.
  int64_t i[kSelectedPerThread];
  const T* place[kSelectedPerThread];
  T value[kSelectedPerThread];
#pragma unroll
  for (int u = 0; u < kSelectedPerThread; ++u) {
    const int64_t j = first + u * kThreads + threadIdx.x;
    i[u] = j < k ? index[j] : -1;
  }
#pragma unroll
  for (int u = 0; u < kSelectedPerThread; ++u) {
    place[u] = first + u * kThreads + threadIdx.x < k ? places.at(i[u]) : nullptr;
    value[u] = place[u] != nullptr ? *place[u] : T{};
  }
#pragma unroll
  for (int u = 0; u < kSelectedPerThread; ++u) {
    if (place[u] == nullptr) continue;
    if (scaled) value[u] = from_float<T>(mul(to_float(value[u]), scale));
    kept[first + u * kThreads + threadIdx.x] = value[u];
    const float x = to_float(value[u]);
    num_bad += !is_finite(x);
    norm += static_cast<double>(x) * x;  // the square of a float is exact in fp64
  }
  if (partial != nullptr) {
    const double sum = block_sum(norm);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  }
  if (num_nonfinite != nullptr) add_warp_to(num_nonfinite, num_bad);
}

// Zeros to all positions of the target's runs, 16 bytes at a time where a run allows it.
template <typename T>
__global__ void __launch_bounds__(kThreads) zero_kernel(const __grid_constant__ Many<T> target) {
  constexpr int width = 16 / sizeof(T);
  constexpr int64_t chunk = kThreads * width * 8;
  const auto places = target.open();
  for (int64_t from = places.begin[0] + blockIdx.x * chunk; from < places.begin[places.count];
       from += gridDim.x * chunk) {
    const int64_t to = from + chunk < places.begin[places.count] ? from + chunk : places.begin[places.count];
    for (int64_t at = from; at < to;) {  // the parts of runs in [from, to)
      T* const data = places.at(at);
      int run = 0;
      while (places.begin[run + 1] <= at) ++run;
      const int64_t n = (places.begin[run + 1] < to ? places.begin[run + 1] : to) - at;
      const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
      const int64_t head = misaligned == 0 ? 0 : width - misaligned < n ? width - misaligned : n;
      const int64_t num_packs = (n - head) / width;
      for (int64_t p = threadIdx.x; p < num_packs; p += kThreads) store<width>(data + head + p * width, Pack<T, width>{});
      const int64_t num_single = n - num_packs * width;
      for (int64_t s = threadIdx.x; s < num_single; s += kThreads) data[s < head ? s : s + num_packs * width] = T{};
      at += n;
    }
  }
}

template <typename T>
cudaError_t zero(const Runs& runs, cudaStream_t stream) {
  return for_each_launch<T>(runs, [&](int64_t, const auto& target) {
    using Target = std::decay_t<decltype(target)>;
    if constexpr (std::is_same_v<Target, One<T>>) {
      return target.n > 0 ? cudaMemsetAsync(target.data, 0, static_cast<size_t>(target.n) * sizeof(T), stream) : cudaSuccess;
    } else {
      const auto blocks = static_cast<unsigned>(grid_for(target.begin[target.count] - target.begin[0], kThreads * 16 / sizeof(T) * 8));
      zero_kernel<T><<<blocks, kThreads, 0, stream>>>(target);
      return cudaGetLastError();
    }
  });
}

// target[index[j]] = value[j]. In the first launch of all the first block adds up the partial sums, where there are any.
template <typename T, typename Target>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ Target target, const int64_t* __restrict__ index, int64_t k,
                   const T* __restrict__ value, const double* __restrict__ partial, int64_t num_partials,
                   double* square_norm) {
  const auto places = target.open();
  for_each_selected(k, [&](int64_t j) {
    if (T* const place = places.at(index[j]); place != nullptr) *place = value[j];
  });
  if (blockIdx.x != 0 || num_partials == 0) return;
  double norm = 0.0;
  for (int64_t i = threadIdx.x; i < num_partials; i += kThreads) norm += partial[i];
  const double sum = block_sum(norm);
  if (threadIdx.x == 0) *square_norm += sum;
}

template <typename T>
cudaError_t scatter_values(const Runs& runs, const int64_t* index, int64_t k, const T* value, const double* partial,
                           int64_t num_partials, double* square_norm, cudaStream_t stream) {
  return for_each_launch<T>(runs, [&](int64_t number, const auto& target) {
    scatter_kernel<<<blocks_for(k), kThreads, 0, stream>>>(target, index, k, value, partial, number == 0 ? num_partials : 0,
                                                           square_norm);
    return cudaGetLastError();
  });
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

template <typename T, typename Target>
__global__ void __launch_bounds__(kThreads, 5)  // ptxas for sm_100 otherwise stays at 40 registers and spills one
    sparse_adamw_kernel(const float* __restrict__ grad, float* __restrict__ value, float* __restrict__ exp_avg,
                        float* __restrict__ exp_avg_sq, const __grid_constant__ Target target,
                        const int64_t* __restrict__ index, int64_t k, AdamW step, bool weight_holds_value) {
  const auto places = target.open();
  for_each_selected(k, [&](int64_t j) {
    T* const place = places.at(index[j]);
    if (place == nullptr) return;  // another launch's
    float new_value = value[j], first = exp_avg[j], second = exp_avg_sq[j];
    const T before = from_float<T>(new_value);
    adamw(step, grad[j], new_value, first, second);
    value[j] = new_value;
    exp_avg[j] = first;
    exp_avg_sq[j] = second;
    // A line of its own for most elements: what keeps its rounding costs none.
    const T after = from_float<T>(new_value);
    if (!weight_holds_value || !same_bits(after, before)) *place = after;
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

int64_t apply_mask_partials(const Runs& runs, int64_t k) {
  return (k / kSelectedPerPartial + (k % kSelectedPerPartial != 0)) * num_launches_of(runs);
}

cudaError_t apply_mask(DType dtype, const Runs& grads, const int64_t* index, int64_t k, double scale, void* kept,
                       double* partial, double* square_norm, int64_t* num_nonfinite, cudaStream_t stream) {
  const int64_t num_partials = apply_mask_partials(grads, k), blocks = num_partials / num_launches_of(grads);
  if (num_partials > INT32_MAX) return cudaErrorInvalidValue;
  if (square_norm == nullptr) partial = nullptr;
  cudaError_t error = cudaSuccess;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* const entries = static_cast<T*>(kept);
    if (k > 0) {
      error = for_each_launch<T>(grads, [&](int64_t number, const auto& target) {
        keep_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
            target, index, k, static_cast<float>(scale), scale != 1.0, entries,
            partial == nullptr ? nullptr : partial + number * blocks, num_nonfinite);
        return cudaGetLastError();
      });
    }
    if (error == cudaSuccess) error = zero<T>(grads, stream);
    if (error == cudaSuccess && k > 0) {
      error = scatter_values<T>(grads, index, k, entries, partial, partial == nullptr ? 0 : num_partials, square_norm, stream);
    }
  });
  return error;
}

cudaError_t scatter(DType dtype, const Runs& weights, const int64_t* index, int64_t k, const void* values,
                    cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    error = scatter_values<T>(weights, index, k, static_cast<const T*>(values), nullptr, 0, nullptr, stream);
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

cudaError_t sparse_adamw(DType dtype, const float* grad, float* value, float* exp_avg, float* exp_avg_sq,
                         const Runs& weights, const int64_t* index, int64_t k, const AdamW& step, bool weight_holds_value,
                         cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    error = for_each_launch<T>(weights, [&](int64_t, const auto& target) {
      using Target = std::decay_t<decltype(target)>;
      sparse_adamw_kernel<T, Target><<<blocks_for(k), kThreads, 0, stream>>>(grad, value, exp_avg, exp_avg_sq, target, index, k,
                                                                             step, weight_holds_value);
      return cudaGetLastError();
    });
  });
  return error;
}

}  // namespace piece::cuda
