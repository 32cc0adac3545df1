// A layer as the operators receive it, checked and turned into pointers: shared by the operators that compute it.
#pragma once

#include <array>

#include "binding.h"
#include "onebit_linear.h"

namespace hf_onebit::binding {

// What an output scale is, said of the words it belongs to.
struct PerColumn {
  const char* words;
};
inline std::ostream& operator<<(std::ostream& out, const PerColumn& meaning) {
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

  // All that schema.check_onebit_linear checks; whether there is a second plane.
  bool check_layer(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& weight_1,
                   const std::optional<Tensor>& a_1, const std::optional<Tensor>& b_1) const {
    check_x(x);
    check_device("x", x);
    check_plane({"weight", "a", "b"}, weight, a, b);
    const int64_t last = x.dim() - 1;
    check(x.size(last) == b.size(0), "x has ", x.size(last), " features in its last dimension, the layer expects ",
          b.size(0), " (the length of b); x has shape ", shape_of(x));
    if (bias) check_vector("bias", *bias, a.size(0), "one entry per output, as a");
    const bool two = weight_1 || a_1 || b_1;
    if (two) check_second_plane(a, b, weight_1, a_1, b_1);
    return two;
  }

  // The number of rows of x, and the sizes of a tensor with `features` in place of x's last dimension.
  int64_t rows_of(const Tensor& x, int64_t features, std::vector<int64_t>& sizes) const {
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
      sizes.push_back(x.size(i));
      check(!__builtin_mul_overflow(rows, x.size(i), &rows), "x has more rows than 64 bits count");
    }
    sizes.push_back(features);
    return rows;
  }
};

// Outputs side by side is all the kernels need of the words; a transposed tensor is copied, slowly and rightly.
inline Tensor side_by_side(const Tensor& words) {
  return words.size(1) <= 1 || words.stride(1) == 1 ? words : torch::stable::contiguous(words);
}

inline hf_onebit::Plane plane_of(const Tensor& words, const Tensor& a, const Tensor& b) {
  return {static_cast<const int32_t*>(words.const_data_ptr()), words.stride(0), vector_of(a), vector_of(b)};
}

// Elements from one row of what in_rows returned to the next.
inline int64_t row_stride_of(const Tensor& X) {
  const int64_t last = X.dim() - 1;
  return X.is_contiguous() || last == 0 ? X.size(last) : X.stride(0);
}

struct OnebitTensors {
  const Tensor &weight, &a, &b;
  const std::optional<Tensor> &bias, &weight_1, &a_1, &b_1;
};

// What to compute, where the result goes, and the tensors that the pointers point into.
struct OnebitCall {
  Linear linear;
  Tensor y;
  Tensor words;
  std::optional<Tensor> words_1;
};

// Throws what is wrong, beginning with `op`. X is in_rows(x), and must outlive the call as the tensors must.
OnebitCall prepare_onebit(const char* op, const Tensor& x, const Tensor& X, const OnebitTensors& tensors);

// Torch's own threads, as many as it would use now.
Pool torch_pool();

}  // namespace hf_onebit::binding
