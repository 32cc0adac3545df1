// torch.ops.hf_onebit.onebit_linear_backward for the CPU, by LibTorch's stable ABI. Nothing in here computes.
#include <tuple>

#include "binding_onebit.h"
#include "onebit_backward.h"

namespace {

using namespace hf_onebit::binding;

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The forward's checks are made in its name, as everywhere.
void check(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
           const std::optional<Tensor>& weight_1, const std::optional<Tensor>& a_1, const std::optional<Tensor>& b_1,
           const std::vector<bool>& needs, const std::vector<int64_t>& sizes) {
  constexpr Checks checks{"onebit_linear_backward"};
  std::ostringstream expected;
  expected << "(";
  for (size_t i = 0; i < sizes.size(); ++i) expected << (i ? ", " : "") << sizes[i];
  expected << (sizes.size() == 1 ? ",)" : ")");
  bool same = grad.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = grad.size(static_cast<int64_t>(i)) == sizes[i];
  checks.check(same, "grad must have shape ", expected.str(), ", got ", shape_of(grad));
  checks.check(grad.scalar_type() == x.scalar_type(), "grad must have x's dtype ", dtype_of(x), ", got ",
               dtype_of(grad));
  checks.check_device("grad", grad);
  checks.check(needs.size() == 5, "needs must have 5 entries (x, a, b, a_1, b_1), got ", needs.size());
  checks.check(weight_1.has_value() || !(needs[3] || needs[4]),
               "needs asks for gradients of a_1 or b_1, but there is no second plane");
}

Gradients onebit_linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& a,
                                 const Tensor& b, std::optional<Tensor> weight_1, std::optional<Tensor> a_1,
                                 std::optional<Tensor> b_1, std::vector<bool> needs) {
  constexpr OnebitChecks layer{{"onebit_linear"}};
  std::vector<int64_t> sizes;
  const bool two = layer.check_layer(x, weight, a, b, std::nullopt, weight_1, a_1, b_1);
  const int64_t rows = layer.rows_of(x, a.size(0), sizes);
  check(grad, x, weight, a, b, weight_1, a_1, b_1, needs, sizes);

  hf_onebit::Backward backward;
  backward.rows = rows;
  backward.in_features = b.size(0);
  backward.out_features = a.size(0);
  backward.dtype = *float_of(x);
  const Tensor G = in_rows(grad);
  backward.grad = G.const_data_ptr();
  backward.grad_stride = row_stride_of(G);
  // Without gradients of scales x may be a stand-in of strides 0, which must not be copied.
  const Tensor X = needs[1] || needs[2] || needs[3] || needs[4] ? in_rows(x) : x;
  backward.x = X.const_data_ptr();
  backward.x_stride = row_stride_of(X);
  const Tensor words = side_by_side(weight);
  const Tensor words_1 = two ? side_by_side(*weight_1) : words;
  backward.plane[0] = plane_of(words, a, b);
  if (two) {
    backward.planes = 2;
    backward.plane[1] = plane_of(words_1, *a_1, *b_1);
  }

  const auto output = [](bool needed, const Tensor& like, const std::vector<int64_t>& shape, const Tensor& otherwise,
                         void*& data) {
    const Tensor made = needed ? torch::stable::new_empty(like, shape) : torch::stable::new_empty(otherwise, {0});
    if (needed) data = made.mutable_data_ptr();
    return made;
  };
  sizes.back() = backward.in_features;
  const std::vector<int64_t> ins = {backward.in_features}, outs = {backward.out_features};
  Gradients gradients = {
      output(needs[0], x, sizes, x, backward.grad_x),
      output(needs[1], a, outs, x, backward.grad_a[0]),
      output(needs[2], b, ins, x, backward.grad_b[0]),
      output(needs[3], two ? *a_1 : a, outs, x, backward.grad_a[1]),
      output(needs[4], two ? *b_1 : b, ins, x, backward.grad_b[1]),
  };
  const hf_onebit::Pool pool = {static_cast<int64_t>(torch::stable::get_num_threads()), on_torch_threads};
  hf_onebit::onebit_linear_backward(backward, pool);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_onebit, CPU, library) {
  library.impl("onebit_linear_backward", TORCH_BOX(&onebit_linear_backward));
}
