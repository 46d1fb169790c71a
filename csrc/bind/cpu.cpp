// The ops of schema.py on the CPU, through torch's stable ABI: one binary serves torch 2.10 and every later one.
#include "checks.h"

#include <algorithm>
#include <cstring>

#include "../cpu/ops.h"
#include "../cpu/parallel.h"
#include "module.h"

namespace piece::cpu {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void run_tasks(int64_t n, void (*task)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i, context);
  });
}

}  // namespace piece::cpu

namespace {

using namespace piece::bind;
using piece::cpu::Candidates;
using piece::cpu::DType;
using piece::cpu::Scores;

using OptionalTensor = std::optional<Tensor>;

Scores scores_of(const OptionalTensor& grad_sum, const Tensor& square_sum, double lam) {
  const int64_t n = square_sum.numel();
  return {optional_data<float>(grad_sum, "grad_sum", n), data<float>(square_sum, "square_sum", n), n,
          static_cast<float>(lam)};
}

Candidates candidates_of(const Tensor& score, const Tensor& index, const Tensor& num_found) {
  const int64_t capacity = score.numel();
  return {data<float>(score, "candidate_score", capacity), data<int64_t>(index, "candidate_index", capacity), capacity,
          data<int64_t>(num_found, "num_candidates", 1)};
}

struct Index {
  const int64_t* data;
  int64_t n;
  bool ascending;
};

Index index_of(const Tensor& index, int64_t limit) {
  const int64_t n = index.numel();
  const int64_t* positions = data<int64_t>(index, "index", n);
  const auto facts = piece::cpu::check_index(positions, n, limit);
  require_in_range(facts.in_range, limit);
  return {positions, n, facts.ascending};
}

// Tensors that are only read may have any strides.
Tensor readable(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

DType cpu_dtype(const Tensor& tensor, const char* name) { return static_cast<DType>(dtype_of(tensor, name)); }

void accumulate_(Tensor grad, OptionalTensor grad_sum, Tensor square_sum, double scale, Tensor num_nonfinite) {
  const int64_t n = grad.numel();
  const Tensor whole = readable(grad);
  int64_t* count = data<int64_t>(num_nonfinite, "num_nonfinite", 1);
  *count += piece::cpu::accumulate(cpu_dtype(grad, "grad"), whole.data_ptr(),
                                   optional_data<float>(grad_sum, "grad_sum", n),
                                   data<float>(square_sum, "square_sum", n), n, static_cast<float>(scale));
}

void accumulate_filter_(Tensor grad, OptionalTensor grad_sum, Tensor square_sum, double scale, Tensor num_nonfinite,
                        double lam, double bound, int64_t offset, Tensor candidate_score, Tensor candidate_index,
                        Tensor num_candidates) {
  const int64_t n = grad.numel();
  const Tensor whole = readable(grad);
  int64_t* count = data<int64_t>(num_nonfinite, "num_nonfinite", 1);
  *count += piece::cpu::accumulate_filter(
      cpu_dtype(grad, "grad"), whole.data_ptr(), optional_data<float>(grad_sum, "grad_sum", n),
      data<float>(square_sum, "square_sum", n), n, static_cast<float>(scale), static_cast<float>(lam),
      static_cast<float>(bound), offset, candidates_of(candidate_score, candidate_index, num_candidates));
}

Tensor score(OptionalTensor grad_sum, Tensor square_sum, double lam) {
  const Scores scores = scores_of(grad_sum, square_sum, lam);
  Tensor result = torch::stable::empty_like(square_sum);
  piece::cpu::score(scores, static_cast<float*>(result.data_ptr()));
  return result;
}

void score_histogram_(Tensor counts, OptionalTensor grad_sum, Tensor square_sum, double lam, int64_t shift,
                      int64_t bits, int64_t prefix, int64_t run, int64_t stride) {
  require_digit(shift, bits);
  require_sample(run, stride);
  piece::cpu::histogram(scores_of(grad_sum, square_sum, lam), static_cast<int>(shift), static_cast<int>(bits), prefix,
                        run, stride, data<int64_t>(counts, "counts", int64_t{1} << bits));
}

void filter_(OptionalTensor grad_sum, Tensor square_sum, double lam, double bound, int64_t offset,
             Tensor candidate_score, Tensor candidate_index, Tensor num_candidates) {
  piece::cpu::filter(scores_of(grad_sum, square_sum, lam), static_cast<float>(bound), offset,
                     candidates_of(candidate_score, candidate_index, num_candidates));
}

Tensor new_index(const Tensor& like, const std::vector<int64_t>& positions) {
  const int64_t size = static_cast<int64_t>(positions.size());
  Tensor result = torch::stable::new_empty(like, {size}, ScalarType::Long);
  if (size) std::memcpy(result.data_ptr(), positions.data(), size * sizeof(int64_t));
  return result;
}

Tensor select_above(OptionalTensor grad_sum, Tensor square_sum, double lam, int64_t key, int64_t num_ties) {
  return new_index(square_sum, piece::cpu::select_above(scores_of(grad_sum, square_sum, lam), key, num_ties));
}

Tensor index_to_mask(Tensor index, int64_t n) {
  const Index positions = index_of(index, n);
  Tensor bits = torch::stable::new_empty(index, {piece::mask_bytes(n)}, ScalarType::Byte);
  piece::cpu::index_to_mask(positions.data, positions.n, static_cast<uint8_t*>(bits.data_ptr()), n);
  return bits;
}

Tensor mask_to_index(Tensor bits) {
  const int64_t n = bits.numel();
  return new_index(bits, piece::cpu::mask_to_index(data<uint8_t>(bits, "bits", n), n));
}

void apply_mask_(Tensor grad, Tensor index, double scale, OptionalTensor square_norm, OptionalTensor num_nonfinite) {
  const int64_t n = grad.numel();
  require_layout(grad, "grad", n);
  const Index positions = index_of(index, n);
  double norm = 0.0;
  int64_t num_bad = 0;
  piece::cpu::apply_mask(cpu_dtype(grad, "grad"), grad.data_ptr(), n, positions.data, positions.n, positions.ascending,
                         scale, square_norm ? data<double>(*square_norm, "square_norm", 1) : &norm,
                         num_nonfinite ? data<int64_t>(*num_nonfinite, "num_nonfinite", 1) : &num_bad);
}

// use(run, first, positions, k): the k entries from `first` on of ascending positions that lie in a run, counted from its begin.
template <typename Use>
void for_each_run(const RunList& list, const Index& index, Use use) {
  require(index.ascending, "index must ascend: it counts through a list of tensors");
  std::vector<int64_t> local;
  const int64_t* first = index.data;
  for (const piece::Run& run : list.runs()) {
    const int64_t* const last = std::lower_bound(first, index.data + index.n, run.begin + run.n);
    const int64_t k = last - first;
    const int64_t* positions = first;
    if (run.begin > 0) {
      local.resize(static_cast<size_t>(k));
      std::transform(first, last, local.begin(), [&](int64_t i) { return i - run.begin; });
      positions = local.data();
    }
    use(run, first - index.data, positions, k);
    first = last;
  }
}

void apply_mask_list_(std::vector<Tensor> grads, Tensor index, double scale, OptionalTensor square_norm,
                      OptionalTensor num_nonfinite) {
  const RunList list(grads, "grads");
  double norm = 0.0;
  int64_t num_bad = 0;
  double* const to_norm = square_norm ? data<double>(*square_norm, "square_norm", 1) : &norm;
  int64_t* const to_count = num_nonfinite ? data<int64_t>(*num_nonfinite, "num_nonfinite", 1) : &num_bad;
  for_each_run(list, index_of(index, list.total()),
               [&](const piece::Run& run, int64_t, const int64_t* positions, int64_t k) {
                 piece::cpu::apply_mask(static_cast<DType>(list.dtype()), run.data, run.n, positions, k, true, scale, to_norm,
                                        to_count);
               });
}

void scatter_list_(std::vector<Tensor> weights, Tensor index, Tensor values) {
  const RunList list(weights, "weights");
  const int64_t size = list.dtype() == 0 ? 4 : 2, k = index.numel();
  require_layout(values, "values", k);
  require(k == 0 || dtype_of(values, "values") == list.dtype(), "values must have the weights' dtype");
  const char* const source = static_cast<const char*>(values.data_ptr());
  for_each_run(list, index_of(index, list.total()),
               [&](const piece::Run& run, int64_t first, const int64_t* positions, int64_t count) {
                 piece::cpu::scatter(size, run.data, positions, count, source + first * size);
               });
}

void gather_add_(Tensor grad, Tensor index, double scale, Tensor total) {
  const Tensor whole = readable(grad);
  const int64_t n = index.numel(), limit = grad.numel();
  const bool in_range = piece::cpu::gather_add(cpu_dtype(grad, "grad"), whole.data_ptr(), limit,
                                               data<int64_t>(index, "index", n), n, static_cast<float>(scale),
                                               data<float>(total, "total", n));
  require_in_range(in_range, limit);
}

void sampled_gradient_(Tensor grad_output, Tensor input, Tensor index, double scale, Tensor total) {
  require(grad_output.dim() == 2 && input.dim() == 2 && grad_output.size(0) == input.size(0),
          "sampled_gradient_ expected [tokens, out] and [tokens, in]");
  const int64_t tokens = input.size(0), out = grad_output.size(1), in = input.size(1);
  const DType dtype = cpu_dtype(input, "input");
  require(dtype_of(grad_output, "grad_output") == dtype, "grad_output and input must have the same dtype");
  require(out < INT32_MAX && in < INT32_MAX, "sampled_gradient_ takes less than 2^31 rows and columns");
  const Tensor left = readable(grad_output), right = readable(input);
  const Index positions = index_of(index, out * in);
  piece::cpu::sampled_gradient(dtype, left.data_ptr(), right.data_ptr(), tokens, out, in, positions.data, positions.n,
                               static_cast<float>(scale), data<float>(total, "total", positions.n));
}

void sparse_adamw_(Tensor grad, Tensor value, Tensor exp_avg, Tensor exp_avg_sq, Tensor weight, Tensor index,
                   double grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                   int64_t step, bool weight_holds_value) {
  require(step >= 1, "sparse_adamw_ expected step >= 1, got ", step);
  require_layout(weight, "weight", weight.numel());
  const int64_t n = index.numel(), limit = weight.numel();
  const bool in_range = piece::cpu::sparse_adamw(
      cpu_dtype(weight, "weight"), piece::make_adamw(grad_scale, lr, beta1, beta2, eps, weight_decay, step),
      data<float>(grad, "grad", n), data<float>(value, "value", n), data<float>(exp_avg, "exp_avg", n),
      data<float>(exp_avg_sq, "exp_avg_sq", n), weight.data_ptr(), limit, data<int64_t>(index, "index", n), n,
      weight_holds_value);
  require_in_range(in_range, limit);
}

void sparse_adamw_list_(Tensor grad, Tensor value, Tensor exp_avg, Tensor exp_avg_sq, std::vector<Tensor> weights,
                        Tensor index, double grad_scale, double lr, double beta1, double beta2, double eps,
                        double weight_decay, int64_t step, bool weight_holds_value) {
  require(step >= 1, "sparse_adamw_list_ expected step >= 1, got ", step);
  const RunList list(weights, "weights");
  const int64_t n = index.numel();
  const piece::AdamW scalars = piece::make_adamw(grad_scale, lr, beta1, beta2, eps, weight_decay, step);
  const float* const grads = data<float>(grad, "grad", n);
  float* const values = data<float>(value, "value", n);
  float* const first_moments = data<float>(exp_avg, "exp_avg", n);
  float* const second_moments = data<float>(exp_avg_sq, "exp_avg_sq", n);
  for_each_run(list, index_of(index, list.total()),
               [&](const piece::Run& run, int64_t first, const int64_t* positions, int64_t k) {
                 piece::cpu::sparse_adamw(static_cast<DType>(list.dtype()), scalars, grads + first, values + first,
                                          first_moments + first, second_moments + first, run.data, run.n, positions, k,
                                          weight_holds_value);
               });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(piece_ds, CPU, m) {
  m.impl("accumulate_", TORCH_BOX(&accumulate_));
  m.impl("accumulate_filter_", TORCH_BOX(&accumulate_filter_));
  m.impl("score", TORCH_BOX(&score));
  m.impl("score_histogram_", TORCH_BOX(&score_histogram_));
  m.impl("filter_", TORCH_BOX(&filter_));
  m.impl("select_above", TORCH_BOX(&select_above));
  m.impl("index_to_mask", TORCH_BOX(&index_to_mask));
  m.impl("mask_to_index", TORCH_BOX(&mask_to_index));
  m.impl("apply_mask_", TORCH_BOX(&apply_mask_));
  m.impl("apply_mask_list_", TORCH_BOX(&apply_mask_list_));
  m.impl("scatter_list_", TORCH_BOX(&scatter_list_));
  m.impl("gather_add_", TORCH_BOX(&gather_add_));
  m.impl("sampled_gradient_", TORCH_BOX(&sampled_gradient_));
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_));
  m.impl("sparse_adamw_list_", TORCH_BOX(&sparse_adamw_list_));
}

// For the loader and the tests: 'avx512', 'avx2', 'scalar', or '' for the best; null where it cannot run here.
extern "C" __attribute__((visibility("default"))) const char* piece_ds_select_isa(const char* name) {
  return piece::cpu::select_isa(name);
}
