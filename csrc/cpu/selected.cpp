// Work on the selected elements alone.
#include <cstring>
#include <numeric>

#include "ops.h"
#include "parallel.h"

namespace piece::cpu {
namespace {

// Positions this far ahead are fetched: a selected element is a cache line of its own, hundreds of cycles away. Cold
// lines 1000 elements apart (AMD Zen 5, one thread): 6.3 ns each without, 5.0 with 24, 2.9 with 128, 2.7 with 256.
constexpr int64_t kAhead = 128;

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

// One block of the gradient: what is kept is taken out, the block is zeroed, and what was kept is put back while the
// block is in the cache. Stores past the cache (100 MB, one thread of an AMD Zen 5) took 2.1 ms for zeros alone instead
// of 3.1, but then 160 ns for every line between them that had been read: 10 ms instead of 3.4 at 0.1 %.
template <typename T>
Norm apply_block(T* grad, int64_t begin, int64_t end, const int64_t* first, const int64_t* last, const int64_t* stop,
                 float scale, std::vector<T>& kept) {
  Norm norm;
  kept.clear();
  for (const int64_t* i = first; i < last; ++i) {
    if (i + kAhead < stop) __builtin_prefetch(grad + i[kAhead]);
    kept.push_back(scaled(grad[*i], scale, norm));
  }
  std::memset(static_cast<void*>(grad + begin), 0, (end - begin) * sizeof(T));
  for (const int64_t* i = first; i < last; ++i) grad[*i] = kept[i - first];
  return norm;
}

template <typename T>
void apply_mask_typed(T* grad, int64_t n, const int64_t* index, int64_t n_index, float scale, double* square_norm,
                      int64_t* num_nonfinite) {
  const int64_t blocks = num_blocks(n);
  std::vector<Norm> norms(blocks);  // added in their order: the same norm for any number of threads
  on_each_thread(blocks, [&](auto next) {
    std::vector<T> kept;
    for (int64_t block = next(); block >= 0; block = next()) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, n);
      const int64_t* stop = index + n_index;
      const int64_t* first = std::lower_bound(index, stop, begin);
      const int64_t* last = std::lower_bound(first, stop, end);
      norms[block] = apply_block(grad, begin, end, first, last, stop, scale, kept);
    }
  });
  Norm total;
  for (const Norm& norm : norms) {
    total.square += norm.square;
    total.num_nonfinite += norm.num_nonfinite;
  }
  *square_norm += total.square;
  *num_nonfinite += total.num_nonfinite;
}

// Selected elements to a thread at a time: 4 rows of fp32 and the positions are 96 KiB. A step of AdamW computes as many
// before it writes their weights: 35 000 changes in 1 GB of weights, 500 000 of them selected, took 1.2 ms so, 1.3 by
// 256, 2.1 by 64 (AMD Zen 5, two threads).
constexpr int64_t kSelectedBlock = 1 << 12;

int64_t size_of_block(int64_t block, int64_t n) { return std::min(kSelectedBlock, n - block * kSelectedBlock); }

// on_each_thread_if every position is inside [0, limit).
template <typename Work>
bool on_checked(const int64_t* index, int64_t n, int64_t limit, const Work& work) {
  const auto inside = [&](int64_t block) {
    return active().check_index(index + block * kSelectedBlock, size_of_block(block, n), limit).in_range;
  };
  return on_each_thread_if(num_blocks(n, kSelectedBlock), inside, work);
}

template <typename T>
bool gather_add_typed(const T* grad, int64_t limit, const int64_t* index, int64_t n, float scale, float* total) {
  return on_checked(index, n, limit, [&](auto next) {
    for (int64_t block = next(); block >= 0; block = next()) {
      const int64_t first = block * kSelectedBlock, last = first + size_of_block(block, n);
      for (int64_t i = first; i < last; ++i) {
        if (i + kAhead < n) __builtin_prefetch(grad + index[i + kAhead]);
        total[i] = add(total[i], mul(to_float(grad[index[i]]), scale));
      }
    }
  });
}

template <typename T>
bool sparse_adamw_typed(DType dtype, const AdamW& step, const float* grad, float* value, float* exp_avg,
                        float* exp_avg_sq, T* weight, int64_t limit, const int64_t* index, int64_t n,
                        bool weight_holds_value) {
  const Kernels& kernels = active();
  return on_checked(index, n, limit, [&](auto next) {
    T before[kSelectedBlock], after[kSelectedBlock];
    int32_t element[kSelectedBlock];  // those to write
    std::iota(element, element + kSelectedBlock, 0);
    for (int64_t block = next(); block >= 0; block = next()) {
      const int64_t first = block * kSelectedBlock, size = size_of_block(block, n);
      if (weight_holds_value) kernels.round[dtype](value + first, before, size);
      kernels.adamw(step, grad + first, value + first, exp_avg + first, exp_avg_sq + first, size);
      kernels.round[dtype](value + first, after, size);
      const int64_t count = weight_holds_value ? kernels.changed[dtype](before, after, size, element) : size;
      // No prefetch: most of these lines are in pages that the TLB has lost. A prefetch waits for the walk, and all
      // after it wait too (1.6 ms for the 1.2 above); a store does not.
      for (int64_t i = 0; i < count; ++i) weight[index[first + element[i]]] = after[element[i]];
    }
  });
}

template <typename T>
void scatter_typed(T* weight, const int64_t* index, int64_t n, const T* values) {
  for_blocks(num_blocks(n, kSelectedBlock), [&](int64_t block) {
    const int64_t first = block * kSelectedBlock, last = first + size_of_block(block, n);
    for (int64_t i = first; i < last; ++i) weight[index[i]] = values[i];
  });
}

}  // namespace

void scatter(int64_t size, void* weight, const int64_t* index, int64_t n, const void* values) {
  if (size == 4) {
    scatter_typed(static_cast<uint32_t*>(weight), index, n, static_cast<const uint32_t*>(values));
  } else {
    scatter_typed(static_cast<uint16_t*>(weight), index, n, static_cast<const uint16_t*>(values));
  }
}

void apply_mask(DType dtype, void* grad, int64_t n, const int64_t* index, int64_t n_index, bool ascending,
                double scale, double* square_norm, int64_t* num_nonfinite) {
  std::vector<int64_t> sorted;
  if (!ascending) {
    sorted.assign(index, index + n_index);
    std::sort(sorted.begin(), sorted.end());
    index = sorted.data();
  }
  const float factor = static_cast<float>(scale);
  auto run = [&](auto* typed) { apply_mask_typed(typed, n, index, n_index, factor, square_norm, num_nonfinite); };
  if (dtype == kFloat32) run(static_cast<float*>(grad));
  if (dtype == kBFloat16) run(static_cast<bf16*>(grad));
  if (dtype == kFloat16) run(static_cast<fp16*>(grad));
}

bool gather_add(DType dtype, const void* grad, int64_t limit, const int64_t* index, int64_t n, float scale,
                float* total) {
  auto run = [&](auto* typed) { return gather_add_typed(typed, limit, index, n, scale, total); };
  if (dtype == kFloat32) return run(static_cast<const float*>(grad));
  if (dtype == kBFloat16) return run(static_cast<const bf16*>(grad));
  return run(static_cast<const fp16*>(grad));
}

bool sparse_adamw(DType dtype, const AdamW& step, const float* grad, float* value, float* exp_avg, float* exp_avg_sq,
                  void* weight, int64_t limit, const int64_t* index, int64_t n, bool weight_holds_value) {
  auto run = [&](auto* typed) {
    return sparse_adamw_typed(dtype, step, grad, value, exp_avg, exp_avg_sq, typed, limit, index, n,
                              weight_holds_value);
  };
  if (dtype == kFloat32) return run(static_cast<float*>(weight));
  if (dtype == kBFloat16) return run(static_cast<bf16*>(weight));
  return run(static_cast<fp16*>(weight));
}

}  // namespace piece::cpu
