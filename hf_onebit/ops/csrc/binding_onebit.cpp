// torch.ops.hf_onebit.onebit_linear for the CPU, by LibTorch's stable ABI: one binary for many versions of torch and
// of Python. Nothing in here computes; it checks what Python passed and hands pointers to onebit_linear.
#include "binding_onebit.h"

namespace {

using namespace hf_onebit::binding;

Tensor onebit_linear(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                     std::optional<Tensor> bias, std::optional<Tensor> weight_1, std::optional<Tensor> a_1,
                     std::optional<Tensor> b_1) {
  constexpr OnebitChecks checks{{"onebit_linear"}};
  const bool two = checks.check_layer(x, weight, a, b, bias, weight_1, a_1, b_1);
  const int64_t in_features = b.size(0), out_features = a.size(0);

  std::vector<int64_t> sizes;
  const int64_t rows = checks.rows_of(x, out_features, sizes);
  Tensor y = torch::stable::new_empty(x, sizes);

  const Tensor X = in_rows(x);
  hf_onebit::Linear linear;
  linear.rows = rows;
  linear.in_features = in_features;
  linear.out_features = out_features;
  linear.x = X.const_data_ptr();
  linear.x_stride = row_stride_of(X);
  linear.dtype = *float_of(x);
  linear.y = y.mutable_data_ptr();
  if (bias) linear.bias = vector_of(*bias);

  const Tensor words = side_by_side(weight);
  const Tensor words_1 = two ? side_by_side(*weight_1) : words;
  linear.plane[0] = plane_of(words, a, b);
  if (two) {
    linear.planes = 2;
    linear.plane[1] = plane_of(words_1, *a_1, *b_1);
  }
  hf_onebit::onebit_linear(linear, {static_cast<int64_t>(torch::stable::get_num_threads()), on_torch_threads});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_onebit, CPU, library) { library.impl("onebit_linear", TORCH_BOX(&onebit_linear)); }
