// Sums, scores, histograms and what lies above a bound.
#include <cstring>
#include <memory>
#include <mutex>

#include "ops.h"
#include "parallel.h"

namespace piece::cpu {
namespace {

constexpr int64_t kHistogramRun = 1 << 30;  // elements per 32-bit count

int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

const void* advance(DType dtype, const void* p, int64_t elements) {
  return static_cast<const char*>(p) + elements * element_size(dtype);
}

// What a thread finds in one block.
struct BlockFound {
  std::unique_ptr<float[]> score{new float[kBlock]};
  std::unique_ptr<int32_t[]> position{new int32_t[kBlock]};
  Found found{};

  Found& empty() { return found = Found{score.get(), position.get(), 0}; }
};

Scores block_of(Scores scores, int64_t block) {
  return scores.part(block * kBlock, std::min(kBlock, scores.n - block * kBlock));
}

// filter of all blocks; append(block, found) in ascending order.
template <typename Append>
void filter_blocks(Scores scores, float bound, const Append& append) {
  const Bound prepared = make_bound(bound);
  for_blocks_in_order(
      num_blocks(scores.n), [] { return BlockFound(); },
      [&](int64_t block, BlockFound& local) {
        const Scores part = block_of(scores, block);
        active().filter(part.sum, part.square, part.n, part.lam, prepared, local.empty());
      },
      [&](int64_t block, const BlockFound& local) { append(block, local.found); });
}

void append_candidates(const Found& found, int64_t offset, Candidates out) {
  const int64_t first = *out.num_found;
  const int64_t room = std::max<int64_t>(0, std::min(found.count, out.capacity - first));
  for (int64_t i = 0; i < room; ++i) {
    out.score[first + i] = found.score[i];
    out.index[first + i] = offset + found.position[i];
  }
  *out.num_found = first + found.count;
}

}  // namespace

int64_t accumulate(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale) {
  std::atomic<int64_t> num_nonfinite{0};
  for_blocks(num_blocks(n), [&](int64_t block) {
    const int64_t first = block * kBlock, size = std::min(kBlock, n - first);
    num_nonfinite += active().accumulate[dtype](advance(dtype, grad, first), sum ? sum + first : nullptr,
                                                square + first, size, scale);
  });
  return num_nonfinite;
}

int64_t accumulate_filter(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale, float lam,
                          float bound, int64_t offset, Candidates out) {
  std::atomic<int64_t> num_nonfinite{0};
  const Bound prepared = make_bound(bound);
  for_blocks_in_order(
      num_blocks(n), [] { return BlockFound(); },
      [&](int64_t block, BlockFound& local) {
        const int64_t first = block * kBlock, size = std::min(kBlock, n - first);
        num_nonfinite +=
            active().accumulate_filter[dtype](advance(dtype, grad, first), sum ? sum + first : nullptr, square + first,
                                              size, scale, lam, prepared, local.empty());
      },
      [&](int64_t block, const BlockFound& local) { append_candidates(local.found, offset + block * kBlock, out); });
  return num_nonfinite;
}

void score(Scores scores, float* out) {
  for_blocks(num_blocks(scores.n), [&](int64_t block) {
    const Scores part = block_of(scores, block);
    active().score(part.sum, part.square, out + block * kBlock, part.n, part.lam);
  });
}

void histogram(Scores scores, int shift, int bits, int64_t prefix, int64_t run, int64_t stride, int64_t* counts) {
  const int64_t bins = int64_t{1} << bits, copies = histogram_copies(bits);
  std::mutex merging;
  for (int64_t begin = 0; begin < scores.n; begin += kHistogramRun) {
    const int64_t end = std::min(begin + kHistogramRun, scores.n);
    on_each_thread(num_blocks(end - begin), [&](auto next) {
      std::unique_ptr<uint32_t[]> own(new uint32_t[bins * copies]());
      auto count = [&](int64_t first, int64_t last) {
        const Scores part = scores.part(first, last - first);
        active().histogram(part.sum, part.square, part.n, part.lam, shift, bits, prefix, own.get());
      };
      for (int64_t block = next(); block >= 0; block = next()) {
        const int64_t first = begin + block * kBlock, last = std::min(first + kBlock, end);
        if (run >= stride) count(first, last);
        for (int64_t sample = first / stride * stride; run < stride && sample < last; sample += stride) {
          const int64_t from = std::max(first, sample), to = std::min(last, sample + run);
          if (from < to) count(from, to);
        }
      }
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t i = 0; i < bins * copies; ++i) counts[i & (bins - 1)] += own[i];
    });
  }
}

void filter(Scores scores, float bound, int64_t offset, Candidates out) {
  filter_blocks(scores, bound,
                [&](int64_t block, const Found& found) { append_candidates(found, offset + block * kBlock, out); });
}

std::vector<int64_t> select_above(Scores scores, int64_t key, int64_t num_ties) {
  std::vector<int64_t> selected;
  if (key > 0x7f800000) return selected;  // above the key of infinity there is nothing
  // The order of keys is the order of scores, so the filter finds what has this key or a greater one.
  const float bound = key < 0 ? -INFINITY : float_of(static_cast<uint32_t>(key));
  filter_blocks(scores, bound, [&](int64_t block, const Found& found) {
    for (int64_t i = 0; i < found.count; ++i) {
      const int64_t own = key_of(found.score[i]);
      if (own > key || (own == key && num_ties-- > 0)) selected.push_back(block * kBlock + found.position[i]);
    }
  });
  return selected;
}

}  // namespace piece::cpu
