// torch.ops.hf_onebit.packed_step for the CPU, by LibTorch's stable ABI; checks worded as in hf_onebit/ops/schema_update.py.
#include <algorithm>

#include "binding.h"
#include "packed_step.h"

namespace {

using namespace hf_onebit::binding;
using hf_onebit::PackedStep;

struct StepChecks : Checks {
  // A matrix that is read or changed where it is.
  void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) const {
    check(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must have shape (", rows,
          ", ", columns, "), got ", shape_of(tensor));
    check(columns <= 1 || tensor.stride(1) == 1, name,
          " must have its columns side by side in memory, got a transposed or sliced tensor; make it contiguous");
    check(tensor.is_cpu(), name, " must be on the device of words, cpu");
  }

  void check_vector(const char* name, const Tensor& tensor, int64_t size) const {
    check(tensor.dim() == 1 && tensor.size(0) == size, name, " must have shape (", size, ",), got ", shape_of(tensor));
    check(tensor.is_cpu(), name, " must be on the device of words, cpu");
  }

  hf_onebit::Moment moment(const char* name, const std::optional<Tensor>& values, const std::optional<Tensor>& peaks,
                           int64_t rows, int64_t columns, int lane, bool factors) const {
    hf_onebit::Moment found;
    check(values || !peaks, name, "_peaks came without ", name);
    if (!values) return found;
    found.lane = lane;
    found.values = values->mutable_data_ptr();
    const bool is_signed = values->scalar_type() == ScalarType::Char;
    if (factors && values->dim() == 1) {
      check_vector(name, *values, rows);
      check(values->scalar_type() == ScalarType::Float && values->is_contiguous(), name,
            " of one number a row must be torch.float32, got ", dtype_of(*values));
      check(peaks.has_value(), name, " of one number a row needs ", name, "_peaks, one a column");
      check_vector((std::string(name) + "_peaks").c_str(), *peaks, columns);
      check(peaks->scalar_type() == ScalarType::Float && peaks->is_contiguous(), name,
            "_peaks must be torch.float32, got ", dtype_of(*peaks));
      found.kind = hf_onebit::Moment::factors;
      found.peaks = static_cast<float*>(peaks->mutable_data_ptr());
      return found;
    }
    check_matrix(name, *values, rows, columns);
    found.stride = values->stride(0);
    if (!is_signed && values->scalar_type() != ScalarType::Byte) {
      check(values->scalar_type() == ScalarType::Float, name,
            " must be torch.float32, or torch.int8 or torch.uint8 with peaks, got ", dtype_of(*values));
      check(!peaks, name, "_peaks belong to a moment in eight bits, got torch.float32");
      found.kind = hf_onebit::Moment::f32;
      return found;
    }
    check(peaks.has_value(), name, " in eight bits needs ", name, "_peaks");
    check_matrix((std::string(name) + "_peaks").c_str(), *peaks, (rows + hf_onebit::BLOCK - 1) / hf_onebit::BLOCK,
                 columns);
    check(peaks->scalar_type() == ScalarType::Float, name, "_peaks must be torch.float32, got ", dtype_of(*peaks));
    found.kind = is_signed ? hf_onebit::Moment::signed8 : hf_onebit::Moment::unsigned8;
    found.peaks = static_cast<float*>(peaks->mutable_data_ptr());
    found.peaks_stride = peaks->stride(0);
    return found;
  }

  hf_onebit::Statistics statistics(const char* name, const Tensor& tensor, int64_t groups, int64_t columns) const {
    check(float_of(tensor).has_value(), name, " must be floating point, got ", dtype_of(tensor), "; cast it first");
    check(tensor.dim() == 2 && tensor.size(0) == groups && tensor.size(1) == columns, name, " must have shape (",
          groups, ", ", columns, "), got ", shape_of(tensor));
    check(tensor.is_cpu(), name, " must be on the device of words, cpu");
    return {tensor.const_data_ptr(), *float_of(tensor), tensor.stride(0), tensor.stride(1)};
  }

  std::vector<hf_onebit::CodeBlock> code_blocks(const std::vector<int64_t>& flat, int64_t in_features,
                                                int64_t words) const {
    check(!flat.empty() && flat.size() % 3 == 0, "blocks must hold bits, rows and word rows of each block, got ",
          flat.size(), " numbers");
    std::vector<hf_onebit::CodeBlock> blocks;
    int64_t row = 0, word = 0;
    for (size_t i = 0; i < flat.size(); i += 3) {
      const int64_t bits = flat[i], rows = flat[i + 1], held = flat[i + 2];
      check(bits >= 1 && bits <= 8, "bits must be between 1 and 8, got ", bits);
      check(rows >= 0 && rows <= in_features - row && held >= 0 && held <= words - word,
            "blocks reach beyond ", in_features, " rows or ", words, " word rows");
      const int64_t whole = (rows + 31) / 32 * bits;
      check(held == whole || (rows * bits % 32 == 0 && held == rows * bits / 32), "a block of ", rows, " rows of ",
            bits, " bits takes ", whole, " word rows, got ", held);
      blocks.push_back({bits, rows, held, row, word});
      row += rows;
      word += held;
    }
    check(row == in_features && word == words, "blocks have ", row, " rows and ", word, " word rows, expected ",
          in_features, " and ", words);
    return blocks;
  }
};

int64_t entry(const Tensor& index, int64_t i) { return static_cast<const int64_t*>(index.const_data_ptr())[i]; }

void set_order(const StepChecks& checks, const Tensor& group, const std::optional<Tensor>& perm, PackedStep& step) {
  const int64_t rows = step.in_features;
  checks.check_vector("group", group, rows);
  checks.check(group.scalar_type() == ScalarType::Long, "group must be torch.int64, got ", dtype_of(group));
  const Tensor groups = torch::stable::contiguous(group);
  step.group.resize(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t g = entry(groups, r);
    checks.check(g >= 0 && g < step.groups, "group has ", g, ", expected 0..", step.groups - 1);
    step.group[static_cast<size_t>(r)] = static_cast<int32_t>(g);
  }
  if (!perm) return;
  checks.check_vector("perm", *perm, rows);
  checks.check(perm->scalar_type() == ScalarType::Long, "perm must be torch.int64, got ", dtype_of(*perm));
  const Tensor order = torch::stable::contiguous(*perm);
  step.perm.resize(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t k = entry(order, r);
    checks.check(k >= 0 && k < rows, "perm has ", k, ", expected 0..", rows - 1);
    step.perm[static_cast<size_t>(r)] = k;
  }
}

Tensor packed_step(const Tensor& words, const Tensor& gradient, std::optional<Tensor> exp_avg_l,
                   std::optional<Tensor> exp_avg_l_peaks, std::optional<Tensor> exp_avg_s,
                   std::optional<Tensor> exp_avg_s_peaks, const Tensor& scales, std::optional<Tensor> zeros,
                   std::optional<Tensor> input_scales, const Tensor& group, std::optional<Tensor> perm,
                   std::vector<int64_t> blocks, std::string rounding, double lr, double eta, double weight_decay,
                   double beta1, double beta2, double eps, double inertia, int64_t seed, int64_t stream, int64_t count,
                   int64_t column, bool is_direction) {
  constexpr StepChecks checks{{"packed_step"}};
  checks.check(words.scalar_type() == ScalarType::Int, "words must be torch.int32, got ", dtype_of(words));
  checks.check(words.dim() == 2 && gradient.dim() == 2,
               "words and gradient must have two dimensions, (word rows, out) and (in, out), got ", shape_of(words),
               " and ", shape_of(gradient));
  PackedStep step;
  step.in_features = gradient.size(0);
  step.columns = gradient.size(1);
  checks.check_matrix("words", words, words.size(0), step.columns);
  checks.check_matrix("gradient", gradient, step.in_features, step.columns);
  checks.check(float_of(gradient).has_value(), "gradient must be float16, bfloat16, float32 or float64, got ",
               dtype_of(gradient));
  step.blocks = checks.code_blocks(blocks, step.in_features, words.size(0));
  checks.check(rounding == "nearest" || rounding == "stochastic" || rounding == "inertia",
               "rounding must be nearest, stochastic or inertia, got ", rounding);
  const bool flips = rounding == "inertia";
  step.rounding = flips ? PackedStep::inertia : rounding == "nearest" ? PackedStep::nearest : PackedStep::stochastic;
  checks.check(!flips || (step.blocks.size() == 1 && step.blocks[0].bits == 1),
               "rounding inertia flips codes of one bit, got blocks of other widths");
  step.words = static_cast<int32_t*>(words.mutable_data_ptr());
  step.words_stride = words.stride(0);
  step.gradient = gradient.const_data_ptr();
  step.dtype = *float_of(gradient);
  step.gradient_stride = gradient.stride(0);
  step.is_direction = is_direction;
  step.first = checks.moment("exp_avg_l", exp_avg_l, exp_avg_l_peaks, step.in_features, step.columns, 0, false);
  step.second = checks.moment("exp_avg_s", exp_avg_s, exp_avg_s_peaks, step.in_features, step.columns, 1, !flips);
  step.groups = scales.dim() == 2 ? scales.size(0) : 0;
  step.scales = checks.statistics("scales", scales, step.groups, step.columns);
  if (zeros) step.zeros = checks.statistics("zeros", *zeros, step.groups, step.columns);
  if (input_scales) {
    checks.check_vector("input_scales", *input_scales, step.in_features);
    checks.check(float_of(*input_scales).has_value(), "input_scales must be floating point, got ",
                 dtype_of(*input_scales), "; cast it first");
    step.input_scales = vector_of(*input_scales);
  }
  set_order(checks, group, perm, step);
  step.lr = lr;
  step.eta = eta;
  step.weight_decay = weight_decay;
  step.beta1 = beta1;
  step.beta2 = beta2;
  step.eps = eps;
  step.start = inertia;
  step.seed = static_cast<uint64_t>(seed);
  step.stream = static_cast<uint32_t>(stream);
  step.count = static_cast<uint32_t>(count);
  step.column = column;

  Tensor sums = torch::stable::new_empty(gradient, {5}, ScalarType::Double);
  const hf_onebit::Pool pool{static_cast<int64_t>(torch::stable::get_num_threads()), on_torch_threads};
  const hf_onebit::Tally tally = hf_onebit::packed_step(step, pool);
  std::copy(std::begin(tally.sums), std::end(tally.sums), static_cast<double*>(sums.mutable_data_ptr()));
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_onebit, CPU, library) { library.impl("packed_step", TORCH_BOX(&packed_step)); }
