// Every op over raw pointers, from all threads; the binding has checked types and lengths. Meaning: schema.py.
#pragma once

#include <vector>

#include "kernels.h"

namespace piece::cpu {

// The kernels in use: the best that this processor runs, or what select_isa named.
const Kernels& active();
// 'avx512', 'avx2', 'scalar', or '' for the best; returns the name in use, null for a name that cannot run here.
const char* select_isa(const char* name);

// Scores as every op takes them: n elements; sum null where the scores are `square` themselves.
struct Scores {
  const float* sum;
  const float* square;
  int64_t n;
  float lam;

  Scores part(int64_t first, int64_t size) const { return {sum ? sum + first : nullptr, square + first, size, lam}; }
};

struct Candidates {
  float* score;
  int64_t* index;
  int64_t capacity;
  int64_t* num_found;
};

// scores.cpp
int64_t accumulate(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale);
int64_t accumulate_filter(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale, float lam,
                          float bound, int64_t offset, Candidates out);
void score(Scores scores, float* out);
void histogram(Scores scores, int shift, int bits, int64_t prefix, int64_t run, int64_t stride, int64_t* counts);
void filter(Scores scores, float bound, int64_t offset, Candidates out);
std::vector<int64_t> select_above(Scores scores, int64_t key, int64_t num_ties);

// masks.cpp
IndexFacts check_index(const int64_t* index, int64_t n, int64_t limit);
void index_to_mask(const int64_t* index, int64_t n_index, uint8_t* bits, int64_t n);
std::vector<int64_t> mask_to_index(const uint8_t* bits, int64_t num_bytes);

// selected.cpp; apply_mask's positions have been checked
void apply_mask(DType dtype, void* grad, int64_t n, const int64_t* index, int64_t n_index, bool ascending,
                double scale, double* square_norm, int64_t* num_nonfinite);
// weight[index[j]] = values[j], elements of `size` bytes (2 or 4); positions have been checked
void scatter(int64_t size, void* weight, const int64_t* index, int64_t n, const void* values);
// These two: false, and nothing written, where a position is outside [0, limit).
bool gather_add(DType dtype, const void* grad, int64_t limit, const int64_t* index, int64_t n, float scale,
                float* total);
bool sparse_adamw(DType dtype, const AdamW& step, const float* grad, float* value, float* exp_avg, float* exp_avg_sq,
                  void* weight, int64_t limit, const int64_t* index, int64_t n, bool weight_holds_value);

// sampled_gradient.cpp; positions have been checked
void sampled_gradient(DType dtype, const void* grad_output, const void* input, int64_t tokens, int64_t out,
                      int64_t in, const int64_t* index, int64_t n, float scale, float* total);

}  // namespace piece::cpu
