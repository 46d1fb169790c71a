// select_above and mask_to_index: positions in ascending order. Count per chunk, prefix over the chunks, write.
//
// The prefix is one small block's work (a chunk is 8192 scores or 4096 bytes of a mask), so no block ever waits for
// another. A chunk where nothing was counted is not read again: select_above costs one or two reads of the sums.

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <type_traits>

#include "launch.h"

namespace piece::cuda {
namespace {

constexpr int kScoresPerThread = 4;
constexpr int kScoresPerTile = kThreads * kScoresPerThread;
constexpr int kTilesPerChunk = 8;
constexpr int kScoresPerChunk = kTilesPerChunk * kScoresPerTile;
constexpr int kBytesPerThread = 16;
constexpr int kBytesPerChunk = kThreads * kBytesPerThread;

// What stands before a chunk: positions to write in any case (above) and those of which only the first few count.
struct Count {
  int64_t above, ties;
};

struct AddCounts {
  __device__ __forceinline__ Count operator()(const Count& a, const Count& b) const {
    return Count{a.above + b.above, a.ties + b.ties};
  }
};

PIECE_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t num_chunks_of(int64_t n, int64_t per_chunk) { return n / per_chunk + (n % per_chunk != 0); }

// Scratch: [0] the total, [1] unused, then num_chunks + 1 Counts: those of each chunk, replaced by their prefix.
int64_t scratch_for(int64_t num_chunks) { return 2 + 2 * (num_chunks + 1); }
Count* counts_in(int64_t* scratch) { return reinterpret_cast<Count*>(scratch + 2); }
const Count* counts_in(const int64_t* scratch) { return reinterpret_cast<const Count*>(scratch + 2); }

// ---- prefix ----

constexpr int kScanThreads = 512;
constexpr int kScanItems = 8;

// One block. counts[c] becomes the sum of the chunks before c, counts[num_chunks] that of all.
__global__ void __launch_bounds__(kScanThreads) prefix_kernel(Count* counts, int64_t num_chunks, int64_t num_ties,
                                                              int64_t* total) {
  using Scan = cub::BlockScan<Count, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  Count before{0, 0};
  for (int64_t first = 0; first < num_chunks; first += kScanThreads * kScanItems) {
    Count item[kScanItems];
    const int64_t begin = first + static_cast<int64_t>(threadIdx.x) * kScanItems;
#pragma unroll
    for (int j = 0; j < kScanItems; ++j) item[j] = begin + j < num_chunks ? counts[begin + j] : Count{0, 0};
    Count sum;
    Scan(storage).ExclusiveScan(item, item, Count{0, 0}, AddCounts{}, sum);
#pragma unroll
    for (int j = 0; j < kScanItems; ++j) {
      if (begin + j < num_chunks) counts[begin + j] = AddCounts{}(before, item[j]);
    }
    before = AddCounts{}(before, sum);
    __syncthreads();  // storage is used again
  }
  if (threadIdx.x == 0) {
    counts[num_chunks] = before;
    *total = before.above + smaller(before.ties, num_ties);
  }
}

cudaError_t launch_prefix(int64_t* scratch, int64_t num_chunks, int64_t num_ties, cudaStream_t stream) {
  prefix_kernel<<<1, kScanThreads, 0, stream>>>(counts_in(scratch), num_chunks, num_ties, scratch);
  return cudaGetLastError();
}

// ---- scores ----

// Bit j (above) and bit 16 + j (tie) for the scores i .. i + 3; none beyond n.
template <bool with_sum, bool packed>
__device__ __forceinline__ uint32_t flags_of(const Scores& scores, int32_t key, int64_t i) {
  Pack<float, kScoresPerThread> sums{}, squares{};
  const bool whole = i + kScoresPerThread <= scores.n;
  if (packed && whole) {
    squares = load<kScoresPerThread>(scores.square + i);
    if constexpr (with_sum) sums = load<kScoresPerThread>(scores.sum + i);
  } else {
#pragma unroll
    for (int j = 0; j < kScoresPerThread; ++j) {
      if (i + j >= scores.n) continue;
      squares.v[j] = scores.square[i + j];
      if constexpr (with_sum) sums.v[j] = scores.sum[i + j];
    }
  }
  uint32_t flags = 0;
#pragma unroll
  for (int j = 0; j < kScoresPerThread; ++j) {
    const int32_t own = key_of(piece::score<with_sum>(sums.v[j], squares.v[j], scores.lam));
    const uint32_t in_range = i + j < scores.n;
    flags |= (in_range & (own > key)) << j | (in_range & (own == key)) << (16 + j);
  }
  return flags;
}

// Numbers of both kinds in one word: above below, ties in the upper half; a chunk has at most 8192 of either.
__device__ __forceinline__ uint32_t both_counts(uint32_t flags) {
  return static_cast<uint32_t>(__popc(flags & 0xffffu)) | static_cast<uint32_t>(__popc(flags >> 16)) << 16;
}

template <bool with_sum, bool packed>
__global__ void __launch_bounds__(kThreads) select_count_kernel(Scores scores, int32_t key, Count* counts) {
  using Reduce = cub::BlockReduce<uint32_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScoresPerChunk + threadIdx.x * kScoresPerThread;
  uint32_t count = 0;
#pragma unroll
  for (int tile = 0; tile < kTilesPerChunk; ++tile) {
    count += both_counts(flags_of<with_sum, packed>(scores, key, first + tile * kScoresPerTile));
  }
  const uint32_t sum = Reduce(storage).Sum(count);
  if (threadIdx.x == 0) counts[blockIdx.x] = Count{sum & 0xffffu, sum >> 16};
}

template <bool with_sum, bool packed>
__global__ void __launch_bounds__(kThreads)
    select_write_kernel(Scores scores, int32_t key, int64_t num_ties, const Count* counts, int64_t* __restrict__ out) {
  using Scan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  Count before = counts[blockIdx.x];
  const Count after = counts[blockIdx.x + 1];
  // The whole block leaves here or none of it.
  if (before.above + smaller(before.ties, num_ties) == after.above + smaller(after.ties, num_ties)) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScoresPerChunk + threadIdx.x * kScoresPerThread;
  for (int tile = 0; tile < kTilesPerChunk; ++tile) {
    const int64_t i = first + tile * kScoresPerTile;
    const uint32_t flags = flags_of<with_sum, packed>(scores, key, i);
    uint32_t rank, sum;
    Scan(storage).ExclusiveSum(both_counts(flags), rank, sum);
    __syncthreads();  // storage is used again
    int64_t above = before.above + (rank & 0xffffu), ties = before.ties + (rank >> 16);
#pragma unroll
    for (int j = 0; j < kScoresPerThread; ++j) {
      const bool is_above = flags >> j & 1u, is_tie = flags >> (16 + j) & 1u;
      // Positions written before this one: all above, and of the ties as many as were wanted.
      if (is_above || (is_tie && ties < num_ties)) out[above + smaller(ties, num_ties)] = i + j;
      above += is_above;
      ties += is_tie;
    }
    before = Count{before.above + (sum & 0xffffu), before.ties + (sum >> 16)};
  }
}

// run(with_sum, packed) as compile-time values.
template <typename Run>
void with_layout(const Scores& scores, Run run) {
  const bool packed = is_aligned(scores.sum) && is_aligned(scores.square);
  if (scores.sum == nullptr) {
    packed ? run(std::false_type{}, std::true_type{}) : run(std::false_type{}, std::false_type{});
  } else {
    packed ? run(std::true_type{}, std::true_type{}) : run(std::true_type{}, std::false_type{});
  }
}

// ---- masks ----

// 16 bytes of the mask from byte i on, as two words; zeros beyond its end.
template <bool packed>
__device__ __forceinline__ Pack<uint64_t, 2> load_bits(const uint8_t* bits, int64_t num_bytes, int64_t i) {
  Pack<uint64_t, 2> words{};
  if (packed && i + kBytesPerThread <= num_bytes) return load<2>(reinterpret_cast<const uint64_t*>(bits + i));
#pragma unroll
  for (int j = 0; j < kBytesPerThread; ++j) {
    if (i + j < num_bytes) words.v[j / 8] |= static_cast<uint64_t>(bits[i + j]) << (j % 8 * 8);
  }
  return words;
}

template <bool packed>
__global__ void __launch_bounds__(kThreads)
    mask_count_kernel(const uint8_t* __restrict__ bits, int64_t num_bytes, Count* counts) {
  using Reduce = cub::BlockReduce<int, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBytesPerChunk + threadIdx.x * kBytesPerThread;
  const auto words = load_bits<packed>(bits, num_bytes, i);
  const int sum = Reduce(storage).Sum(__popcll(words.v[0]) + __popcll(words.v[1]));
  if (threadIdx.x == 0) counts[blockIdx.x] = Count{sum, 0};
}

template <bool packed>
__global__ void __launch_bounds__(kThreads)
    mask_write_kernel(const uint8_t* __restrict__ bits, int64_t num_bytes, const Count* counts,
                      int64_t* __restrict__ out) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  const int64_t before = counts[blockIdx.x].above;
  if (before == counts[blockIdx.x + 1].above) return;  // the whole block
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBytesPerChunk + threadIdx.x * kBytesPerThread;
  const auto words = load_bits<packed>(bits, num_bytes, i);
  int rank;
  Scan(storage).ExclusiveSum(__popcll(words.v[0]) + __popcll(words.v[1]), rank);
  int64_t* place = out + before + rank;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (uint64_t word = words.v[half]; word != 0; word &= word - 1) {
      *place++ = (i + half * 8) * 8 + (__ffsll(static_cast<long long>(word)) - 1);
    }
  }
}

unsigned blocks_for(int64_t num_chunks) { return static_cast<unsigned>(num_chunks); }

// One block a chunk: 2^31 - 1 blocks, the most a grid can have, are 2^44 scores.
cudaError_t check(int64_t num_chunks) { return num_chunks > INT32_MAX ? cudaErrorInvalidValue : cudaSuccess; }

}  // namespace

int64_t select_scratch(int64_t n) { return scratch_for(num_chunks_of(n, kScoresPerChunk)); }
int64_t mask_scratch(int64_t num_bytes) { return scratch_for(num_chunks_of(num_bytes, kBytesPerChunk)); }

cudaError_t select_count(const Scores& scores, int32_t key, int64_t num_ties, int64_t* scratch, cudaStream_t stream) {
  const int64_t num_chunks = num_chunks_of(scores.n, kScoresPerChunk);
  if (const cudaError_t error = check(num_chunks); error != cudaSuccess) return error;
  if (num_chunks > 0) {
    with_layout(scores, [&](auto with_sum, auto packed) {
      select_count_kernel<decltype(with_sum)::value, decltype(packed)::value>
          <<<blocks_for(num_chunks), kThreads, 0, stream>>>(scores, key, counts_in(scratch));
    });
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return launch_prefix(scratch, num_chunks, num_ties, stream);
}

cudaError_t select_write(const Scores& scores, int32_t key, int64_t num_ties, const int64_t* scratch, int64_t* out,
                         cudaStream_t stream) {
  const int64_t num_chunks = num_chunks_of(scores.n, kScoresPerChunk);
  if (num_chunks == 0) return cudaSuccess;
  with_layout(scores, [&](auto with_sum, auto packed) {
    select_write_kernel<decltype(with_sum)::value, decltype(packed)::value>
        <<<blocks_for(num_chunks), kThreads, 0, stream>>>(scores, key, num_ties, counts_in(scratch), out);
  });
  return cudaGetLastError();
}

cudaError_t mask_count(const uint8_t* bits, int64_t num_bytes, int64_t* scratch, cudaStream_t stream) {
  const int64_t num_chunks = num_chunks_of(num_bytes, kBytesPerChunk);
  if (const cudaError_t error = check(num_chunks); error != cudaSuccess) return error;
  if (num_chunks > 0) {
    const auto kernel = is_aligned(bits) ? mask_count_kernel<true> : mask_count_kernel<false>;
    kernel<<<blocks_for(num_chunks), kThreads, 0, stream>>>(bits, num_bytes, counts_in(scratch));
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return launch_prefix(scratch, num_chunks, 0, stream);
}

cudaError_t mask_write(const uint8_t* bits, int64_t num_bytes, const int64_t* scratch, int64_t* out,
                       cudaStream_t stream) {
  const int64_t num_chunks = num_chunks_of(num_bytes, kBytesPerChunk);
  if (num_chunks == 0) return cudaSuccess;
  const auto kernel = is_aligned(bits) ? mask_write_kernel<true> : mask_write_kernel<false>;
  kernel<<<blocks_for(num_chunks), kThreads, 0, stream>>>(bits, num_bytes, counts_in(scratch), out);
  return cudaGetLastError();
}

}  // namespace piece::cuda
