// How every kernel walks its elements: packs of 16 bytes, a grid that covers the machine, 64-bit positions.
#pragma once

#undef NDEBUG  // a position outside of its tensor must stop the kernel in every build
#include <cassert>

#include <cooperative_groups.h>

#include "kernels.h"

namespace piece::cuda {

constexpr int kThreads = 256;
// Blocks a multiprocessor gets. It holds 5 to 8 at once, as registers allow; with some waves of them the hardware
// deals out evenly what is left.
constexpr int kBlocksPerSM = 32;

// ceil(count / per_block) blocks, at most blocks_per_sm on every multiprocessor.
inline int64_t grid_for(int64_t count, int64_t per_block, int blocks_per_sm = kBlocksPerSM) {
  int device = 0, num_sms = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  const int64_t needed = count / per_block + (count % per_block != 0);
  const int64_t most = static_cast<int64_t>(num_sms) * blocks_per_sm;
  return needed < 1 ? 1 : needed < most ? needed : most;
}

// ---- packs ----

template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T v[width];
};

template <int width, typename T>
__device__ __forceinline__ Pack<T, width> load(const T* pointer) {
  return *reinterpret_cast<const Pack<T, width>*>(pointer);
}

template <int width, typename T>
__device__ __forceinline__ void store(T* pointer, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(pointer) = pack;
}

template <typename T>
bool is_aligned(const T* pointer) {  // a null pointer is
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Elements before the first position at which every pointer is on a multiple of 16 bytes, -1 where there is none.
template <typename... T>
int64_t head_of(const T*... pointers) {
  for (int64_t head = 0; head < 16; ++head) {
    if (((pointers == nullptr || is_aligned(pointers + head)) && ...)) return head;
  }
  return -1;
}

template <int width>
struct Width {
  static constexpr int value = width;
};

// Elements [0, n): packs of `width` from position head on, and what stands before and after them one by one.
struct Range {
  int64_t n, head;
};

// body(Width<w>, i) for the elements i .. i + w - 1, every element once over the whole grid.
template <int width, typename Body>
__device__ __forceinline__ void for_each_pack(const Range& range, Body body) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t num_packs = (range.n - range.head) / width;
  for (int64_t pack = thread; pack < num_packs; pack += num_threads) body(Width<width>{}, range.head + pack * width);
  if constexpr (width > 1) {
    const int64_t num_tail = range.n - range.head - num_packs * width;
    for (int64_t i = thread; i < range.head + num_tail; i += num_threads) {
      body(Width<1>{}, i < range.head ? i : i + num_packs * width);
    }
  }
}

// body(i, i + 32 * width) for two packs of `width` elements a thread, side by side over its warp: with 16 bytes a pack each
// access of the warp is one run of 512 bytes, and twice as many are on their way. What is left goes to for_each_pack.
template <int width, typename Two, typename One>
__device__ __forceinline__ void for_each_tile(const Range& range, Two two, One one) {
  constexpr int64_t kTileElements = 64 * width;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
  const int64_t num_tiles = (range.n - range.head) / kTileElements;
  for (int64_t tile = warp; tile < num_tiles; tile += num_warps) {
    const int64_t i = range.head + tile * kTileElements + threadIdx.x % 32 * width;
    two(i, i + 32 * width);
  }
  const int64_t rest = range.head + num_tiles * kTileElements;  // fewer than a tile, and the head
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = thread; i < range.head + (range.n - rest); i += num_threads) one(i < range.head ? i : i - range.head + rest);
}

// Calls run(Width<w>, range): w = width where the pointers can be aligned together, 1 where they cannot.
template <int width, typename Run, typename... T>
void with_alignment(int64_t n, Run run, const T*... pointers) {
  const int64_t head = head_of(pointers...);
  if (head < 0 || n < head + width) {
    run(Width<1>{}, Range{n, 0});
  } else {
    run(Width<width>{}, Range{n, head});
  }
}

// Calls run(T{}) with the storage type of dtype.
template <typename Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::float32: return run(float{});
    case DType::bfloat16: return run(bf16{});
    case DType::float16: return run(fp16{});
  }
}

// ---- counters ----

__device__ __forceinline__ void add_to(int64_t* counter, int64_t value) {
  static_assert(sizeof(unsigned long long) == sizeof(int64_t), "atomicAdd knows this type only");
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
}

// *counter += the sum of value over the warp. Every thread of the warp calls it.
__device__ __forceinline__ void add_warp_to(int64_t* counter, uint32_t value) {
  const uint32_t sum = __reduce_add_sync(0xffffffffu, value);
  if (sum != 0 && threadIdx.x % 32 == 0) add_to(counter, sum);
}

// Append one candidate: one atomic for all threads that arrive together. Candidates without room are counted only.
__device__ __forceinline__ void append(const Candidates& found, float score, int64_t index) {
  const auto group = cooperative_groups::coalesced_threads();
  unsigned long long first = 0;
  if (group.thread_rank() == 0) {
    first = atomicAdd(reinterpret_cast<unsigned long long*>(found.num_found),
                      static_cast<unsigned long long>(group.size()));
  }
  const int64_t place = static_cast<int64_t>(group.shfl(first, 0)) + group.thread_rank();
  if (place < found.capacity) {
    found.score[place] = score;
    found.index[place] = index;
  }
}

// The score where it reaches the bound: most elements are told by one product, without square root and division.
template <bool with_sum>
__device__ __forceinline__ void append_if_reached(const Candidates& found, const Bound& bound, float sum, float square,
                                                  float lam, int64_t index) {
  if (with_sum && !may_reach(bound, sum, square, lam)) return;
  const float value = piece::score<with_sum>(sum, square, lam);
  if (value >= bound.bound) append(found, value, index);
}

}  // namespace piece::cuda
