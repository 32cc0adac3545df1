// torch.ops.hf_onebit.onebit_linear for the CPU, by LibTorch's stable ABI: one binary for many versions of torch and
// of Python. Nothing in here computes; it checks what Python passed and hands pointers to onebit_linear.
#include "binding_onebit.h"

#include <algorithm>
#include <array>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace hf_onebit::binding {
namespace {

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
  const bool two = checks.check_layer(x, weight, a, b, bias, weight_1, a_1, b_1);
  const int64_t in_features = b.size(0), out_features = a.size(0);
  std::vector<int64_t> sizes;
  sizes.reserve(x.dim());
  const int64_t rows = checks.rows_of(x, out_features, sizes);

  OnebitCall call{{}, empty_like(x, sizes), side_by_side(weight), std::nullopt};
  Linear& linear = call.linear;
  linear.rows = rows;
  linear.in_features = in_features;
  linear.out_features = out_features;
  linear.x = X.const_data_ptr();
  linear.x_stride = row_stride_of(X);
  linear.dtype = *float_of(x);
  linear.y = call.y.mutable_data_ptr();
  if (bias) linear.bias = vector_of(*bias);
  linear.plane[0] = plane_of(call.words, a, b);
  if (two) {
    call.words_1 = side_by_side(*weight_1);
    linear.planes = 2;
    linear.plane[1] = plane_of(*call.words_1, *a_1, *b_1);
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
