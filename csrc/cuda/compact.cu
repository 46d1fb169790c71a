// select_above and mask_to_index: positions in ascending order. Count per chunk, prefix over groups of chunks, write.
//
// A chunk is 8192 scores or 4096 bytes of a mask, one block's work. Counting also adds each chunk's counts to its group of
// 256, one atomic a block, so that the prefix is over groups: 477 of them for a billion scores. A block that
// writes adds up the chunks of its group before it. So no block waits for another, and a chunk where nothing was
// counted is not read again: select_above costs one or two reads of the sums.

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

// A chunk's counts in 32 bits, at most 2^15 each; a group's in 64, at most 2^23.
PIECE_HD uint32_t pack(uint32_t above, uint32_t ties) { return above | ties << 16; }
PIECE_HD Count unpack(uint32_t counts) { return Count{counts & 0xffffu, counts >> 16}; }
PIECE_HD uint64_t widen(uint32_t counts) { return (counts & 0xffffu) | static_cast<uint64_t>(counts >> 16) << 32; }
PIECE_HD Count unpack_group(uint64_t counts) {
  return Count{static_cast<int64_t>(counts & 0xffffffffu), static_cast<int64_t>(counts >> 32)};
}

// Scratch, in int64: [0] the total, [1] unused; per group what stands before it (a Count), then its own counts; per chunk
// its counts in 32 bits.
constexpr int kChunksPerGroup = kThreads;
int64_t num_groups_of(int64_t num_chunks) { return num_chunks_of(num_chunks, kChunksPerGroup); }
int64_t scratch_for(int64_t num_chunks) { return 2 + 3 * num_groups_of(num_chunks) + num_chunks / 2 + 1; }

struct Counts {
  int64_t* total;
  Count* before;     // of each group
  uint64_t* groups;  // zeros before chunks are counted
  uint32_t* chunks;
  int64_t num_chunks, num_groups;
};

Counts counts_in(int64_t* scratch, int64_t num_chunks) {
  const int64_t num_groups = num_groups_of(num_chunks);
  int64_t* groups = scratch + 2 + 2 * num_groups;
  return {scratch,
          reinterpret_cast<Count*>(scratch + 2),
          reinterpret_cast<uint64_t*>(groups),
          reinterpret_cast<uint32_t*>(groups + num_groups),
          num_chunks,
          num_groups};
}

// A chunk's counts, from the thread that has them.
__device__ __forceinline__ void store_counts(const Counts& counts, uint32_t own) {
  counts.chunks[blockIdx.x] = own;
  if (own == 0) return;
  add_to(reinterpret_cast<int64_t*>(counts.groups + blockIdx.x / kChunksPerGroup), static_cast<int64_t>(widen(own)));
}

// ---- prefix ----

constexpr int kScanThreads = 512;

// One block. before[g] becomes the sum of the groups before g.
__global__ void __launch_bounds__(kScanThreads) prefix_kernel(Counts counts, int64_t num_ties) {
  using Scan = cub::BlockScan<Count, kScanThreads>;
  __shared__ typename Scan::TempStorage storage;
  Count before{0, 0};
  for (int64_t first = 0; first < counts.num_groups; first += kScanThreads) {
    const int64_t group = first + threadIdx.x;
    Count item[1] = {group < counts.num_groups ? unpack_group(counts.groups[group]) : Count{0, 0}};
    Count sum;
    Scan(storage).ExclusiveScan(item, item, Count{0, 0}, AddCounts{}, sum);
    if (group < counts.num_groups) counts.before[group] = AddCounts{}(before, item[0]);
    before = AddCounts{}(before, sum);
    __syncthreads();  // storage is used again
  }
  if (threadIdx.x == 0) *counts.total = before.above + smaller(before.ties, num_ties);
}

// What stands before this block's chunk; every thread of the block calls it.
__device__ __forceinline__ Count count_before(const Counts& counts) {
  using Reduce = cub::BlockReduce<uint64_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  __shared__ Count result;
  const int64_t chunk = blockIdx.x, group = chunk / kChunksPerGroup;
  const int64_t other = group * kChunksPerGroup + threadIdx.x;
  const uint64_t sum = Reduce(storage).Sum(other < chunk ? widen(counts.chunks[other]) : uint64_t{0});
  if (threadIdx.x == 0) result = AddCounts{}(counts.before[group], unpack_group(sum));
  __syncthreads();
  return result;
}

cudaError_t clear_groups(const Counts& counts, cudaStream_t stream) {
  if (counts.num_groups == 0) return cudaSuccess;
  return cudaMemsetAsync(counts.groups, 0, static_cast<size_t>(counts.num_groups) * sizeof(uint64_t), stream);
}

cudaError_t launch_prefix(const Counts& counts, int64_t num_ties, cudaStream_t stream) {
  prefix_kernel<<<1, kScanThreads, 0, stream>>>(counts, num_ties);
  return cudaGetLastError();
}

// ---- scores ----

// The threshold: a key, and a test without square root and division that tells most scores to be below it.
struct Threshold {
  int32_t key;
  Bound bound;
};

Threshold threshold_of(int32_t key) { return Threshold{key, make_bound(float_of(static_cast<uint32_t>(key)))}; }

// Bit j (above) and bit 16 + j (tie) for the scores i .. i + 3; none beyond n.
template <bool with_sum, bool packed>
__device__ __forceinline__ uint32_t flags_of(const Scores& scores, const Threshold& threshold, int64_t i) {
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
    if (with_sum && !may_reach(threshold.bound, sums.v[j], squares.v[j], scores.lam)) continue;
    const int32_t own = key_of(piece::score<with_sum>(sums.v[j], squares.v[j], scores.lam));
    const uint32_t in_range = i + j < scores.n;
    flags |= (in_range & (own > threshold.key)) << j | (in_range & (own == threshold.key)) << (16 + j);
  }
  return flags;
}

// Numbers of both kinds in one word: above below, ties in the upper half; a chunk has at most 8192 of either.
__device__ __forceinline__ uint32_t both_counts(uint32_t flags) {
  return pack(static_cast<uint32_t>(__popc(flags & 0xffffu)), static_cast<uint32_t>(__popc(flags >> 16)));
}

template <bool with_sum, bool packed>
__global__ void __launch_bounds__(kThreads) select_count_kernel(Scores scores, Threshold threshold, Counts counts) {
  using Reduce = cub::BlockReduce<uint32_t, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScoresPerChunk + threadIdx.x * kScoresPerThread;
  uint32_t count = 0;
#pragma unroll
  for (int tile = 0; tile < kTilesPerChunk; ++tile) {
    count += both_counts(flags_of<with_sum, packed>(scores, threshold, first + tile * kScoresPerTile));
  }
  const uint32_t sum = Reduce(storage).Sum(count);
  if (threadIdx.x == 0) store_counts(counts, sum);
}

template <bool with_sum, bool packed>
__global__ void __launch_bounds__(kThreads)
    select_write_kernel(Scores scores, Threshold threshold, int64_t num_ties, Counts counts, int64_t* __restrict__ out) {
  using Scan = cub::BlockScan<uint32_t, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  // The whole block leaves here or none of it.
  const Count own = unpack(counts.chunks[blockIdx.x]);
  if (own.above == 0 && own.ties == 0) return;
  Count before = count_before(counts);
  if (own.above == 0 && before.ties >= num_ties) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScoresPerChunk + threadIdx.x * kScoresPerThread;
  for (int tile = 0; tile < kTilesPerChunk; ++tile) {
    const int64_t i = first + tile * kScoresPerTile;
    const uint32_t flags = flags_of<with_sum, packed>(scores, threshold, i);
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
    mask_count_kernel(const uint8_t* __restrict__ bits, int64_t num_bytes, Counts counts) {
  using Reduce = cub::BlockReduce<int, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBytesPerChunk + threadIdx.x * kBytesPerThread;
  const auto words = load_bits<packed>(bits, num_bytes, i);
  const int sum = Reduce(storage).Sum(__popcll(words.v[0]) + __popcll(words.v[1]));
  if (threadIdx.x == 0) store_counts(counts, pack(static_cast<uint32_t>(sum), 0));
}

template <bool packed>
__global__ void __launch_bounds__(kThreads)
    mask_write_kernel(const uint8_t* __restrict__ bits, int64_t num_bytes, Counts counts, int64_t* __restrict__ out) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  if (counts.chunks[blockIdx.x] == 0) return;  // the whole block
  const int64_t before = count_before(counts).above;
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
  const Counts counts = counts_in(scratch, num_chunks_of(scores.n, kScoresPerChunk));
  if (const cudaError_t error = check(counts.num_chunks); error != cudaSuccess) return error;
  if (counts.num_chunks > 0) {
    if (const cudaError_t error = clear_groups(counts, stream); error != cudaSuccess) return error;
    with_layout(scores, [&](auto with_sum, auto packed) {
      select_count_kernel<decltype(with_sum)::value, decltype(packed)::value>
          <<<blocks_for(counts.num_chunks), kThreads, 0, stream>>>(scores, threshold_of(key), counts);
    });
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return launch_prefix(counts, num_ties, stream);
}

cudaError_t select_write(const Scores& scores, int32_t key, int64_t num_ties, int64_t* scratch, int64_t* out,
                         cudaStream_t stream) {
  const Counts counts = counts_in(scratch, num_chunks_of(scores.n, kScoresPerChunk));
  if (counts.num_chunks == 0) return cudaSuccess;
  with_layout(scores, [&](auto with_sum, auto packed) {
    select_write_kernel<decltype(with_sum)::value, decltype(packed)::value>
        <<<blocks_for(counts.num_chunks), kThreads, 0, stream>>>(scores, threshold_of(key), num_ties, counts, out);
  });
  return cudaGetLastError();
}

cudaError_t mask_count(const uint8_t* bits, int64_t num_bytes, int64_t* scratch, cudaStream_t stream) {
  const Counts counts = counts_in(scratch, num_chunks_of(num_bytes, kBytesPerChunk));
  if (const cudaError_t error = check(counts.num_chunks); error != cudaSuccess) return error;
  if (counts.num_chunks > 0) {
    if (const cudaError_t error = clear_groups(counts, stream); error != cudaSuccess) return error;
    const auto kernel = is_aligned(bits) ? mask_count_kernel<true> : mask_count_kernel<false>;
    kernel<<<blocks_for(counts.num_chunks), kThreads, 0, stream>>>(bits, num_bytes, counts);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return launch_prefix(counts, 0, stream);
}

cudaError_t mask_write(const uint8_t* bits, int64_t num_bytes, int64_t* scratch, int64_t* out, cudaStream_t stream) {
  const Counts counts = counts_in(scratch, num_chunks_of(num_bytes, kBytesPerChunk));
  if (counts.num_chunks == 0) return cudaSuccess;
  const auto kernel = is_aligned(bits) ? mask_write_kernel<true> : mask_write_kernel<false>;
  kernel<<<blocks_for(counts.num_chunks), kThreads, 0, stream>>>(bits, num_bytes, counts, out);
  return cudaGetLastError();
}

}  // namespace piece::cuda
