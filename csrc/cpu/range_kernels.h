// Every range kernel, written once over a vector of W lanes; isa_*.cpp choose the vector and the compiler target.
//
// Only always-inline helpers and internal linkage here, and no template of the standard library: an instantiation
// compiled for AVX-512 could otherwise be the one that the linker keeps for all. The last n % W elements go through
// scalar.h, which gives the same bits.
#pragma once

#include "kernels.h"

namespace {

using piece::Bound;
using piece::cpu::IndexFacts;
using piece::cpu::Kernels;

template <typename T, bool with_sum>
int64_t accumulate_range(const T* grad, float* sum, float* square, int64_t n, float scale) {
  const F factor = all(scale);
  int64_t num_nonfinite = 0, i = 0;
  for (; i + W <= n; i += W) {
    uint32_t bad;
    const F g = mul(finite_or_zero(load(grad + i), bad), factor);
    num_nonfinite += __builtin_popcount(bad);
    if (with_sum) store(sum + i, add(load(sum + i), g));
    store(square + i, add(load(square + i), mul(g, g)));
  }
  for (; i < n; ++i) {
    const float x = piece::to_float(grad[i]), g = piece::gradient(x, scale);
    num_nonfinite += !piece::is_finite(x);
    if (with_sum) sum[i] = piece::add(sum[i], g);
    square[i] = piece::add_square(square[i], g);
  }
  return num_nonfinite;
}

template <typename T>
int64_t accumulate(const void* grad, float* sum, float* square, int64_t n, float scale) {
  const T* typed = static_cast<const T*>(grad);
  return sum ? accumulate_range<T, true>(typed, sum, square, n, scale)
             : accumulate_range<T, false>(typed, sum, square, n, scale);
}

template <bool with_sum>
PIECE_HD F score_at(const float* sum, const float* square, int64_t i, F lam) {
  return clean(with_sum ? div(magnitude(load(sum + i)), sqrt_rn(add(load(square + i), lam))) : load(square + i));
}

template <bool with_sum>
void score_range(const float* sum, const float* square, float* out, int64_t n, float lam) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, score_at<with_sum>(sum, square, i, all(lam)));
  for (; i < n; ++i) out[i] = piece::score<with_sum>(with_sum ? sum[i] : 0.0f, square[i], lam);
}

void score(const float* sum, const float* square, float* out, int64_t n, float lam) {
  sum ? score_range<true>(sum, square, out, n, lam) : score_range<false>(sum, square, out, n, lam);
}

// A bit per lane that may reach the bound: piece::may_reach, or the comparison itself where there is no division.
template <bool with_sum>
PIECE_HD uint32_t may_reach(const float* sum, const float* square, int64_t i, F lam, F bound, F factor) {
  if (!with_sum) return at_least(load(square + i), bound);
  const F s = load(sum + i);
  return at_least(mul(s, s), mul(factor, add(load(square + i), lam)));
}

template <bool with_sum>
int64_t filter_range(const float* sum, const float* square, int64_t n, float lam, const Bound& bound, float* score,
                     int32_t* position) {
  const F lam_W = all(lam), bound_W = all(bound.bound), factor_W = all(bound.factor);
  int64_t found = 0, i = 0;
  auto take = [&](int64_t first) {
    float scores[W];
    const F score_W = score_at<with_sum>(sum, square, first, lam_W);
    store(scores, score_W);
    for (uint32_t lanes = at_least(score_W, bound_W); lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      score[found] = scores[lane];
      position[found++] = static_cast<int32_t>(first + lane);
    }
  };
  if (bound.exact_only) {
    for (; i + W <= n; i += W) take(i);
  } else {
    for (; i + 4 * W <= n; i += 4 * W) {
      uint32_t may[4];
      for (int j = 0; j < 4; ++j) may[j] = may_reach<with_sum>(sum, square, i + j * W, lam_W, bound_W, factor_W);
      if (may[0] | may[1] | may[2] | may[3]) {
        for (int j = 0; j < 4; ++j) {
          if (may[j]) take(i + j * W);
        }
      }
    }
  }
  for (; i < n; ++i) {
    const float s = piece::score<with_sum>(with_sum ? sum[i] : 0.0f, square[i], lam);
    if (s >= bound.bound) {
      score[found] = s;
      position[found++] = static_cast<int32_t>(i);
    }
  }
  return found;
}

int64_t filter(const float* sum, const float* square, int64_t n, float lam, const Bound& bound, float* score,
               int32_t* position) {
  return sum ? filter_range<true>(sum, square, n, lam, bound, score, position)
             : filter_range<false>(sum, square, n, lam, bound, score, position);
}

template <bool with_sum>
void histogram_range(const float* sum, const float* square, int64_t n, float lam, int shift, int bits, int64_t prefix,
                     uint32_t* counts) {
  const int copies = piece::cpu::histogram_copies(bits);
  auto count = [&](int64_t i, float score) {
    const int32_t key = piece::key_of(score);
    if (piece::has_prefix(key, shift, bits, prefix)) {
      ++counts[((i & (copies - 1)) << bits) + piece::digit(key, shift, bits)];
    }
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    float scores[W];
    store(scores, score_at<with_sum>(sum, square, i, all(lam)));
    for (int j = 0; j < W; ++j) count(i + j, scores[j]);
  }
  for (; i < n; ++i) count(i, piece::score<with_sum>(with_sum ? sum[i] : 0.0f, square[i], lam));
}

void histogram(const float* sum, const float* square, int64_t n, float lam, int shift, int bits, int64_t prefix,
               uint32_t* counts) {
  sum ? histogram_range<true>(sum, square, n, lam, shift, bits, prefix, counts)
      : histogram_range<false>(sum, square, n, lam, shift, bits, prefix, counts);
}

IndexFacts check_index(const int64_t* index, int64_t n, int64_t limit) {
  int64_t outside = 0, descending = 0;  // sign bits: comparisons that every instruction set has for 64 bits
  const uint64_t last = static_cast<uint64_t>(limit) - 1;
  for (int64_t i = 0; i < n; ++i) outside |= index[i] | static_cast<int64_t>(last - static_cast<uint64_t>(index[i]));
  for (int64_t i = 1; i < n; ++i) {
    const uint64_t gap = static_cast<uint64_t>(index[i]) - static_cast<uint64_t>(index[i - 1]);
    descending |= static_cast<int64_t>(gap - 1);
  }
  return {outside >= 0, descending >= 0};
}

void adamw(const piece::AdamW& h, const float* grad, float* value, float* exp_avg, float* exp_avg_sq, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F g = mul(load(grad + i), all(h.grad_scale));
    const F decayed = mul(load(value + i), all(h.decay));
    const F old = load(exp_avg + i);
    const F first = add(old, mul(sub(g, old), all(h.one_minus_beta1)));
    const F second = add(mul(load(exp_avg_sq + i), all(h.beta2)), mul(mul(g, g), all(h.one_minus_beta2)));
    const F denominator = add(mul(sqrt_rn(second), all(h.correction)), all(h.eps));
    store(exp_avg + i, first);
    store(exp_avg_sq + i, second);
    store(value + i, sub(decayed, mul(div(first, denominator), all(h.step_size))));
  }
  for (; i < n; ++i) piece::adamw(h, grad[i], value[i], exp_avg[i], exp_avg_sq[i]);
}

template <typename T>
void transpose_panel(const void* source, int64_t width, int64_t columns, int64_t tokens, int64_t tile, float* panel) {
  const T* typed = static_cast<const T*>(source);
  const int64_t whole_tokens = tokens / W * W, whole_columns = columns / W * W;
  for (int64_t c = 0; c < whole_columns; c += W) {
    for (int64_t t = 0; t < whole_tokens; t += W) {
      F rows[W];
      for (int j = 0; j < W; ++j) rows[j] = load(typed + (t + j) * width + c);
      transpose(rows);
      for (int j = 0; j < W; ++j) store(panel + (c + j) * tile + t, rows[j]);
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t done = c < whole_columns ? whole_tokens : 0;
    for (int64_t t = done; t < tokens; ++t) panel[c * tile + t] = piece::to_float(typed[t * width + c]);
    for (int64_t t = tokens; t < tile; ++t) panel[c * tile + t] = 0.0f;
  }
}

float dot(const float* a, const float* b, int64_t n) {
  constexpr int kWays = W == 16 ? 1 : W == 8 ? 2 : 16;
  F sums[kWays];
  for (int j = 0; j < kWays; ++j) sums[j] = all(0.0f);
  for (int64_t i = 0; i < n; i += kWays * W) {
    for (int j = 0; j < kWays; ++j) sums[j] = add(sums[j], mul(load(a + i + j * W), load(b + i + j * W)));
  }
  float result = total(sums[0]);
  for (int j = 1; j < kWays; ++j) result = piece::add(result, total(sums[j]));
  return result;
}

constexpr Kernels kernels_named(const char* name) {
  using piece::bf16;
  using piece::fp16;
  return {name,
          {accumulate<float>, accumulate<bf16>, accumulate<fp16>},
          score,
          filter,
          histogram,
          check_index,
          adamw,
          {transpose_panel<float>, transpose_panel<bf16>, transpose_panel<fp16>},
          dot};
}

}  // namespace
