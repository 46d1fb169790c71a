// Enough of CUDA to run csrc/cuda on a CPU, one block after another, its threads as fibers of one thread.
//
// A fiber runs until it waits at a barrier, so what a missing __syncthreads would let happen on a GPU happens here in
// its worst order: one thread is through before the next one starts. A barrier that not all threads reach ends the
// process with a message. Groups of threads that atomics are aggregated over have one member; everything else has the
// meaning it has on a device. Says nothing about speed, caches, or the order of memory between blocks.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- the runtime ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulator"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return bytes ? memset(pointer, value, bytes) : nullptr, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, bytes), cudaSuccess;
}
// One multiprocessor, so that grids are small and threads take several turns; shared memory as on sm_90.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 1 : 232448, cudaSuccess;
}

// ---- blocks ----

namespace emulator {

[[noreturn]] inline void fail(const char* message) {
  fprintf(stderr, "cuda_emulator: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  abort();
}

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  dim3 index;
};

constexpr size_t kStackBytes = 128 * 1024;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current;
inline const std::function<void()>* body;
inline std::vector<uint32_t> dynamic_shared;
inline uint32_t exchange[1024];

inline void run_fiber() {
  (*body)();
  fibers[current].state = State::done;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void wait(State at) {
  fibers[current].state = at;
  swapcontext(&fibers[current].context, &scheduler);
}

// Whether all fibers [begin, end) that are not done wait at `at`, and there is one; they then go on.
inline bool release(size_t begin, size_t end, State at) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state != at && fibers[i].state != State::done) return false;
    any |= fibers[i].state == at;
  }
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state == at) fibers[i].state = State::ready;
  }
  return any;
}

inline void run_block(size_t num_threads) {
  for (size_t i = 0; i < num_threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.state = State::ready;
    const unsigned thread = static_cast<unsigned>(i);
    fiber.index = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, 0);
  }
  for (;;) {
    size_t num_done = 0;
    for (current = 0; current < num_threads; ++current) {
      if (fibers[current].state == State::ready) {
        threadIdx = fibers[current].index;
        swapcontext(&scheduler, &fibers[current].context);
      }
      num_done += fibers[current].state == State::done;
    }
    if (num_done == num_threads) return;
    bool released = false;
    for (size_t warp = 0; warp < num_threads; warp += 32) released |= release(warp, warp + 32, State::at_warp_barrier);
    released |= release(0, num_threads, State::at_block_barrier);
    if (!released) fail("threads wait at different barriers");
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const std::function<void()>& kernel) {
  const size_t num_threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.x > INT32_MAX) fail("a grid must have 1 to 2^31 - 1 blocks");
  if (num_threads == 0 || num_threads > 1024 || num_threads % 32) fail("a block must have 32 to 1024 threads");
  if (fibers.size() < num_threads) fibers.resize(num_threads);
  body = &kernel;
  blockDim = block;
  gridDim = grid;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = dim3(i, 0, 0);
    dynamic_shared.assign(shared_bytes / 4, 0xdeadbeefu);
    run_block(num_threads);
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::at_block_barrier); }

// ---- warps and atomics ----

template <typename T, typename Use>
auto emulate_exchange(unsigned mask, T value, Use use) {
  static_assert(sizeof(T) == 4, "slots have 32 bits");
  const size_t warp = emulator::current / 32 * 32;
  for (size_t i = warp; i < warp + 32; ++i) {
    if (mask != 0xffffffffu || emulator::fibers[i].state == emulator::State::done) {
      emulator::fail("a warp exchanges values without all of its threads");
    }
  }
  memcpy(&emulator::exchange[emulator::current], &value, 4);
  emulator::wait(emulator::State::at_warp_barrier);
  const auto result = use(reinterpret_cast<const T*>(emulator::exchange + warp), emulator::current % 32);
  emulator::wait(emulator::State::at_warp_barrier);
  return result;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulate_exchange(mask, value, [](const unsigned* slot, size_t) {
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i) sum += slot[i];
    return sum;
  });
}

inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  return emulate_exchange(mask, value, [=](const float* slot, size_t lane) { return slot[lane ^ distance]; });
}

template <typename T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place = before + value;
  return before;
}

template <typename T>
T atomicOr(T* place, T value) {
  const T before = *place;
  *place = before | value;
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

namespace cooperative_groups {

struct coalesced_group {
  unsigned thread_rank() const { return 0; }
  unsigned size() const { return 1; }
  template <typename T>
  T shfl(T value, unsigned) const {
    return value;
  }
};

inline coalesced_group coalesced_threads() { return {}; }

}  // namespace cooperative_groups

// ---- CUB: like the original, storage may be used again only after a barrier of the caller's ----

namespace cub {

template <typename T, int threads>
struct BlockReduce {
  struct TempStorage {
    T slot[threads];
  };
  TempStorage& storage;
  explicit BlockReduce(TempStorage& storage) : storage(storage) {}

  T Sum(T value) {  // thread 0 alone gets it
    storage.slot[emulator::current] = value;
    __syncthreads();
    T sum{};
    if (emulator::current == 0) {
      for (const T& each : storage.slot) sum = sum + each;
    }
    return sum;
  }
};

template <typename T, int threads>
struct BlockScan {
  struct TempStorage {
    T slot[threads];
  };
  TempStorage& storage;
  explicit BlockScan(TempStorage& storage) : storage(storage) {}

  template <typename Add>
  T before_and_all(T value, T initial, Add add, T& all) {
    storage.slot[emulator::current] = value;
    __syncthreads();
    T before = initial, sum = storage.slot[0];
    for (size_t i = 0; i < threads; ++i) {
      if (i < emulator::current) before = add(before, storage.slot[i]);
      if (i > 0) sum = add(sum, storage.slot[i]);
    }
    all = sum;
    return before;
  }

  void ExclusiveSum(T value, T& before, T& all) {
    before = before_and_all(value, T{}, [](T a, T b) { return a + b; }, all);
  }
  void ExclusiveSum(T value, T& before) {
    T all;
    ExclusiveSum(value, before, all);
  }

  template <int items, typename Add>
  void ExclusiveScan(T (&input)[items], T (&output)[items], T initial, Add add, T& all) {
    T own = input[0];
    for (int i = 1; i < items; ++i) own = add(own, input[i]);
    T before = before_and_all(own, initial, add, all);
    for (int i = 0; i < items; ++i) {
      const T value = input[i];
      output[i] = before;
      before = add(before, value);
    }
  }
};

}  // namespace cub
