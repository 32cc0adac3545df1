// torch.ops.hf_onebit.onebit_linear for the CPU, by LibTorch's stable ABI: one binary for many versions of torch and
// of Python. Nothing in here computes; it checks what Python passed and hands pointers to onebit_linear.
//
// The refusals repeat those of hf_onebit/ops/schema.py, word for word, so that an error does not depend on whether
// this file was compiled. All sizes are int64, and every size that a pointer is moved by was compared with another
// tensor's first.
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

#include "onebit_linear.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void check(bool fine, const Parts&... parts) {
  if (fine) return;
  std::ostringstream message;
  message << "onebit_linear: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string dtype_of(const Tensor& tensor) {
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

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

std::optional<hf_onebit::Dtype> float_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return hf_onebit::Dtype::f16;
    case ScalarType::BFloat16: return hf_onebit::Dtype::bf16;
    case ScalarType::Float: return hf_onebit::Dtype::f32;
    case ScalarType::Double: return hf_onebit::Dtype::f64;
    default: return std::nullopt;
  }
}

bool is_float8(const Tensor& tensor) { return dtype_of(tensor).find("torch.float8") == 0; }

void check_device(const char* name, const Tensor& tensor) {
  if (tensor.is_cpu()) return;
  const bool cuda = tensor.is_cuda();
  check(false, name, " is on ", cuda ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device",
        ", x on cpu");
}

void check_vector(const char* name, const Tensor& vector, int64_t size, const std::string& meaning) {
  // Scales in eight bits pass the schema and are left to the reference there; no quantizer of ours makes them.
  check(float_of(vector).has_value(), name, " must be floating point, got ", dtype_of(vector),
        is_float8(vector) ? "; use 16 bits or more" : "; cast it first");
  check(vector.dim() == 1, name, " must have shape (", size, ",), ", meaning, ", got ", shape_of(vector));
  check(vector.size(0) == size, name, " has ", vector.size(0), " entries, expected ", size, ", ", meaning);
  check_device(name, vector);
}

void check_plane(const std::string& suffix, const Tensor& weight, const Tensor& a, const Tensor& b) {
  const std::string weight_name = "weight" + suffix, a_name = "a" + suffix, b_name = "b" + suffix;
  check(weight.scalar_type() == ScalarType::Int, weight_name, " must be packed signs in torch.int32, got ",
        dtype_of(weight), "; pack a float matrix with hf_onebit.formats.onebit.pack_signs");
  check(weight.dim() == 2, weight_name, " must have shape (ceil(in / 32), out), got ", shape_of(weight));
  check_device(weight_name.c_str(), weight);
  check_vector(a_name.c_str(), a, weight.size(1), "one scale per column of " + weight_name);
  check(b.dim() == 1, b_name, " must have shape (in,), got ", shape_of(b));
  check_vector(b_name.c_str(), b, b.size(0), "one scale per input");
  const int64_t rows = b.size(0) / 32 + (b.size(0) % 32 != 0);
  check(weight.size(0) == rows, weight_name, " has ", weight.size(0), " word rows, expected ", rows, " = ceil(",
        b.size(0), " / 32) for the ", b.size(0), " entries of ", b_name);
}

void check_x(const Tensor& x) {
  const bool is_float = float_of(x).has_value();
  check(is_float || is_float8(x), "x must be floating point, got ", dtype_of(x),
        ". Usually the calling model casts activations to `weight.dtype`, which is torch.int32 for a packed layer; "
        "list that layer in modules_to_not_convert so that it stays float");
  check(is_float, "x must be float16, bfloat16, float32 or float64, got ", dtype_of(x), "; cast it first");
  check(x.dim() >= 1, "x must have shape (..., in), got a scalar");
}

void check_second_plane(const Tensor& a, const Tensor& b, const std::optional<Tensor>& weight_1,
                        const std::optional<Tensor>& a_1, const std::optional<Tensor>& b_1) {
  std::string missing;
  const auto require = [&missing](const char* name, bool given) {
    if (!given) missing += (missing.empty() ? "" : ", ") + std::string(name);
  };
  require("weight_1", weight_1.has_value());
  require("a_1", a_1.has_value());
  require("b_1", b_1.has_value());
  check(missing.empty(), "the second plane needs weight_1, a_1 and b_1 together, got no ", missing);
  check_plane("_1", *weight_1, *a_1, *b_1);
  check(a_1->size(0) == a.size(0), "a_1 has ", a_1->size(0), " entries, expected ", a.size(0),
        ", as a: both planes have one size");
  check(b_1->size(0) == b.size(0), "b_1 has ", b_1->size(0), " entries, expected ", b.size(0),
        ", as b: both planes have one size");
}

hf_onebit::Vector vector_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), *float_of(tensor), tensor.stride(0)};
}

// A tensor whose rows have neighbouring elements and one distance from each to the next: itself where that holds.
Tensor in_rows(const Tensor& x) {
  if (x.is_contiguous()) return x;
  const bool neighbours = x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1;
  return x.dim() <= 2 && neighbours ? x : torch::stable::contiguous(x);
}

void on_torch_threads(int64_t count, hf_onebit::Body body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

Tensor onebit_linear(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                     std::optional<Tensor> bias, std::optional<Tensor> weight_1, std::optional<Tensor> a_1,
                     std::optional<Tensor> b_1) {
  check_x(x);
  check_device("x", x);
  check_plane("", weight, a, b);
  const int64_t in_features = b.size(0), out_features = a.size(0), dims = x.dim();
  check(x.size(dims - 1) == in_features, "x has ", x.size(dims - 1),
        " features in its last dimension, the layer expects ", in_features, " (the length of b); x has shape ",
        shape_of(x));
  if (bias) check_vector("bias", *bias, out_features, "one entry per output, as a");
  const bool two = weight_1 || a_1 || b_1;
  if (two) check_second_plane(a, b, weight_1, a_1, b_1);

  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) {
    sizes.push_back(x.size(i));
    check(!__builtin_mul_overflow(rows, x.size(i), &rows), "x has more rows than 64 bits count");
  }
  sizes.push_back(out_features);
  Tensor y = torch::stable::new_empty(x, sizes);

  const Tensor X = in_rows(x);
  hf_onebit::Linear linear;
  linear.rows = rows;
  linear.in_features = in_features;
  linear.out_features = out_features;
  linear.x = X.const_data_ptr();
  linear.x_stride = X.is_contiguous() || dims == 1 ? in_features : X.stride(0);
  linear.dtype = *float_of(x);
  linear.y = y.mutable_data_ptr();
  if (bias) linear.bias = vector_of(*bias);

  // Outputs side by side is all the kernels need of the words; a transposed tensor is copied, slowly and rightly.
  const auto side_by_side = [](const Tensor& words) {
    return words.size(1) <= 1 || words.stride(1) == 1 ? words : torch::stable::contiguous(words);
  };
  const Tensor words = side_by_side(weight);
  const Tensor words_1 = two ? side_by_side(*weight_1) : words;
  linear.plane[0] = {static_cast<const int32_t*>(words.const_data_ptr()), words.stride(0), vector_of(a), vector_of(b)};
  if (two) {
    linear.planes = 2;
    linear.plane[1] = {static_cast<const int32_t*>(words_1.const_data_ptr()), words_1.stride(0), vector_of(*a_1),
                       vector_of(*b_1)};
  }
  hf_onebit::onebit_linear(linear, {static_cast<int64_t>(torch::stable::get_num_threads()), on_torch_threads});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_onebit, CPU, library) { library.impl("onebit_linear", TORCH_BOX(&onebit_linear)); }
