// The vector of 16 elements (AVX-512 F, BW, DQ, VL): what range_kernels.h is written in.
//
// A vector header defines W, F and, lane by lane as scalar.h defines them: load (from fp32, bf16, fp16), store, all,
// add, sub, mul, div, sqrt_rn, magnitude, clean; finite_or_zero, at_least,
// prefix_lanes and differ (by bits, of two rows in memory), which give a bit
// per lane; append, of first + lane for every bit, where there is room for W;
// store_digits; total, the sum of the lanes in a fixed order; transpose, of W
// vectors.
#pragma once

#include <immintrin.h>
#include <piece/scalar.h>

namespace {

constexpr int W = 16;
struct F {
  __m512 v;
};

PIECE_HD F load(const float* p) { return {_mm512_loadu_ps(p)}; }
PIECE_HD F load(const piece::bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
PIECE_HD F load(const piece::fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PIECE_HD void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
PIECE_HD F all(float x) { return {_mm512_set1_ps(x)}; }
PIECE_HD F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
PIECE_HD F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
PIECE_HD F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
PIECE_HD F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
PIECE_HD F sqrt_rn(F a) { return {_mm512_sqrt_ps(a.v)}; }
PIECE_HD F magnitude(F a) { return {_mm512_abs_ps(a.v)}; }
PIECE_HD F clean(F a) {
  const __mmask16 known = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  const __m512 limited = _mm512_maskz_max_ps(known, a.v, _mm512_set1_ps(-FLT_MAX));
  return {_mm512_add_ps(limited, _mm512_setzero_ps())};
}
PIECE_HD F finite_or_zero(F a, uint32_t& nonfinite) {
  const __mmask16 bad = _mm512_fpclass_ps_mask(a.v, 0x99);  // quiet and signalling NaN, +inf, -inf
  nonfinite = bad;
  return {_mm512_maskz_mov_ps(static_cast<__mmask16>(~bad), a.v)};
}
PIECE_HD uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
PIECE_HD void store_digits(int32_t* p, F a, int shift, int32_t mask) {
  const __m512i digit = _mm512_srl_epi32(_mm512_castps_si512(a.v), _mm_cvtsi32_si128(shift));
  _mm512_storeu_si512(p, _mm512_and_si512(digit, _mm512_set1_epi32(mask)));
}
PIECE_HD uint32_t prefix_lanes(F a, int shift, int64_t prefix) {
  if (prefix != static_cast<int32_t>(prefix)) return 0;
  const __m512i leading = _mm512_sra_epi32(_mm512_castps_si512(a.v), _mm_cvtsi32_si128(shift));
  return _mm512_cmpeq_epi32_mask(leading, _mm512_set1_epi32(static_cast<int32_t>(prefix)));
}
PIECE_HD uint32_t differ(const float* a, const float* b) {
  return _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
}
template <typename T>
PIECE_HD uint32_t differ(const T* a, const T* b) {  // bf16, fp16
  return _mm256_cmpneq_epi16_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                                  _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
}
PIECE_HD int append(int32_t* p, int32_t first, uint32_t lanes) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i position = _mm512_add_epi32(_mm512_set1_epi32(first), count);
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), position));
  return __builtin_popcount(lanes);
}
PIECE_HD float total(F a) { return _mm512_reduce_add_ps(a.v); }

PIECE_HD void transpose(F* row) {
  __m512 pair[16], quad[16], half[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(row[i].v, row[i + 1].v);
    pair[i + 1] = _mm512_unpackhi_ps(row[i].v, row[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      half[i + j] = _mm512_shuffle_f32x4(quad[i + j], quad[i + j + 4], 0x88);
      half[i + j + 4] = _mm512_shuffle_f32x4(quad[i + j], quad[i + j + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    row[i].v = _mm512_shuffle_f32x4(half[i], half[i + 8], 0x88);
    row[i + 8].v = _mm512_shuffle_f32x4(half[i], half[i + 8], 0xdd);
  }
}

}  // namespace
