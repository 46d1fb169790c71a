// Every range kernel, written once over a vector of W lanes; isa_*.cpp choose the vector and the compiler target.
//
// Only always-inline helpers and internal linkage here, and no template of the standard library: an instantiation
// compiled for AVX-512 could otherwise be the one that the linker keeps for all. The last n % W elements go through
// scalar.h, which gives the same bits.
#pragma once

#include "kernels.h"

namespace {

using piece::Bound;
using piece::cpu::Entry;
using piece::cpu::Found;
using piece::cpu::IndexFacts;
using piece::cpu::Kernels;
using piece::cpu::kTile;

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
PIECE_HD uint32_t may_reach(F sum, F square, F lam, const Bound& bound) {
  if (bound.exact_only) return 1;
  if (!with_sum) return at_least(square, all(bound.bound));
  return at_least(mul(sum, sum), mul(all(bound.factor), add(square, lam)));
}

// Add what reaches the bound among `size` elements, W or 1, from position i.
template <bool with_sum>
PIECE_HD void take(const float* sum, const float* square, int64_t i, int size, float lam, const Bound& bound,
                   Found& found) {
  float scores[W];
  uint32_t lanes;
  if (size == W) {
    const F score_W = score_at<with_sum>(sum, square, i, all(lam));
    store(scores, score_W);
    lanes = at_least(score_W, all(bound.bound));
  } else {
    scores[0] = piece::score<with_sum>(with_sum ? sum[i] : 0.0f, square[i], lam);
    lanes = scores[0] >= bound.bound;
  }
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    found.score[found.count] = scores[lane];
    found.position[found.count++] = static_cast<int32_t>(i + lane);
  }
}

template <bool with_sum>
void filter_range(const float* sum, const float* square, int64_t n, float lam, const Bound& bound, Found& found) {
  auto reaches = [&](int64_t i) {
    return may_reach<with_sum>(with_sum ? load(sum + i) : all(0.0f), load(square + i), all(lam), bound);
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    uint32_t may[4], any = 0;
    for (int j = 0; j < 4; ++j) any |= may[j] = reaches(i + j * W);
    for (int j = 0; any && j < 4; ++j) {
      if (may[j]) take<with_sum>(sum, square, i + j * W, W, lam, bound, found);
    }
  }
  for (; i < n; ++i) take<with_sum>(sum, square, i, 1, lam, bound, found);
}

void filter(const float* sum, const float* square, int64_t n, float lam, const Bound& bound, Found& found) {
  sum ? filter_range<true>(sum, square, n, lam, bound, found) : filter_range<false>(sum, square, n, lam, bound, found);
}

// visit(i, lanes) sees every vector that may hold a score at the bound, right after its sums have been written.
template <typename T, bool with_sum, bool filtered, typename Visit>
PIECE_HD int64_t accumulate_range(const T* grad, float* sum, float* square, int64_t n, float scale, F lam,
                                  const Bound& bound, Visit visit) {
  const F factor = all(scale);
  int64_t num_nonfinite = 0, i = 0;
  for (; i + W <= n; i += W) {
    uint32_t bad;
    const F g = mul(finite_or_zero(load(grad + i), bad), factor);
    num_nonfinite += __builtin_popcount(bad);
    const F s = with_sum ? add(load(sum + i), g) : g, q = add(load(square + i), mul(g, g));
    if (with_sum) store(sum + i, s);
    store(square + i, q);
    if (filtered && may_reach<with_sum>(s, q, lam, bound)) visit(i, W);
  }
  for (; i < n; ++i) {
    const float x = piece::to_float(grad[i]), g = piece::gradient(x, scale);
    num_nonfinite += !piece::is_finite(x);
    if (with_sum) sum[i] = piece::add(sum[i], g);
    square[i] = piece::add_square(square[i], g);
    if (filtered) visit(i, 1);
  }
  return num_nonfinite;
}

template <typename T>
int64_t accumulate(const void* grad, float* sum, float* square, int64_t n, float scale) {
  const T* typed = static_cast<const T*>(grad);
  const Bound none{};
  auto nothing = [](int64_t, int) {};
  return sum ? accumulate_range<T, true, false>(typed, sum, square, n, scale, all(0.0f), none, nothing)
             : accumulate_range<T, false, false>(typed, sum, square, n, scale, all(0.0f), none, nothing);
}

template <typename T, bool with_sum>
int64_t accumulate_filter_range(const T* grad, float* sum, float* square, int64_t n, float scale, float lam,
                                const Bound& bound, Found& found) {
  return accumulate_range<T, with_sum, true>(
      grad, sum, square, n, scale, all(lam), bound,
      [&](int64_t i, int size) { take<with_sum>(sum, square, i, size, lam, bound, found); });
}

template <typename T>
int64_t accumulate_filter(const void* grad, float* sum, float* square, int64_t n, float scale, float lam,
                          const Bound& bound, Found& found) {
  const T* typed = static_cast<const T*>(grad);
  return sum ? accumulate_filter_range<T, true>(typed, sum, square, n, scale, lam, bound, found)
             : accumulate_filter_range<T, false>(typed, sum, square, n, scale, lam, bound, found);
}

template <bool with_sum>
void histogram_range(const float* sum, const float* square, int64_t n, float lam, int shift, int bits, int64_t prefix,
                     uint32_t* counts) {
  const int copies = piece::cpu::histogram_copies(bits);
  uint32_t* table[4];
  for (int j = 0; j < 4; ++j) table[j] = counts + (static_cast<int64_t>(j & (copies - 1)) << bits);
  const bool leading = shift + bits >= 31;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    int32_t digits[W];
    const F score_W = score_at<with_sum>(sum, square, i, all(lam));
    store_digits(digits, score_W, shift, (1 << bits) - 1);
    if (leading) {
      for (int j = 0; j < W; ++j) ++table[(W == 1 ? i : j) & 3][digits[j]];
    } else {
      for (uint32_t lanes = prefix_lanes(score_W, shift + bits, prefix); lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        ++table[lane & 3][digits[lane]];
      }
    }
  }
  for (; i < n; ++i) {
    const int32_t key = piece::key_of(piece::score<with_sum>(with_sum ? sum[i] : 0.0f, square[i], lam));
    if (piece::has_prefix(key, shift, bits, prefix)) ++table[i & 3][piece::digit(key, shift, bits)];
  }
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
void round_values(const float* value, void* out, int64_t n) {
  T* typed = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i) typed[i] = piece::from_float<T>(value[i]);
}

template <typename T>
int64_t changed(const void* before, const void* after, int64_t n, int32_t* position) {
  const T *a = static_cast<const T*>(before), *b = static_cast<const T*>(after);
  int64_t count = 0;
  int32_t i = 0;
  for (; i + W <= n; i += W) count += append(position + count, i, differ(a + i, b + i));
  for (; i < n; ++i) {  // count <= i: no append above reached past n either
    position[count] = i;
    count += !piece::same_bits(a[i], b[i]);
  }
  return count;
}

// W tokens at a time, along their rows: W streams that the processor foresees, where W columns would be kTile of them.
template <typename T>
void transpose_panel(const void* source, int64_t width, int64_t columns, int64_t tokens, float* panel) {
  const T* typed = static_cast<const T*>(source);
  const int64_t whole_tokens = tokens / W * W, whole_columns = columns / W * W;
  for (int64_t t = 0; t < whole_tokens; t += W) {
    for (int64_t c = 0; c < whole_columns; c += W) {
      F rows[W];
      for (int j = 0; j < W; ++j) rows[j] = load(typed + (t + j) * width + c);
      transpose(rows);
      for (int j = 0; j < W; ++j) store(panel + (c + j) * kTile + t, rows[j]);
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t done = c < whole_columns ? whole_tokens : 0;
    for (int64_t t = done; t < tokens; ++t) panel[c * kTile + t] = piece::to_float(typed[t * width + c]);
    for (int64_t t = tokens; t < kTile; ++t) panel[c * kTile + t] = 0.0f;
  }
}

void dots(const float* left, const float* right, const Entry* entry, int64_t n, float* result) {
  constexpr int kSums = W < 4 ? 16 : 2;  // sums that do not wait for each other
  for (int64_t i = 0; i < n; ++i) {
    const float* a = left + entry[i].row * kTile;
    const float* b = right + entry[i].column * kTile;
    F sums[kSums];
    for (int j = 0; j < kSums; ++j) sums[j] = mul(load(a + j * W), load(b + j * W));
    for (int t = kSums * W; t < kTile; t += kSums * W) {
      for (int j = 0; j < kSums; ++j) sums[j] = add(sums[j], mul(load(a + t + j * W), load(b + t + j * W)));
    }
    for (int size = kSums / 2; size; size /= 2) {
      for (int j = 0; j < size; ++j) sums[j] = add(sums[j], sums[j + size]);
    }
    result[i] = total(sums[0]);
  }
}

constexpr Kernels kernels_named(const char* name) {
  using piece::bf16;
  using piece::fp16;
  return {name,
          {accumulate<float>, accumulate<bf16>, accumulate<fp16>},
          {accumulate_filter<float>, accumulate_filter<bf16>, accumulate_filter<fp16>},
          score,
          filter,
          histogram,
          check_index,
          adamw,
          {round_values<float>, round_values<bf16>, round_values<fp16>},
          {changed<float>, changed<bf16>, changed<fp16>},
          {transpose_panel<float>, transpose_panel<bf16>, transpose_panel<fp16>},
          dots};
}

}  // namespace
