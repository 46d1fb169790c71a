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
  const auto add_to_sums = [&](auto packed, const auto& g, auto& sums, auto& squares) {
#pragma unroll
    for (int j = 0; j < decltype(packed)::value; ++j) {
      const float x = to_float(g.v[j]);
      num_bad += !is_finite(x);
      const float value = gradient(x, scale);
      if constexpr (with_sum) sums.v[j] = add(sums.v[j], value);
      squares.v[j] = add_square(squares.v[j], value);
    }
  };
  const auto look = [&](auto packed, int64_t i, const auto& sums, const auto& squares) {
    if constexpr (filtered) {
#pragma unroll
      for (int j = 0; j < decltype(packed)::value; ++j) {
        append_if_reached<with_sum>(filter.found, filter.bound, sums.v[j], squares.v[j], filter.lam, filter.offset + i + j);
      }
    }
  };
  const auto single = [&](int64_t i) {
    const auto g = load<1>(grad + i);
    auto squares = load<1>(square + i);
    Pack<float, 1> sums{};
    if constexpr (with_sum) sums = load<1>(sum + i);
    add_to_sums(Width<1>{}, g, sums, squares);
    if constexpr (with_sum) store<1>(sum + i, sums);
    store<1>(square + i, squares);
    look(Width<1>{}, i, sums, squares);
  };
  if constexpr (width == 1) {
    for_each_pack<1>(range, [&](auto, int64_t i) { single(i); });
  } else {
    for_each_tile<4>(range, [&](int64_t i, int64_t k) {
      const auto g = load<4>(grad + i), h = load<4>(grad + k);
      auto squares = load<4>(square + i), squares2 = load<4>(square + k);
      Pack<float, 4> sums{}, sums2{};
      if constexpr (with_sum) sums = load<4>(sum + i), sums2 = load<4>(sum + k);
      add_to_sums(Width<4>{}, g, sums, squares);
      add_to_sums(Width<4>{}, h, sums2, squares2);
      if constexpr (with_sum) store<4>(sum + i, sums), store<4>(sum + k, sums2);
      store<4>(square + i, squares), store<4>(square + k, squares2);
      look(Width<4>{}, i, sums, squares);
      look(Width<4>{}, k, sums2, squares2);
    }, single);
  }
  add_warp_to(num_nonfinite, num_bad);
}

template <bool filtered>
cudaError_t launch(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale,
                   int64_t* num_nonfinite, const Filter& filter, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int vector = 4;  // 16 bytes of the sums; of 16-bit gradients 8
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
