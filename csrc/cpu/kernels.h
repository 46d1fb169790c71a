// What one thread does to one range, once per instruction set: a table of functions.
//
// range_kernels.h defines them, isa_*.cpp compile them, the drivers (fisher.cpp, ...) call them from many threads.
// Pointers need no alignment; a null `sum` stands for the scores `square` themselves.
#pragma once

#include <piece/scalar.h>

namespace piece::cpu {

enum DType { kFloat32, kBFloat16, kFloat16, kNumDTypes };

// Histograms of at most this many bits are kept in 4 copies, so that equal keys in a row do not wait for each other.
constexpr int kMaxBitsOfCopies = 11;
PIECE_HD int histogram_copies(int bits) { return bits <= kMaxBitsOfCopies ? 4 : 1; }

// What a range of positions is: in_range, all within [0, limit); ascending, strictly.
struct IndexFacts {
  bool in_range, ascending;
};

// Scores that reached a bound and their positions, ascending; room for every element that is looked at.
struct Found {
  float* score;
  int32_t* position;
  int64_t count;
};

// Tokens that sampled_gradient_ turns round at a time: a panel of 4096 columns is then 1 MiB, a core's second cache.
constexpr int64_t kTile = 64;

// A place in a product of matrices, by rows of its panels.
struct Entry {
  int32_t row, column;
};

struct Kernels {
  const char* name;
  // sum += g, square += g * g; returns the number of non-finite entries. sum may be null.
  int64_t (*accumulate[kNumDTypes])(const void* grad, float* sum, float* square, int64_t n, float scale);
  // accumulate, and filter of the new sums.
  int64_t (*accumulate_filter[kNumDTypes])(const void* grad, float* sum, float* square, int64_t n, float scale,
                                           float lam, const Bound& bound, Found& found);
  void (*score)(const float* sum, const float* square, float* out, int64_t n, float lam);
  // Appends every score >= bound; n < 2^31.
  void (*filter)(const float* sum, const float* square, int64_t n, float lam, const Bound& bound, Found& found);
  // counts: histogram_copies(bits) tables of 2^bits; n < 2^31 so that none overflows.
  void (*histogram)(const float* sum, const float* square, int64_t n, float lam, int shift, int bits, int64_t prefix,
                    uint32_t* counts);
  IndexFacts (*check_index)(const int64_t* index, int64_t n, int64_t limit);
  void (*adamw)(const AdamW& step, const float* grad, float* value, float* exp_avg, float* exp_avg_sq, int64_t n);
  // out = value, rounded to the type of out.
  void (*round[kNumDTypes])(const float* value, void* out, int64_t n);
  // Positions where the bits of two rows differ, ascending, into `position`, which has room for n; their number.
  int64_t (*changed[kNumDTypes])(const void* before, const void* after, int64_t n, int32_t* position);
  // panel[c * kTile + t] = source[t * width + c] for c < columns, t < tokens; 0 for tokens <= t < kTile.
  void (*transpose[kNumDTypes])(const void* source, int64_t width, int64_t columns, int64_t tokens, float* panel);
  // result[i] = sum over t < kTile of left[entry[i].row * kTile + t] * right[entry[i].column * kTile + t].
  void (*dots)(const float* left, const float* right, const Entry* entry, int64_t n, float* result);
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace piece::cpu
