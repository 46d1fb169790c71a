// One definition of every op's arithmetic, for g++ and nvcc: what piece_ds/ops/reference.py says, for one element.
//
// fp32, every operation rounded to nearest once: product, then sum, never fused; IEEE square root and division; no
// flushing of denormals. On a device the _rn intrinsics guarantee it; on a host the build does (-ffp-contract=off, no
// fast-math). Scalars of an op come as double from Python and are rounded to fp32 once, by the caller. Depends on
// nothing but the C++17 library, so that it can be tested without torch.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PIECE_HD __host__ __device__ __forceinline__
#else
#define PIECE_HD inline __attribute__((always_inline))
#endif

namespace piece {

// ---- operations rounded once ----

#ifdef __CUDA_ARCH__
PIECE_HD float add(float a, float b) { return __fadd_rn(a, b); }
PIECE_HD float sub(float a, float b) { return __fadd_rn(a, -b); }
PIECE_HD float mul(float a, float b) { return __fmul_rn(a, b); }
PIECE_HD float div(float a, float b) { return __fdiv_rn(a, b); }
PIECE_HD float sqrt_rn(float a) { return __fsqrt_rn(a); }
#else
PIECE_HD float add(float a, float b) { return a + b; }
PIECE_HD float sub(float a, float b) { return a - b; }
PIECE_HD float mul(float a, float b) { return a * b; }
PIECE_HD float div(float a, float b) { return a / b; }
PIECE_HD float sqrt_rn(float a) { return __builtin_sqrtf(a); }
#endif

template <typename To, typename From>
PIECE_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

PIECE_HD uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }
PIECE_HD float float_of(uint32_t bits) { return bit_cast<float>(bits); }

// ---- storage types ----

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

PIECE_HD float to_float(float x) { return x; }
PIECE_HD float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
PIECE_HD float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, NaN
  // Scaling by a power of two is exact, for the denormals of fp16 too.
  return float_of(sign | bits_of(mul(float_of(magnitude << 13), float_of(0x77800000u))));  // * 2^112
}

// Rounded to nearest, ties to even. NaN becomes the quiet NaN of torch.
template <typename T>
PIECE_HD T from_float(float x);
template <>
PIECE_HD float from_float<float>(float x) {
  return x;
}
template <>
PIECE_HD bf16 from_float<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0u};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
PIECE_HD fp16 from_float<fp16>(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return fp16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return fp16{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 2^16
  if (magnitude < 0x38800000u) {  // < 2^-14: the sum's last bit is the denormals' 2^-24, so the adder rounds
    return fp16{static_cast<uint16_t>(sign | (bits_of(add(float_of(magnitude), 0.5f)) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);  // may carry into inf, as it must
  return fp16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// ---- accumulate_ ----

PIECE_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// One gradient entry as it enters the sums: 0 where it is not finite (count those with is_finite), times scale.
PIECE_HD float gradient(float x, float scale) { return mul(is_finite(x) ? x : 0.0f, scale); }

// new sum = add(sum, g); new square sum = add_square(square, g).
PIECE_HD float add_square(float square, float g) { return add(square, mul(g, g)); }

// ---- scores ----

// NaN ranks last (0), -0 becomes +0, -inf the lowest number: nan_to_num(nan=0, posinf=inf) + 0.
PIECE_HD float clean(float x) {
  const float known = x != x ? 0.0f : x;
  return add(known < -FLT_MAX ? -FLT_MAX : known, 0.0f);
}

PIECE_HD float second_order_score(float sum, float square, float lam) {
  const float magnitude = float_of(bits_of(sum) & 0x7fffffffu);
  return clean(div(magnitude, sqrt_rn(add(square, lam))));
}

// with_sum false: the scores are `square` themselves, and sum is not looked at.
template <bool with_sum>
PIECE_HD float score(float sum, float square, float lam) {
  return with_sum ? second_order_score(sum, square, lam) : clean(square);
}

// Order-preserving for scores that are not negative.
PIECE_HD int32_t key_of(float score) { return bit_cast<int32_t>(score); }

// The digit of `bits` bits at bit `shift`, always within [0, 2^bits).
PIECE_HD int32_t digit(int32_t key, int shift, int bits) {
  return static_cast<int32_t>((static_cast<uint32_t>(key) >> shift) & ((1u << bits) - 1u));
}

// Whether the bits above the digit equal prefix; the leading digit (shift + bits == 31) has none.
PIECE_HD bool has_prefix(int32_t key, int shift, int bits, int64_t prefix) {
  return shift + bits >= 31 || static_cast<int64_t>(key >> (shift + bits)) == prefix;
}

// A bound on scores, with a test free of division that no score >= bound fails. Where `exact_only` is set the test
// says nothing, and every score has to be computed.
//
// Proof: let D = fl(square + lam), S = fl(sqrt(D)), q = fl(|sum| / S) >= bound, bound normal. Rounding to nearest moves
// a value by a factor within 1 +- 2^-24, so |sum| >= bound (1 - 2^-24) S >= bound (1 - 2^-24)^2 sqrt(D), hence sum^2 >=
// bound^2 (1 - 2^-24)^4 D >= factor D in real numbers. Rounding is monotonic, overflow and underflow included, so
// fl(sum * sum) >= fl(factor * D). Infinite and NaN: sum = inf gives inf >= anything but NaN; D = inf or NaN gives a
// score of 0, which no positive bound takes.
struct Bound {
  float bound;
  float factor;  // <= bound^2 (1 - 1e-6)
  bool exact_only;
};

inline Bound make_bound(float bound) {
  if (!(bound >= 2.0f * FLT_MIN)) return Bound{bound, 0.0f, true};  // denormal, zero, negative, NaN
  const double limit = static_cast<double>(bound) * static_cast<double>(bound) * (1.0 - 1e-6);
  if (!(limit < static_cast<double>(FLT_MAX))) return Bound{bound, FLT_MAX, false};
  float factor = static_cast<float>(limit);
  if (static_cast<double>(factor) > limit) factor = std::nextafterf(factor, 0.0f);
  return Bound{bound, factor, false};
}

PIECE_HD bool may_reach(const Bound& bound, float sum, float square, float lam) {
  return bound.exact_only || mul(sum, sum) >= mul(bound.factor, add(square, lam));
}

// Whether element i belongs to the sample: the first `run` of every `stride`.
PIECE_HD bool sampled(int64_t i, int64_t run, int64_t stride) { return run >= stride || i % stride < run; }

// ---- masks: bit j of byte i is element 8 i + j ----

PIECE_HD int64_t mask_byte(int64_t element) { return element >> 3; }
PIECE_HD uint32_t mask_bit(int64_t element) { return 1u << (element & 7); }
inline int64_t mask_bytes(int64_t n) { return n / 8 + (n % 8 != 0); }

// ---- sparse_adamw_ ----

// The scalars of one step, each rounded to fp32 once.
struct AdamW {
  float grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, correction;
};

inline AdamW make_adamw(double grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                        int64_t step) {
  const double n = static_cast<double>(step);
  AdamW h;
  h.grad_scale = static_cast<float>(grad_scale);
  h.decay = static_cast<float>(1.0 - lr * weight_decay);
  h.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  h.beta2 = static_cast<float>(beta2);
  h.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  h.eps = static_cast<float>(eps);
  h.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, n)));
  h.correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, n)));
  return h;
}

// One step of one element; value, first (exp_avg) and second (exp_avg_sq) are written.
PIECE_HD void adamw(const AdamW& h, float grad, float& value, float& first, float& second) {
  const float g = mul(grad, h.grad_scale);
  const float decayed = mul(value, h.decay);
  first = add(first, mul(sub(g, first), h.one_minus_beta1));
  second = add(mul(second, h.beta2), mul(mul(g, g), h.one_minus_beta2));
  const float denominator = add(mul(sqrt_rn(second), h.correction), h.eps);
  value = sub(decayed, mul(div(first, denominator), h.step_size));
}

// Whether rounding gives another weight than before: by bits, so a NaN is like itself and -0 is not 0.
PIECE_HD bool same_bits(float a, float b) { return bits_of(a) == bits_of(b); }
PIECE_HD bool same_bits(bf16 a, bf16 b) { return a.bits == b.bits; }
PIECE_HD bool same_bits(fp16 a, fp16 b) { return a.bits == b.bits; }

}  // namespace piece
