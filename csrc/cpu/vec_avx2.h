// The vector of 8 elements (AVX2, F16C). See vec_avx512.h for what a vector offers.
#pragma once

#include <immintrin.h>
#include <piece/scalar.h>

namespace {

constexpr int W = 8;
struct F {
  __m256 v;
};

PIECE_HD F load(const float* p) { return {_mm256_loadu_ps(p)}; }
PIECE_HD F load(const piece::bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
PIECE_HD F load(const piece::fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PIECE_HD void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
PIECE_HD F all(float x) { return {_mm256_set1_ps(x)}; }
PIECE_HD F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
PIECE_HD F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
PIECE_HD F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
PIECE_HD F div(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
PIECE_HD F sqrt_rn(F a) { return {_mm256_sqrt_ps(a.v)}; }
PIECE_HD F magnitude(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
PIECE_HD F clean(F a) {
  const __m256 known = _mm256_and_ps(a.v, _mm256_cmp_ps(a.v, a.v, _CMP_ORD_Q));
  return {_mm256_add_ps(_mm256_max_ps(known, _mm256_set1_ps(-FLT_MAX)), _mm256_setzero_ps())};
}
PIECE_HD F finite_or_zero(F a, uint32_t& nonfinite) {
  const __m256i exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256 bad = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), exponent));
  nonfinite = static_cast<uint32_t>(_mm256_movemask_ps(bad));
  return {_mm256_andnot_ps(bad, a.v)};
}
PIECE_HD uint32_t at_least(F a, F b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
PIECE_HD void store_digits(int32_t* p, F a, int shift, int32_t mask) {
  const __m256i digit = _mm256_srl_epi32(_mm256_castps_si256(a.v), _mm_cvtsi32_si128(shift));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_and_si256(digit, _mm256_set1_epi32(mask)));
}
PIECE_HD uint32_t prefix_lanes(F a, int shift, int64_t prefix) {
  if (prefix != static_cast<int32_t>(prefix)) return 0;
  const __m256i leading = _mm256_sra_epi32(_mm256_castps_si256(a.v), _mm_cvtsi32_si128(shift));
  const __m256i equal = _mm256_cmpeq_epi32(leading, _mm256_set1_epi32(static_cast<int32_t>(prefix)));
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal)));
}
PIECE_HD uint32_t differ(const float* a, const float* b) {
  const __m256i equal = _mm256_cmpeq_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal))) ^ 0xffu;
}
template <typename T>
PIECE_HD uint32_t differ(const T* a, const T* b) {  // bf16, fp16
  const __m128i equal = _mm_cmpeq_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                                        _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(equal, _mm_setzero_si128()))) ^ 0xffu;
}
PIECE_HD int append(int32_t* p, int32_t first, uint32_t lanes) {
  int count = 0;
  for (; lanes; lanes &= lanes - 1) p[count++] = first + __builtin_ctz(lanes);
  return count;
}
PIECE_HD float total(F a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

PIECE_HD void transpose(F* row) {
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i].v, row[i + 1].v);
    pair[i + 1] = _mm256_unpackhi_ps(row[i].v, row[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    row[i].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    row[i + 4].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

}  // namespace
