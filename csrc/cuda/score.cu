// score and filter_: one read of the sums.

#include "launch.h"

namespace piece::cuda {
namespace {

constexpr int kVector = 4;

// use(i, sum, square) for every element.
template <bool with_sum, int width, typename Use>
__device__ __forceinline__ void for_each_pair(const Scores& scores, const Range& range, Use use) {
  for_each_pack<width>(range, [&](auto packed, int64_t i) {
    constexpr int w = decltype(packed)::value;
    const auto squares = load<w>(scores.square + i);
    Pack<float, w> sums{};
    if constexpr (with_sum) sums = load<w>(scores.sum + i);
    use(packed, i, sums, squares);
  });
}

template <bool with_sum, int width>
__global__ void __launch_bounds__(kThreads) score_kernel(Scores scores, Range range, float* __restrict__ out) {
  for_each_pair<with_sum, width>(scores, range, [&](auto packed, int64_t i, const auto& sums, const auto& squares) {
    constexpr int w = decltype(packed)::value;
    Pack<float, w> result;
#pragma unroll
    for (int j = 0; j < w; ++j) result.v[j] = piece::score<with_sum>(sums.v[j], squares.v[j], scores.lam);
    store<w>(out + i, result);
  });
}

template <bool with_sum, int width>
__global__ void __launch_bounds__(kThreads)
    filter_kernel(Scores scores, Range range, Bound bound, int64_t offset, Candidates found) {
  for_each_pair<with_sum, width>(scores, range, [&](auto packed, int64_t i, const auto& sums, const auto& squares) {
#pragma unroll
    for (int j = 0; j < decltype(packed)::value; ++j) {
      append_if_reached<with_sum>(found, bound, sums.v[j], squares.v[j], scores.lam, offset + i + j);
    }
  });
}

}  // namespace

cudaError_t score(const Scores& scores, float* out, cudaStream_t stream) {
  if (scores.n == 0) return cudaSuccess;
  with_alignment<kVector>(
      scores.n,
      [&](auto packed, const Range& range) {
        constexpr int width = decltype(packed)::value;
        const auto blocks = static_cast<unsigned>(grid_for(scores.n, kThreads * width));
        if (scores.sum == nullptr) {
          score_kernel<false, width><<<blocks, kThreads, 0, stream>>>(scores, range, out);
        } else {
          score_kernel<true, width><<<blocks, kThreads, 0, stream>>>(scores, range, out);
        }
      },
      scores.sum, scores.square, out);
  return cudaGetLastError();
}

cudaError_t filter(const Scores& scores, const Bound& bound, int64_t offset, const Candidates& found,
                   cudaStream_t stream) {
  if (scores.n == 0) return cudaSuccess;
  with_alignment<kVector>(
      scores.n,
      [&](auto packed, const Range& range) {
        constexpr int width = decltype(packed)::value;
        const auto blocks = static_cast<unsigned>(grid_for(scores.n, kThreads * width));
        if (scores.sum == nullptr) {
          filter_kernel<false, width><<<blocks, kThreads, 0, stream>>>(scores, range, bound, offset, found);
        } else {
          filter_kernel<true, width><<<blocks, kThreads, 0, stream>>>(scores, range, bound, offset, found);
        }
      },
      scores.sum, scores.square);
  return cudaGetLastError();
}

}  // namespace piece::cuda
