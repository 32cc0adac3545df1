// torch.ops.hf_onebit.onebit_linear for the CPU, by LibTorch's stable ABI: one binary for many versions of torch and
// of Python. Nothing in here computes; it checks what Python passed and hands pointers to onebit_linear.
#include "binding_onebit.h"

#include <algorithm>
#include <array>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace hf_onebit::binding {
namespace {

// What an output scale is, said of the words it belongs to.
struct PerColumn {
  const char* words;
};
std::ostream& operator<<(std::ostream& out, const PerColumn& meaning) {
  return out << "one scale per column of " << meaning.words;
}

struct OnebitChecks : Checks {
  using Names = std::array<const char*, 3>;

  void check_plane(const Names& names, const Tensor& weight, const Tensor& a, const Tensor& b) const {
    const auto [weight_name, a_name, b_name] = names;
    check(weight.scalar_type() == ScalarType::Int, weight_name, " must be packed signs in torch.int32, got ",
          dtype_of(weight), "; pack a float matrix with hf_onebit.formats.onebit.pack_signs");
    check(weight.dim() == 2, weight_name, " must have shape (ceil(in / 32), out), got ", shape_of(weight));
    check_device(weight_name, weight);
    check_vector(a_name, a, weight.size(1), PerColumn{weight_name});
    check(b.dim() == 1, b_name, " must have shape (in,), got ", shape_of(b));
    check_vector(b_name, b, b.size(0), "one scale per input");
    const int64_t rows = b.size(0) / 32 + (b.size(0) % 32 != 0);
    check(weight.size(0) == rows, weight_name, " has ", weight.size(0), " word rows, expected ", rows, " = ceil(",
          b.size(0), " / 32) for the ", b.size(0), " entries of ", b_name);
  }

  void check_second_plane(const Tensor& a, const Tensor& b, const std::optional<Tensor>& weight_1,
                          const std::optional<Tensor>& a_1, const std::optional<Tensor>& b_1) const {
    std::string missing;
    const auto require = [&missing](const char* name, bool given) {
      if (!given) missing += (missing.empty() ? "" : ", ") + std::string(name);
    };
    require("weight_1", weight_1.has_value());
    require("a_1", a_1.has_value());
    require("b_1", b_1.has_value());
    check(missing.empty(), "the second plane needs weight_1, a_1 and b_1 together, got no ", missing);
    check_plane({"weight_1", "a_1", "b_1"}, *weight_1, *a_1, *b_1);
    check(a_1->size(0) == a.size(0), "a_1 has ", a_1->size(0), " entries, expected ", a.size(0),
          ", as a: both planes have one size");
    check(b_1->size(0) == b.size(0), "b_1 has ", b_1->size(0), " entries, expected ", b.size(0),
          ", as b: both planes have one size");
  }
};

// A contiguous tensor of these sizes and of x's dtype, its memory as it comes. Straight from the C interface: looking
// aten::new_empty up by name takes longer than the allocation.
Tensor empty_like(const Tensor& x, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace

OnebitCall prepare_onebit(const char* op, const Tensor& x, const Tensor& X, const OnebitTensors& tensors) {
  const OnebitChecks checks{{op}};
  const auto& [weight, a, b, bias, weight_1, a_1, b_1] = tensors;
  checks.check_x(x);
  checks.check_device("x", x);
  checks.check_plane({"weight", "a", "b"}, weight, a, b);
  const int64_t in_features = b.size(0), out_features = a.size(0), dims = x.dim();
  checks.check(x.size(dims - 1) == in_features, "x has ", x.size(dims - 1),
               " features in its last dimension, the layer expects ", in_features, " (the length of b); x has shape ",
               shape_of(x));
  if (bias) checks.check_vector("bias", *bias, out_features, "one entry per output, as a");
  const bool two = weight_1 || a_1 || b_1;
  if (two) checks.check_second_plane(a, b, weight_1, a_1, b_1);

  std::vector<int64_t> sizes;
  sizes.reserve(dims);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) {
    sizes.push_back(x.size(i));
    checks.check(!__builtin_mul_overflow(rows, x.size(i), &rows), "x has more rows than 64 bits count");
  }
  sizes.push_back(out_features);

  // Outputs side by side is all the kernels need of the words; a transposed tensor is copied, slowly and rightly.
  const auto side_by_side = [](const Tensor& words) {
    return words.size(1) <= 1 || words.stride(1) == 1 ? words : torch::stable::contiguous(words);
  };
  OnebitCall call{{}, empty_like(x, sizes), side_by_side(weight), std::nullopt};
  Linear& linear = call.linear;
  linear.rows = rows;
  linear.in_features = in_features;
  linear.out_features = out_features;
  linear.x = X.const_data_ptr();
  linear.x_stride = X.is_contiguous() || dims == 1 ? in_features : X.stride(0);
  linear.dtype = *float_of(x);
  linear.y = call.y.mutable_data_ptr();
  if (bias) linear.bias = vector_of(*bias);
  const auto plane = [](const Tensor& words, const Tensor& a, const Tensor& b) {
    return Plane{static_cast<const int32_t*>(words.const_data_ptr()), words.stride(0), vector_of(a), vector_of(b)};
  };
  linear.plane[0] = plane(call.words, a, b);
  if (two) {
    call.words_1 = side_by_side(*weight_1);
    linear.planes = 2;
    linear.plane[1] = plane(*call.words_1, *a_1, *b_1);
  }
  return call;
}

Pool torch_pool() { return {static_cast<int64_t>(torch::stable::get_num_threads()), on_torch_threads}; }

namespace {

Tensor onebit_linear(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                     std::optional<Tensor> bias, std::optional<Tensor> weight_1, std::optional<Tensor> a_1,
                     std::optional<Tensor> b_1) {
  const Tensor X = in_rows(x);
  const OnebitCall call = prepare_onebit("onebit_linear", x, X, {weight, a, b, bias, weight_1, a_1, b_1});
  hf_onebit::onebit_linear(call.linear, torch_pool());
  return call.y;
}

}  // namespace
}  // namespace hf_onebit::binding

STABLE_TORCH_LIBRARY_IMPL(hf_onebit, CPU, library) {
  library.impl("onebit_linear", TORCH_BOX(&hf_onebit::binding::onebit_linear));
}
