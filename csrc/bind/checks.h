// What a binding asks of a tensor before it hands out its pointer; shared by every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include <piece/runs.h>

namespace piece::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An error of the parts in a row, where it does not hold. Nothing is put together where it does: that would take as
// long as many an op's work.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "piece_ds: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename T>
constexpr ScalarType scalar_type();
template <>
constexpr ScalarType scalar_type<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type<double>() {
  return ScalarType::Double;
}
template <>
constexpr ScalarType scalar_type<int64_t>() {
  return ScalarType::Long;
}
template <>
constexpr ScalarType scalar_type<uint8_t>() {
  return ScalarType::Byte;
}

inline void require_layout(const Tensor& tensor, const char* name, int64_t n) {
  require(tensor.is_contiguous(), name, " must be contiguous: pass a view of a flat buffer");
  require(tensor.numel() == n, name, " must have ", n, " elements, got ", tensor.numel());
}

// Pointer to n contiguous elements of type T.
template <typename T>
T* data(const Tensor& tensor, const char* name, int64_t n) {
  constexpr ScalarType type = scalar_type<T>();
  require(tensor.scalar_type() == type, name, " must be ",
          type == ScalarType::Float    ? "float32"
          : type == ScalarType::Double ? "float64"
          : type == ScalarType::Long   ? "int64"
                                       : "uint8");
  require_layout(tensor, name, n);
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* optional_data(const std::optional<Tensor>& tensor, const char* name, int64_t n) {
  return tensor ? data<T>(*tensor, name, n) : nullptr;
}

// 0 float32, 1 bfloat16, 2 float16: the order of every table by dtype.
inline int dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    default:
      require(false, name, " must be float32, bfloat16 or float16");
      return 0;
  }
}

// A list of tensors of one dtype as runs of memory; a tensor that begins where the one before it ends continues its run.
class RunList {
 public:
  RunList(const std::vector<Tensor>& tensors, const char* name) {
    for (const Tensor& tensor : tensors) {
      const int64_t n = tensor.numel();
      require_layout(tensor, name, n);
      const int dtype = dtype_of(tensor, name);
      require(runs_.empty() || dtype == dtype_, "the tensors of ", name, " must have one dtype: call once for each");
      if (n == 0) continue;
      dtype_ = dtype;
      char* const data = static_cast<char*>(tensor.data_ptr());
      const int64_t size = dtype == 0 ? 4 : 2;
      if (!runs_.empty() && static_cast<char*>(runs_.back().data) + runs_.back().n * size == data) {
        runs_.back().n += n;
      } else {
        runs_.push_back(piece::Run{data, total_, n});
      }
      total_ += n;
    }
  }

  int dtype() const { return dtype_; }
  int64_t total() const { return total_; }
  const std::vector<piece::Run>& runs() const { return runs_; }
  piece::Runs all() const { return piece::Runs{runs_.data(), static_cast<int64_t>(runs_.size()), total_}; }

 private:
  std::vector<piece::Run> runs_;
  int64_t total_ = 0;
  int dtype_ = 0;
};

inline void require_in_range(bool in_range, int64_t n) {
  require(in_range, "index holds a position outside [0, ", n, ")");
}

inline void require_digit(int64_t shift, int64_t bits) {
  require(bits >= 0 && bits <= 16 && shift >= 0 && shift + bits <= 31,
          "score_histogram_ expected 0 <= bits <= 16, shift >= 0 and shift + bits <= 31, got shift ", shift, ", bits ",
          bits);
}

inline void require_sample(int64_t run, int64_t stride) {
  require(run >= 1 && stride >= 1, "score_histogram_ expected run >= 1 and stride >= 1, got run ", run, ", stride ",
          stride);
}

}  // namespace piece::bind
