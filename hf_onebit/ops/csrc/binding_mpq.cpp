// torch.ops.hf_onebit.mpq_linear, mpq_linear_g_idx and mpq_embedding for the CPU, by LibTorch's stable ABI; checks
// worded as in hf_onebit/ops/schema_mpq.py and schema_mbwq.py.
#include <algorithm>

#include "binding.h"
#include "mpq_linear.h"

namespace {

using namespace hf_onebit::binding;

struct MpqChecks : Checks {
  void check_statistics(const char* name, const Tensor& statistics, int64_t groups, int64_t outputs,
                        int64_t group_size) const {
    check(float_of(statistics).has_value(), name, " must be floating point, got ", dtype_of(statistics),
          is_float8(statistics) ? "; use 16 bits or more" : "; cast it first");
    check(statistics.dim() == 2 && statistics.size(0) == groups && statistics.size(1) == outputs, name,
          " must have shape (", groups, ", ", outputs, "), one row per group of ", group_size,
          " inputs and one column per column of weight, got ", shape_of(statistics));
    check_device(name, statistics);
  }

  // The matrix; `words` holds what its weight points into. `named_groups` counts groups that inputs name, and is -1
  // where neighbours share one.
  hf_onebit::GroupMatrix check_matrix(int64_t in_features, const Tensor& weight, const Tensor& scales,
                                      const std::optional<Tensor>& zeros, int64_t bits, int64_t group_size,
                                      std::optional<Tensor>& words, int64_t named_groups = -1) const {
    check(bits >= 1 && bits <= 8, "bits must be between 1 and 8, got ", bits);
    check(group_size == -1 || (group_size >= 32 && group_size % 32 == 0),
          "group_size must be a multiple of 32, or -1 for the whole row, got ", group_size);
    check(weight.scalar_type() == ScalarType::Int, "weight must be packed codes in torch.int32, got ",
          dtype_of(weight), "; pack codes with hf_onebit.formats.packing.pack");
    check(weight.dim() == 2, "weight must have shape (ceil(in / 32) * bits, out), got ", shape_of(weight));
    check_device("weight", weight);
    // Divided first: a width near 2^63 would overflow.
    const int64_t units = in_features / 32 + (in_features % 32 != 0);
    check(weight.size(0) % bits == 0 && weight.size(0) / bits == units, "weight has ", weight.size(0),
          " word rows, expected ceil(", in_features, " / 32) * ", bits, " for ", in_features, " inputs of ", bits,
          " bits");
    const int64_t groups = named_groups >= 0  ? named_groups
                           : group_size == -1 ? std::min<int64_t>(in_features, 1)
                                              : in_features / group_size + (in_features % group_size != 0);
    check_statistics("scales", scales, groups, weight.size(1), group_size);
    if (zeros) check_statistics("zeros", *zeros, groups, weight.size(1), group_size);

    // Outputs side by side is all the kernels need of the words; a transposed tensor is copied, slowly and rightly.
    words = weight.size(1) <= 1 || weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
    const auto statistics_of = [](const Tensor& tensor) {
      return hf_onebit::Statistics{tensor.const_data_ptr(), *float_of(tensor), tensor.stride(0), tensor.stride(1)};
    };
    hf_onebit::GroupMatrix matrix;
    matrix.in_features = in_features;
    matrix.out_features = weight.size(1);
    matrix.bits = bits;
    matrix.group_size = group_size == -1 ? std::max<int64_t>(units * 32, 32) : group_size;
    matrix.weight = static_cast<const int32_t*>(words->const_data_ptr());
    matrix.row_stride = words->stride(0);
    matrix.scales = statistics_of(scales);
    if (zeros) matrix.zeros = statistics_of(*zeros);
    return matrix;
  }

  int64_t check_count(const char* name, const Tensor& tensor, int64_t dims, std::vector<int64_t>& sizes) const {
    int64_t count = 1;
    for (int64_t i = 0; i < dims; ++i) {
      sizes.push_back(tensor.size(i));
      check(!__builtin_mul_overflow(count, tensor.size(i), &count), name, " has more rows than 64 bits count");
    }
    return count;
  }
};

hf_onebit::Pool pool() { return {static_cast<int64_t>(torch::stable::get_num_threads()), on_torch_threads}; }

// The product; `linear` has its matrix.
Tensor product(const MpqChecks& checks, hf_onebit::MpqLinear& linear, const Tensor& x,
               const std::optional<Tensor>& bias) {
  const int64_t dims = x.dim(), in_features = x.size(dims - 1), out_features = linear.matrix.out_features;
  if (bias) checks.check_vector("bias", *bias, out_features, "one entry per output");

  std::vector<int64_t> sizes;
  linear.rows = checks.check_count("x", x, dims - 1, sizes);
  sizes.push_back(out_features);
  Tensor y = torch::stable::new_empty(x, sizes);

  const Tensor X = in_rows(x);
  linear.x = X.const_data_ptr();
  linear.x_stride = X.is_contiguous() || dims == 1 ? in_features : X.stride(0);
  linear.dtype = *float_of(x);
  if (bias) linear.bias = vector_of(*bias);
  linear.y = y.mutable_data_ptr();
  hf_onebit::mpq_linear(linear, pool());
  return y;
}

Tensor mpq_linear(const Tensor& x, const Tensor& weight, const Tensor& scales, std::optional<Tensor> zeros,
                  std::optional<Tensor> bias, int64_t bits, int64_t group_size) {
  constexpr MpqChecks checks{{"mpq_linear"}};
  checks.check_x(x);
  checks.check_device("x", x);
  std::optional<Tensor> words;
  hf_onebit::MpqLinear linear;
  linear.matrix = checks.check_matrix(x.size(x.dim() - 1), weight, scales, zeros, bits, group_size, words);
  return product(checks, linear, x, bias);
}

Tensor mpq_linear_g_idx(const Tensor& x, const Tensor& weight, const Tensor& scales, std::optional<Tensor> zeros,
                        std::optional<Tensor> bias, const Tensor& g_idx, int64_t bits) {
  constexpr MpqChecks checks{{"mpq_linear_g_idx"}};
  checks.check_x(x);
  checks.check_device("x", x);
  const int64_t in_features = x.size(x.dim() - 1), groups = scales.dim() == 2 ? scales.size(0) : 0;
  std::optional<Tensor> words;
  hf_onebit::MpqLinear linear;
  linear.matrix = checks.check_matrix(in_features, weight, scales, zeros, bits, -1, words, groups);

  const bool wide = g_idx.scalar_type() == ScalarType::Long;
  checks.check(wide || g_idx.scalar_type() == ScalarType::Int, "g_idx must be torch.int32 or torch.int64, got ",
               dtype_of(g_idx));
  checks.check(g_idx.dim() == 1 && g_idx.size(0) == in_features, "g_idx must have shape (", in_features,
               ",), one entry per input, got ", shape_of(g_idx));
  checks.check_device("g_idx", g_idx);
  const Tensor index = torch::stable::contiguous(g_idx);
  std::vector<int32_t> group_of(in_features);
  for (int64_t k = 0; k < in_features; ++k) {
    const int64_t group = wide ? static_cast<const int64_t*>(index.const_data_ptr())[k]
                               : static_cast<const int32_t*>(index.const_data_ptr())[k];
    checks.check(group >= 0 && group < groups, "g_idx has ", group, ", expected 0..", groups - 1);
    group_of[k] = static_cast<int32_t>(group);
  }
  linear.matrix.group_of = group_of.data();
  linear.matrix.groups = groups;
  return product(checks, linear, x, bias);
}

template <typename Id>
void check_ids(const MpqChecks& checks, const Id* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    checks.check(ids[i] >= 0 && ids[i] < rows, "index ", ids[i], " is out of range, ids must lie in 0..", rows - 1);
  }
}

Tensor mpq_embedding(const Tensor& ids, const Tensor& weight, const Tensor& scales, std::optional<Tensor> zeros,
                     int64_t bits, int64_t group_size, int64_t embedding_dim, ScalarType dtype) {
  constexpr MpqChecks checks{{"mpq_embedding"}};
  const bool wide = ids.scalar_type() == ScalarType::Long;
  checks.check(wide || ids.scalar_type() == ScalarType::Int, "ids must be torch.int32 or torch.int64, got ",
               dtype_of(ids));
  checks.check(embedding_dim >= 0, "embedding_dim must not be negative, got ", embedding_dim);
  checks.check_device("ids", ids);
  std::optional<Tensor> words;
  hf_onebit::MpqEmbedding embedding;
  embedding.matrix = checks.check_matrix(embedding_dim, weight, scales, zeros, bits, group_size, words);

  std::vector<int64_t> sizes;
  embedding.count = checks.check_count("ids", ids, ids.dim(), sizes);
  sizes.push_back(embedding_dim);
  Tensor y = torch::stable::new_empty(scales, sizes, dtype);
  checks.check(float_of(y).has_value(), "dtype must be float16, bfloat16, float32 or float64, got ", dtype_of(y));

  const Tensor numbers = torch::stable::contiguous(ids);
  embedding.ids = numbers.const_data_ptr();
  embedding.wide = wide;
  const int64_t rows = embedding.matrix.out_features;
  if (wide) {
    check_ids(checks, static_cast<const int64_t*>(embedding.ids), embedding.count, rows);
  } else {
    check_ids(checks, static_cast<const int32_t*>(embedding.ids), embedding.count, rows);
  }
  embedding.dtype = *float_of(y);
  embedding.y = y.mutable_data_ptr();
  hf_onebit::mpq_embedding(embedding, pool());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_onebit, CPU, library) {
  library.impl("mpq_linear", TORCH_BOX(&mpq_linear));
  library.impl("mpq_linear_g_idx", TORCH_BOX(&mpq_linear_g_idx));
  library.impl("mpq_embedding", TORCH_BOX(&mpq_embedding));
}
