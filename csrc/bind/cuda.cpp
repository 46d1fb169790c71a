// The ops of schema.py on CUDA, through torch's stable ABI: checks, memory, device and current stream.
//
// Nothing here waits for the device but select_above and mask_to_index, whose results have a length that only the
// device knows. Memory that is let go while kernels still read it is torch's to order: its allocator follows streams.
#include "checks.h"

#include "../cuda/kernels.h"
#include "module.h"

namespace {

using namespace piece::bind;
using piece::cuda::Candidates;
using piece::cuda::DType;
using piece::cuda::Scores;

using OptionalTensor = std::optional<Tensor>;

void check(cudaError_t error) {
  require(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// The device of an op's first tensor, current while the op runs, and its stream. Every pointer is asked for here, so
// that no tensor of another device reaches a kernel.
class Device {
 public:
  explicit Device(const Tensor& first) : index_(index_of(first)), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  void require_here(const Tensor& tensor, const char* name) const {
    require(tensor.is_cuda() && tensor.get_device_index() == index_,
            name, " must be on cuda:", index_, ", where the op's first tensor is");
  }

  template <typename T>
  T* data(const Tensor& tensor, const char* name, int64_t n) const {
    require_here(tensor, name);
    return piece::bind::data<T>(tensor, name, n);
  }

  template <typename T>
  T* optional_data(const OptionalTensor& tensor, const char* name, int64_t n) const {
    return tensor ? data<T>(*tensor, name, n) : nullptr;
  }

  // A tensor of n elements that an op writes in place, of one of the three dtypes.
  void* writable(const Tensor& tensor, const char* name) const {
    require_here(tensor, name);
    require_layout(tensor, name, tensor.numel());
    return tensor.data_ptr();
  }

  // Tensors that are only read may have any strides.
  Tensor readable(const Tensor& tensor, const char* name) const {
    require_here(tensor, name);
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }

  Tensor empty(const Tensor& like, int64_t n, ScalarType dtype) const {
    return torch::stable::new_empty(like, {n}, dtype);
  }

  // A number that kernels on the stream are about to write.
  int64_t wait_for(const int64_t* value) const {
    int64_t result = 0;
    check(cudaMemcpyAsync(&result, value, sizeof(result), cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
    return result;
  }

 private:
  // A CPU tensor before CUDA ones dispatches here as well, and has no device to guard.
  static int32_t index_of(const Tensor& first) {
    require(first.is_cuda(), "the op's first tensor must be on a CUDA device, as its others are: move it there");
    return first.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

DType cuda_dtype(const Tensor& tensor, const char* name) { return static_cast<DType>(dtype_of(tensor, name)); }

Scores scores_of(const Device& device, const OptionalTensor& grad_sum, const Tensor& square_sum, double lam) {
  const int64_t n = square_sum.numel();
  const float* square = device.data<float>(square_sum, "square_sum", n);
  return {device.optional_data<float>(grad_sum, "grad_sum", n), square, n, static_cast<float>(lam)};
}

Candidates candidates_of(const Device& device, const Tensor& score, const Tensor& index, const Tensor& num_found) {
  const int64_t capacity = score.numel();
  return {device.data<float>(score, "candidate_score", capacity),
          device.data<int64_t>(index, "candidate_index", capacity), capacity,
          device.data<int64_t>(num_found, "num_candidates", 1)};
}

void accumulate_(Tensor grad, OptionalTensor grad_sum, Tensor square_sum, double scale, Tensor num_nonfinite) {
  const Device device(grad);
  const int64_t n = grad.numel();
  const Tensor whole = device.readable(grad, "grad");
  check(piece::cuda::accumulate(cuda_dtype(grad, "grad"), whole.data_ptr(),
                                device.optional_data<float>(grad_sum, "grad_sum", n),
                                device.data<float>(square_sum, "square_sum", n), n, static_cast<float>(scale),
                                device.data<int64_t>(num_nonfinite, "num_nonfinite", 1), device.stream()));
}

void accumulate_filter_(Tensor grad, OptionalTensor grad_sum, Tensor square_sum, double scale, Tensor num_nonfinite,
                        double lam, double bound, int64_t offset, Tensor candidate_score, Tensor candidate_index,
                        Tensor num_candidates) {
  const Device device(grad);
  const int64_t n = grad.numel();
  const Tensor whole = device.readable(grad, "grad");
  check(piece::cuda::accumulate_filter(
      cuda_dtype(grad, "grad"), whole.data_ptr(), device.optional_data<float>(grad_sum, "grad_sum", n),
      device.data<float>(square_sum, "square_sum", n), n, static_cast<float>(scale),
      device.data<int64_t>(num_nonfinite, "num_nonfinite", 1), static_cast<float>(lam),
      piece::make_bound(static_cast<float>(bound)), offset,
      candidates_of(device, candidate_score, candidate_index, num_candidates), device.stream()));
}

Tensor score(OptionalTensor grad_sum, Tensor square_sum, double lam) {
  const Device device(square_sum);
  const Scores scores = scores_of(device, grad_sum, square_sum, lam);
  Tensor result = torch::stable::empty_like(square_sum);
  check(piece::cuda::score(scores, static_cast<float*>(result.data_ptr()), device.stream()));
  return result;
}

void score_histogram_(Tensor counts, OptionalTensor grad_sum, Tensor square_sum, double lam, int64_t shift,
                      int64_t bits, int64_t prefix, int64_t run, int64_t stride) {
  require_digit(shift, bits);
  require_sample(run, stride);
  const Device device(square_sum);
  check(piece::cuda::histogram(scores_of(device, grad_sum, square_sum, lam), static_cast<int>(shift),
                               static_cast<int>(bits), prefix, run, stride,
                               device.data<int64_t>(counts, "counts", int64_t{1} << bits), device.stream()));
}

void filter_(OptionalTensor grad_sum, Tensor square_sum, double lam, double bound, int64_t offset,
             Tensor candidate_score, Tensor candidate_index, Tensor num_candidates) {
  const Device device(square_sum);
  check(piece::cuda::filter(scores_of(device, grad_sum, square_sum, lam), piece::make_bound(static_cast<float>(bound)),
                            offset, candidates_of(device, candidate_score, candidate_index, num_candidates),
                            device.stream()));
}

Tensor select_above(OptionalTensor grad_sum, Tensor square_sum, double lam, int64_t key, int64_t num_ties) {
  require(key >= 0 && key <= INT32_MAX && num_ties >= 0,
          "select_above expected 0 <= key < 2^31 and num_ties >= 0, got key ", key, ", num_ties ", num_ties);
  const Device device(square_sum);
  const Scores scores = scores_of(device, grad_sum, square_sum, lam);
  const int32_t threshold = static_cast<int32_t>(key);
  Tensor scratch = device.empty(square_sum, piece::cuda::select_scratch(scores.n), ScalarType::Long);
  int64_t* counts = static_cast<int64_t*>(scratch.data_ptr());
  check(piece::cuda::select_count(scores, threshold, num_ties, counts, device.stream()));
  const int64_t total = device.wait_for(piece::cuda::total_of(counts));
  Tensor result = device.empty(square_sum, total, ScalarType::Long);
  if (total > 0) {
    check(piece::cuda::select_write(scores, threshold, num_ties, counts, static_cast<int64_t*>(result.data_ptr()),
                                    device.stream()));
  }
  return result;
}

Tensor index_to_mask(Tensor index, int64_t n) {
  require(n >= 0, "index_to_mask expected n >= 0, got ", n);
  const Device device(index);
  const int64_t k = index.numel();
  // Kernels write whole words: the result is the front of a tensor that ends with one.
  const int64_t num_words = n / 32 + (n % 32 != 0), num_bytes = piece::mask_bytes(n);
  Tensor words = device.empty(index, 4 * num_words, ScalarType::Byte);
  check(piece::cuda::index_to_mask(device.data<int64_t>(index, "index", k), k,
                                   static_cast<uint32_t*>(words.data_ptr()), n, device.stream()));
  return num_bytes == 4 * num_words ? words : torch::stable::narrow(words, 0, 0, num_bytes);
}

Tensor mask_to_index(Tensor bits) {
  const Device device(bits);
  const int64_t num_bytes = bits.numel();
  const uint8_t* bytes = device.data<uint8_t>(bits, "bits", num_bytes);
  Tensor scratch = device.empty(bits, piece::cuda::mask_scratch(num_bytes), ScalarType::Long);
  int64_t* counts = static_cast<int64_t*>(scratch.data_ptr());
  check(piece::cuda::mask_count(bytes, num_bytes, counts, device.stream()));
  const int64_t total = device.wait_for(piece::cuda::total_of(counts));
  Tensor result = device.empty(bits, total, ScalarType::Long);
  if (total > 0) {
    check(piece::cuda::mask_write(bytes, num_bytes, counts, static_cast<int64_t*>(result.data_ptr()), device.stream()));
  }
  return result;
}

// Tensors of a list, all of them on the op's device; the first tensor of an op whose list is empty is another one.
RunList runs_on(const Device& device, const std::vector<Tensor>& tensors, const char* name) {
  for (const Tensor& tensor : tensors) device.require_here(tensor, name);
  return RunList(tensors, name);
}

void mask_list(const Device& device, const Tensor& like, const RunList& grads, const Tensor& index, double scale,
               const OptionalTensor& square_norm, const OptionalTensor& num_nonfinite) {
  const int64_t k = index.numel();
  double* norm = device.optional_data<double>(square_norm, "square_norm", 1);
  Tensor kept = device.empty(like, k, like.scalar_type());
  Tensor partial =
      device.empty(like, norm != nullptr ? piece::cuda::apply_mask_partials(grads.all(), k) : 0, ScalarType::Double);
  check(piece::cuda::apply_mask(static_cast<DType>(grads.dtype()), grads.all(), device.data<int64_t>(index, "index", k), k,
                                scale, kept.data_ptr(), static_cast<double*>(partial.data_ptr()), norm,
                                device.optional_data<int64_t>(num_nonfinite, "num_nonfinite", 1), device.stream()));
}

void apply_mask_(Tensor grad, Tensor index, double scale, OptionalTensor square_norm, OptionalTensor num_nonfinite) {
  const Device device(grad);
  mask_list(device, grad, runs_on(device, {grad}, "grad"), index, scale, square_norm, num_nonfinite);
}

void apply_mask_list_(std::vector<Tensor> grads, Tensor index, double scale, OptionalTensor square_norm,
                      OptionalTensor num_nonfinite) {
  const Device device(index);
  if (grads.empty()) return;
  mask_list(device, grads[0], runs_on(device, grads, "grads"), index, scale, square_norm, num_nonfinite);
}

void scatter_list_(std::vector<Tensor> weights, Tensor index, Tensor values) {
  const Device device(index);
  const int64_t k = index.numel();
  const RunList runs = runs_on(device, weights, "weights");
  const void* source = device.writable(values, "values");
  require(values.numel() == k, "values must have ", k, " elements, got ", values.numel());
  require(k == 0 || dtype_of(values, "values") == runs.dtype(), "values must have the weights' dtype");
  check(piece::cuda::scatter(static_cast<DType>(runs.dtype()), runs.all(), device.data<int64_t>(index, "index", k), k, source,
                             device.stream()));
}

void gather_add_(Tensor grad, Tensor index, double scale, Tensor total) {
  const Device device(grad);
  const int64_t k = index.numel();
  const Tensor whole = device.readable(grad, "grad");
  check(piece::cuda::gather_add(cuda_dtype(grad, "grad"), whole.data_ptr(), grad.numel(),
                                device.data<int64_t>(index, "index", k), k, static_cast<float>(scale),
                                device.data<float>(total, "total", k), device.stream()));
}

void sampled_gradient_(Tensor grad_output, Tensor input, Tensor index, double scale, Tensor total) {
  require(grad_output.dim() == 2 && input.dim() == 2 && grad_output.size(0) == input.size(0),
          "sampled_gradient_ expected [tokens, out] and [tokens, in]");
  const Device device(grad_output);
  const int64_t tokens = input.size(0), outputs = grad_output.size(1), inputs = input.size(1), k = index.numel();
  const DType dtype = cuda_dtype(input, "input");
  require(cuda_dtype(grad_output, "grad_output") == dtype, "grad_output and input must have the same dtype");
  const Tensor left = device.readable(grad_output, "grad_output"), right = device.readable(input, "input");
  const int64_t bytes = k > 0 ? piece::cuda::sampled_gradient_scratch(dtype, tokens, outputs, inputs) : 0;
  Tensor scratch = device.empty(input, bytes, ScalarType::Byte);
  check(piece::cuda::sampled_gradient(dtype, left.data_ptr(), right.data_ptr(), tokens, outputs, inputs,
                                      device.data<int64_t>(index, "index", k), k, static_cast<float>(scale),
                                      device.data<float>(total, "total", k), scratch.data_ptr(), device.stream()));
}

void step_list(const Device& device, const Tensor& grad, const Tensor& value, const Tensor& exp_avg,
               const Tensor& exp_avg_sq, const RunList& weights, const Tensor& index, const piece::AdamW& step,
               bool weight_holds_value) {
  const int64_t k = index.numel();
  check(piece::cuda::sparse_adamw(
      static_cast<DType>(weights.dtype()), device.data<float>(grad, "grad", k), device.data<float>(value, "value", k),
      device.data<float>(exp_avg, "exp_avg", k), device.data<float>(exp_avg_sq, "exp_avg_sq", k), weights.all(),
      device.data<int64_t>(index, "index", k), k, step, weight_holds_value, device.stream()));
}

void sparse_adamw_(Tensor grad, Tensor value, Tensor exp_avg, Tensor exp_avg_sq, Tensor weight, Tensor index,
                   double grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                   int64_t step, bool weight_holds_value) {
  require(step >= 1, "sparse_adamw_ expected step >= 1, got ", step);
  const Device device(weight);
  step_list(device, grad, value, exp_avg, exp_avg_sq, runs_on(device, {weight}, "weight"), index,
            piece::make_adamw(grad_scale, lr, beta1, beta2, eps, weight_decay, step), weight_holds_value);
}

void sparse_adamw_list_(Tensor grad, Tensor value, Tensor exp_avg, Tensor exp_avg_sq, std::vector<Tensor> weights,
                        Tensor index, double grad_scale, double lr, double beta1, double beta2, double eps,
                        double weight_decay, int64_t step, bool weight_holds_value) {
  require(step >= 1, "sparse_adamw_list_ expected step >= 1, got ", step);
  const Device device(grad);
  step_list(device, grad, value, exp_avg, exp_avg_sq, runs_on(device, weights, "weights"), index,
            piece::make_adamw(grad_scale, lr, beta1, beta2, eps, weight_decay, step), weight_holds_value);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(piece_ds, CUDA, m) {
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
