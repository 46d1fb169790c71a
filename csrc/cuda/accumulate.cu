// accumulate_ and accumulate_filter_: one read of the gradient, one read and write of each sum.
//
// Bytes per element: the gradient's + 16 (8 without grad_sum); filtering in the same pass adds 12 per candidate.

#include "launch.h"

namespace piece::cuda {
namespace {

struct Filter {
  float lam;
  Bound bound;
  int64_t offset;
  Candidates found;
};

template <typename T, bool with_sum, bool filtered, int width>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const T* __restrict__ grad, float* __restrict__ sum, float* __restrict__ square, Range range,
                      float scale, int64_t* num_nonfinite, Filter filter) {
  uint32_t num_bad = 0;
  for_each_pack<width>(range, [&](auto packed, int64_t i) {
    constexpr int w = decltype(packed)::value;
    const auto g = load<w>(grad + i);
    auto squares = load<w>(square + i);
    Pack<float, w> sums{};
    if constexpr (with_sum) sums = load<w>(sum + i);
#pragma unroll
    for (int j = 0; j < w; ++j) {
      const float x = to_float(g.v[j]);
      num_bad += !is_finite(x);
      const float value = gradient(x, scale);
      if constexpr (with_sum) sums.v[j] = add(sums.v[j], value);
      squares.v[j] = add_square(squares.v[j], value);
    }
    if constexpr (with_sum) store<w>(sum + i, sums);
    store<w>(square + i, squares);
    if constexpr (filtered) {
#pragma unroll
      for (int j = 0; j < w; ++j) {
        append_if_reached<with_sum>(filter.found, filter.bound, sums.v[j], squares.v[j], filter.lam,
                                    filter.offset + i + j);
      }
    }
  });
  add_warp_to(num_nonfinite, num_bad);
}

template <bool filtered>
cudaError_t launch(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale,
                   int64_t* num_nonfinite, const Filter& filter, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int vector = 16 / sizeof(T);
    const T* g = static_cast<const T*>(grad);
    with_alignment<vector>(
        n,
        [&](auto packed, const Range& range) {
          constexpr int width = decltype(packed)::value;
          const auto blocks = static_cast<unsigned>(grid_for(n, kThreads * width));
          if (sum == nullptr) {
            accumulate_kernel<T, false, filtered, width>
                <<<blocks, kThreads, 0, stream>>>(g, sum, square, range, scale, num_nonfinite, filter);
          } else {
            accumulate_kernel<T, true, filtered, width>
                <<<blocks, kThreads, 0, stream>>>(g, sum, square, range, scale, num_nonfinite, filter);
          }
        },
        g, sum, square);
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t accumulate(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale,
                       int64_t* num_nonfinite, cudaStream_t stream) {
  return launch<false>(dtype, grad, sum, square, n, scale, num_nonfinite, Filter{}, stream);
}

cudaError_t accumulate_filter(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale,
                              int64_t* num_nonfinite, float lam, const Bound& bound, int64_t offset,
                              const Candidates& found, cudaStream_t stream) {
  return launch<true>(dtype, grad, sum, square, n, scale, num_nonfinite, Filter{lam, bound, offset, found}, stream);
}

}  // namespace piece::cuda
