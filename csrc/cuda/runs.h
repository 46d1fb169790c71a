// Where position i of a list of tensors lies: one run of memory, or many, found in a table.
//
// Positions count through the tensors of a list as if they lay one after the other; those that do are one run, so that the
// tensors of a flat buffer are as good as one. A table goes along with the launch, in its arguments, and from there to each
// block's shared memory; a list of more runs takes more launches, and each works on the positions that its runs have.
#pragma once

#include "launch.h"

namespace piece::cuda {

constexpr int kMaxRuns = 160;  // 2.6 KB of a launch's 4 KB of arguments

// One run. at(i) is the place of position i; one outside of the tensor stops the kernel before anything is written.
template <typename T>
struct One {
  T* data;
  int64_t n;

  __device__ __forceinline__ One open() const { return *this; }

  __device__ __forceinline__ T* at(int64_t i) const {
    assert(i >= 0 && i < n && "piece_ds: a position in index lies outside of its tensor");
    return data + i;
  }
};

// Some of the runs of a list, in a block's shared memory. at(i) is null where another launch's runs have position i.
template <typename T>
struct Opened {
  T* const* data;
  const int64_t* begin;
  int count;
  int64_t total;

  __device__ __forceinline__ T* at(int64_t i) const {
    assert(i >= 0 && i < total && "piece_ds: a position in index lies outside of its tensor");
    if (i < begin[0] || i >= begin[count]) return nullptr;
    int low = 0, high = count;  // begin[low] <= i < begin[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (begin[middle] <= i ? low : high) = middle;
    }
    return data[low] + (i - begin[low]);
  }
};

template <typename T>
struct Many {
  T* data[kMaxRuns];
  int64_t begin[kMaxRuns + 1];
  int count;
  int64_t total;  // of all launches

  // Every thread of the block calls it.
  __device__ __forceinline__ Opened<T> open() const {
    __shared__ T* shared_data[kMaxRuns];
    __shared__ int64_t shared_begin[kMaxRuns + 1];
    for (int r = threadIdx.x; r <= count; r += blockDim.x) {
      if (r < count) shared_data[r] = data[r];
      shared_begin[r] = begin[r];
    }
    __syncthreads();
    return Opened<T>{shared_data, shared_begin, count, total};
  }
};

inline int64_t num_launches_of(const Runs& runs) {
  return runs.count <= 1 ? 1 : runs.count / kMaxRuns + (runs.count % kMaxRuns != 0);
}

// run(number of the launch, One or Many) for all runs; ends with the first error.
template <typename T, typename Launch>
cudaError_t for_each_launch(const Runs& runs, Launch run) {
  if (runs.count <= 1) return run(int64_t{0}, One<T>{runs.count ? static_cast<T*>(runs.run[0].data) : nullptr, runs.total});
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < runs.count && error == cudaSuccess; first += kMaxRuns) {
    Many<T> some;
    some.count = static_cast<int>(runs.count - first < kMaxRuns ? runs.count - first : kMaxRuns);
    some.total = runs.total;
    for (int r = 0; r < some.count; ++r) {
      some.data[r] = static_cast<T*>(runs.run[first + r].data);
      some.begin[r] = runs.run[first + r].begin;
    }
    const Run& last = runs.run[first + some.count - 1];
    some.begin[some.count] = last.begin + last.n;
    error = run(first / kMaxRuns, some);
  }
  return error;
}

}  // namespace piece::cuda
