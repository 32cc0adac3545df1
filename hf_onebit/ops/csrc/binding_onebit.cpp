// torch.ops.hf_onebit.onebit_linear for the CPU, by LibTorch's stable ABI: one binary for many versions of torch and
// of Python. Nothing in here computes; it checks what Python passed and hands pointers to onebit_linear.
#include "binding.h"
#include "onebit_linear.h"

namespace {

using namespace hf_onebit::binding;

struct OnebitChecks : Checks {
  void check_plane(const std::string& suffix, const Tensor& weight, const Tensor& a, const Tensor& b) const {
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
    check_plane("_1", *weight_1, *a_1, *b_1);
    check(a_1->size(0) == a.size(0), "a_1 has ", a_1->size(0), " entries, expected ", a.size(0),
          ", as a: both planes have one size");
    check(b_1->size(0) == b.size(0), "b_1 has ", b_1->size(0), " entries, expected ", b.size(0),
          ", as b: both planes have one size");
  }
};

Tensor onebit_linear(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                     std::optional<Tensor> bias, std::optional<Tensor> weight_1, std::optional<Tensor> a_1,
                     std::optional<Tensor> b_1) {
  constexpr OnebitChecks checks{{"onebit_linear"}};
  checks.check_x(x);
  checks.check_device("x", x);
  checks.check_plane("", weight, a, b);
  const int64_t in_features = b.size(0), out_features = a.size(0), dims = x.dim();
  checks.check(x.size(dims - 1) == in_features, "x has ", x.size(dims - 1),
        " features in its last dimension, the layer expects ", in_features, " (the length of b); x has shape ",
        shape_of(x));
  if (bias) checks.check_vector("bias", *bias, out_features, "one entry per output, as a");
  const bool two = weight_1 || a_1 || b_1;
  if (two) checks.check_second_plane(a, b, weight_1, a_1, b_1);

  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) {
    sizes.push_back(x.size(i));
    checks.check(!__builtin_mul_overflow(rows, x.size(i), &rows), "x has more rows than 64 bits count");
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
