// The vector of one element: any processor, any compiler. See vec_avx512.h for what a vector offers.
#pragma once

#include <piece/scalar.h>

namespace {

constexpr int W = 1;
struct F {
  float v;
};

PIECE_HD F load(const float* p) { return {*p}; }
PIECE_HD F load(const piece::bf16* p) { return {piece::to_float(*p)}; }
PIECE_HD F load(const piece::fp16* p) { return {piece::to_float(*p)}; }
PIECE_HD void store(float* p, F a) { *p = a.v; }
PIECE_HD F all(float x) { return {x}; }
PIECE_HD F add(F a, F b) { return {piece::add(a.v, b.v)}; }
PIECE_HD F sub(F a, F b) { return {piece::sub(a.v, b.v)}; }
PIECE_HD F mul(F a, F b) { return {piece::mul(a.v, b.v)}; }
PIECE_HD F div(F a, F b) { return {piece::div(a.v, b.v)}; }
PIECE_HD F sqrt_rn(F a) { return {piece::sqrt_rn(a.v)}; }
PIECE_HD F magnitude(F a) { return {piece::float_of(piece::bits_of(a.v) & 0x7fffffffu)}; }
PIECE_HD F clean(F a) { return {piece::clean(a.v)}; }
PIECE_HD F finite_or_zero(F a, uint32_t& nonfinite) {
  nonfinite = !piece::is_finite(a.v);
  return {nonfinite ? 0.0f : a.v};
}
PIECE_HD uint32_t at_least(F a, F b) { return a.v >= b.v; }
PIECE_HD void store_digits(int32_t* p, F a, int shift, int32_t mask) { *p = (piece::key_of(a.v) >> shift) & mask; }
PIECE_HD uint32_t prefix_lanes(F a, int shift, int64_t prefix) { return (piece::key_of(a.v) >> shift) == prefix; }
template <typename T>
PIECE_HD uint32_t differ(const T* a, const T* b) {
  return !piece::same_bits(*a, *b);
}
PIECE_HD int append(int32_t* p, int32_t first, uint32_t lanes) {
  *p = first;
  return static_cast<int>(lanes);
}
PIECE_HD float total(F a) { return a.v; }
PIECE_HD void transpose(F*) {}

}  // namespace
