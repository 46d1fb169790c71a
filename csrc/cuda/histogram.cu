// score_histogram_: counts of one digit of the keys, in a table of each block's own where one fits its shared memory.
//
// Up to 13 bits (32 KiB) some blocks share a multiprocessor; 14 and 15 bits take most of its shared memory for one;
// 16 bits (256 KiB), and 15 where the device offers less, are counted in device memory. A thread keeps a run of equal
// digits to itself, so that a tensor of zeros costs one atomic a thread and not one an element.

#include "launch.h"

namespace piece::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kSmallTable = 48 * 1024;  // a block gets more shared memory only when it asks for it
constexpr int kVector = 4;

struct Digit {
  int shift, bits;
  int64_t prefix;
};

struct Sample {
  int64_t run, stride;
};

// Where counts go: shared 32-bit counters (a block sees less than 2^32 elements), or the result itself.
template <bool in_shared>
struct Table {
  uint32_t* shared;
  int64_t* counts;
  int32_t current = 0;
  uint32_t length = 0;

  __device__ __forceinline__ void flush() {
    if (length == 0) return;
    if constexpr (in_shared) {
      atomicAdd(shared + current, length);
    } else {
      add_to(counts + current, length);
    }
  }

  __device__ __forceinline__ void count(int32_t value) {
    if (value != current) {
      flush();
      current = value;
      length = 0;
    }
    ++length;
  }
};

template <bool with_sum, bool in_shared, bool sampling, int width>
__global__ void __launch_bounds__(kMaxThreads, 1)
    histogram_kernel(Scores scores, Range range, Digit digit_of, Sample sample, int64_t* __restrict__ counts) {
  extern __shared__ uint32_t shared[];
  const int num_bins = 1 << digit_of.bits;
  if constexpr (in_shared) {
    for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) shared[bin] = 0;
    __syncthreads();
  }
  Table<in_shared> table{shared, counts};
  for_each_pack<width>(range, [&](auto packed, int64_t position) {
    constexpr int w = decltype(packed)::value;
    int64_t i = position;
    if constexpr (sampling) i = position / sample.run * sample.stride + position % sample.run;
    const auto squares = load<w>(scores.square + i);
    Pack<float, w> sums{};
    if constexpr (with_sum) sums = load<w>(scores.sum + i);
#pragma unroll
    for (int j = 0; j < w; ++j) {
      const int32_t key = key_of(piece::score<with_sum>(sums.v[j], squares.v[j], scores.lam));
      if (has_prefix(key, digit_of.shift, digit_of.bits, digit_of.prefix)) {
        table.count(digit(key, digit_of.shift, digit_of.bits));
      }
    }
  });
  table.flush();
  if constexpr (in_shared) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
      if (shared[bin] != 0) add_to(counts + bin, shared[bin]);
    }
  }
}

template <bool with_sum, bool in_shared, bool sampling, int width>
cudaError_t launch(const Scores& scores, const Range& range, const Digit& digit_of, const Sample& sample,
                   int64_t* counts, cudaStream_t stream) {
  const size_t bytes = in_shared ? sizeof(uint32_t) << digit_of.bits : 0;
  const auto kernel = histogram_kernel<with_sum, in_shared, sampling, width>;
  const bool is_small = bytes <= kSmallTable;
  if (!is_small) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  // As many blocks as run at once: each has a table to fill with zeros and to add to the result.
  const int threads = is_small ? kMaxThreads / 2 : kMaxThreads;
  int resident = 1;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = grid_for(range.n, threads * width, resident);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(scores, range, digit_of, sample, counts);
  return cudaGetLastError();
}

template <bool with_sum, bool in_shared>
cudaError_t launch_any(const Scores& scores, const Digit& digit_of, const Sample& sample, int64_t* counts,
                       cudaStream_t stream) {
  if (sample.run < sample.stride) {
    const int64_t rest = scores.n % sample.stride;
    const int64_t n = scores.n / sample.stride * sample.run + (rest < sample.run ? rest : sample.run);
    if (n == 0) return cudaSuccess;
    const Range range{n, 0};
    // A pack of the sample is one of the tensor where runs begin and end at multiples of a pack.
    const bool packed = sample.run % kVector == 0 && sample.stride % kVector == 0 && is_aligned(scores.sum) &&
                        is_aligned(scores.square);
    return packed ? launch<with_sum, in_shared, true, kVector>(scores, range, digit_of, sample, counts, stream)
                  : launch<with_sum, in_shared, true, 1>(scores, range, digit_of, sample, counts, stream);
  }
  cudaError_t error = cudaSuccess;
  with_alignment<kVector>(
      scores.n,
      [&](auto packed, const Range& range) {
        error = launch<with_sum, in_shared, false, decltype(packed)::value>(scores, range, digit_of, sample, counts,
                                                                            stream);
      },
      scores.sum, scores.square);
  return error;
}

cudaError_t fits_shared(int bits, bool* fits) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *fits = (int64_t{4} << bits) <= most;
  return error;
}

}  // namespace

cudaError_t histogram(const Scores& scores, int shift, int bits, int64_t prefix, int64_t run, int64_t stride,
                      int64_t* counts, cudaStream_t stream) {
  if (scores.n == 0) return cudaSuccess;
  bool in_shared = false;
  if (const cudaError_t error = fits_shared(bits, &in_shared); error != cudaSuccess) return error;
  const Digit digit_of{shift, bits, prefix};
  const Sample sample{run, stride};
  if (scores.sum == nullptr) {
    return in_shared ? launch_any<false, true>(scores, digit_of, sample, counts, stream)
                     : launch_any<false, false>(scores, digit_of, sample, counts, stream);
  }
  return in_shared ? launch_any<true, true>(scores, digit_of, sample, counts, stream)
                   : launch_any<true, false>(scores, digit_of, sample, counts, stream);
}

}  // namespace piece::cuda
