// What the bindings of all operators share: checks of what Python passed, worded as in hf_onebit/ops/schema.py, so that
// an error does not depend on whether this was compiled; and views of tensors for the kernels.
//
// All sizes are int64, and every size that a pointer is moved by is compared with another tensor's first.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"

namespace hf_onebit::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Names of a dtype and of a shape, made only where a refusal prints them: every call passes them, hardly any needs them.
struct dtype_of {
  const Tensor& tensor;
  explicit dtype_of(const Tensor& named) : tensor(named) {}

  std::string text() const {
    switch (tensor.scalar_type()) {
      case ScalarType::Bool: return "torch.bool";
      case ScalarType::Byte: return "torch.uint8";
      case ScalarType::Char: return "torch.int8";
      case ScalarType::Short: return "torch.int16";
      case ScalarType::Int: return "torch.int32";
      case ScalarType::Long: return "torch.int64";
      case ScalarType::Half: return "torch.float16";
      case ScalarType::BFloat16: return "torch.bfloat16";
      case ScalarType::Float: return "torch.float32";
      case ScalarType::Double: return "torch.float64";
      case ScalarType::ComplexHalf: return "torch.complex32";
      case ScalarType::ComplexFloat: return "torch.complex64";
      case ScalarType::ComplexDouble: return "torch.complex128";
      case ScalarType::Float8_e5m2: return "torch.float8_e5m2";
      case ScalarType::Float8_e4m3fn: return "torch.float8_e4m3fn";
      case ScalarType::Float8_e5m2fnuz: return "torch.float8_e5m2fnuz";
      case ScalarType::Float8_e4m3fnuz: return "torch.float8_e4m3fnuz";
      default: return std::string("torch.") + torch::headeronly::toString(tensor.scalar_type());
    }
  }
};

struct shape_of {
  const Tensor& tensor;
  explicit shape_of(const Tensor& described) : tensor(described) {}
};

inline std::ostream& operator<<(std::ostream& out, const dtype_of& name) { return out << name.text(); }

inline std::ostream& operator<<(std::ostream& out, const shape_of& shape) {
  out << "(";
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) out << (i ? ", " : "") << shape.tensor.size(i);
  return out << (shape.tensor.dim() == 1 ? ",)" : ")");
}

inline std::optional<hf_onebit::Dtype> float_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return hf_onebit::Dtype::f16;
    case ScalarType::BFloat16: return hf_onebit::Dtype::bf16;
    case ScalarType::Float: return hf_onebit::Dtype::f32;
    case ScalarType::Double: return hf_onebit::Dtype::f64;
    default: return std::nullopt;
  }
}

inline bool is_float8(const Tensor& tensor) { return dtype_of(tensor).text().find("torch.float8") == 0; }

// The refusals of one operator, each beginning with its name.
struct Checks {
  const char* op;

  template <typename... Parts>
  void check(bool fine, const Parts&... parts) const {
    if (fine) return;
    std::ostringstream message;
    message << op << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

  void check_device(const char* name, const Tensor& tensor) const {
    if (tensor.is_cpu()) return;
    const bool cuda = tensor.is_cuda();
    check(false, name, " is on ", cuda ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device",
          ", x on cpu");
  }

  template <typename Meaning>  // text, or what prints as text
  void check_vector(const char* name, const Tensor& vector, int64_t size, const Meaning& meaning) const {
    const bool is_float = float_of(vector).has_value();
    check(is_float || is_float8(vector), name, " must be floating point, got ", dtype_of(vector), "; cast it first");
    check(is_float, name, " must be float16, bfloat16, float32 or float64, got ", dtype_of(vector), "; cast it first");
    check(vector.dim() == 1, name, " must have shape (", size, ",), ", meaning, ", got ", shape_of(vector));
    check(vector.size(0) == size, name, " has ", vector.size(0), " entries, expected ", size, ", ", meaning);
    check_device(name, vector);
  }

  void check_x(const Tensor& x) const {
    const bool is_float = float_of(x).has_value();
    check(is_float || is_float8(x), "x must be floating point, got ", dtype_of(x),
          ". Usually the calling model casts activations to `weight.dtype`, which is torch.int32 for a packed layer; "
          "list that layer in modules_to_not_convert so that it stays float");
    check(is_float, "x must be float16, bfloat16, float32 or float64, got ", dtype_of(x), "; cast it first");
    check(x.dim() >= 1, "x must have shape (..., in), got a scalar");
  }
};

inline hf_onebit::Vector vector_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), *float_of(tensor), tensor.stride(0)};
}

// A tensor whose rows have neighbouring elements and one distance from each to the next: itself where that holds.
inline Tensor in_rows(const Tensor& x) {
  if (x.is_contiguous()) return x;
  const bool neighbours = x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
  return x.dim() <= 2 && neighbours ? x : torch::stable::contiguous(x);
}

inline void on_torch_threads(int64_t count, hf_onebit::Body body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

}  // namespace hf_onebit::binding
