// The CUDA ops: raw device pointers in, launches on one stream out. piece_ds/ops/schema.py says what each does.
//
// No function waits for the device, none allocates, all may be captured in a graph; what an op needs beside its arguments comes as
// `scratch` of the size named beside it. Pointers need the alignment of their type only. Lengths and positions are
// 64-bit. A null `sum` stands for the scores `square` themselves. The error returned is that of the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <piece/runs.h>
#include <piece/scalar.h>

namespace piece::cuda {

enum class DType { float32, bfloat16, float16 };

inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The sums of a range and how scores follow from them.
struct Scores {
  const float* sum;  // may be null
  const float* square;
  int64_t n;
  float lam;
};

struct Candidates {
  float* score;
  int64_t* index;
  int64_t capacity;
  int64_t* num_found;  // one element
};

// ---- accumulate.cu ----

cudaError_t accumulate(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale,
                       int64_t* num_nonfinite, cudaStream_t stream);
cudaError_t accumulate_filter(DType dtype, const void* grad, float* sum, float* square, int64_t n, float scale,
                              int64_t* num_nonfinite, float lam, const Bound& bound, int64_t offset,
                              const Candidates& found, cudaStream_t stream);

// ---- score.cu ----

cudaError_t score(const Scores& scores, float* out, cudaStream_t stream);
cudaError_t filter(const Scores& scores, const Bound& bound, int64_t offset, const Candidates& found,
                   cudaStream_t stream);

// ---- histogram.cu ----

// counts has 2^bits elements, bits <= 16; 1 <= run, 1 <= stride.
cudaError_t histogram(const Scores& scores, int shift, int bits, int64_t prefix, int64_t run, int64_t stride,
                      int64_t* counts, cudaStream_t stream);

// ---- compact.cu: ascending positions, in two calls, because the host must allocate what the first one counted ----

// int64 elements of scratch for n scores or n bytes; after the first call total_of(scratch) is the number of positions.
int64_t select_scratch(int64_t n);
int64_t mask_scratch(int64_t num_bytes);
inline const int64_t* total_of(const int64_t* scratch) { return scratch; }

cudaError_t select_count(const Scores& scores, int32_t key, int64_t num_ties, int64_t* scratch, cudaStream_t stream);
cudaError_t select_write(const Scores& scores, int32_t key, int64_t num_ties, int64_t* scratch, int64_t* out,
                         cudaStream_t stream);
cudaError_t mask_count(const uint8_t* bits, int64_t num_bytes, int64_t* scratch, cudaStream_t stream);
cudaError_t mask_write(const uint8_t* bits, int64_t num_bytes, int64_t* scratch, int64_t* out, cudaStream_t stream);

// ---- selected.cu: a position outside [0, n) stops the kernel with a message (cudaErrorAssert) ----

// words: ceil(n / 32) words of 32 bits, all written.
cudaError_t index_to_mask(const int64_t* index, int64_t k, uint32_t* words, int64_t n, cudaStream_t stream);

// kept: k elements of the gradients' type; partial: apply_mask_partials() fp64 elements. square_norm and num_nonfinite may be
// null. Positions count through all gradients, here and wherever there are Runs.
int64_t apply_mask_partials(const Runs& grads, int64_t k);
cudaError_t apply_mask(DType dtype, const Runs& grads, const int64_t* index, int64_t k, double scale, void* kept,
                       double* partial, double* square_norm, int64_t* num_nonfinite, cudaStream_t stream);
// values: k elements of the weights' type.
cudaError_t scatter(DType dtype, const Runs& weights, const int64_t* index, int64_t k, const void* values,
                    cudaStream_t stream);
cudaError_t gather_add(DType dtype, const void* grad, int64_t n, const int64_t* index, int64_t k, float scale,
                       float* total, cudaStream_t stream);
cudaError_t sparse_adamw(DType dtype, const float* grad, float* value, float* exp_avg, float* exp_avg_sq,
                         const Runs& weights, const int64_t* index, int64_t k, const AdamW& step, bool weight_holds_value,
                         cudaStream_t stream);

// ---- sampled_gradient.cu ----

// Bytes of scratch: at most 32 MiB, or what 64 tokens need.
int64_t sampled_gradient_scratch(DType dtype, int64_t tokens, int64_t outputs, int64_t inputs);
cudaError_t sampled_gradient(DType dtype, const void* grad_output, const void* input, int64_t tokens, int64_t outputs,
                             int64_t inputs, const int64_t* index, int64_t k, float scale, float* total, void* scratch,
                             cudaStream_t stream);

}  // namespace piece::cuda
