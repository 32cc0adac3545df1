// torch.ops.hf_onebit.onebit_linear_group for the CPU: several layers of one x, one entry from Python and, for a single
// row, one wake-up of the threads for all of them.
#include <algorithm>

#include "binding_onebit.h"

namespace hf_onebit::binding {
namespace {

constexpr int64_t UNIT = 64;          // outputs: the pieces of a layer begin at multiples of it
constexpr double SERIAL = 1 << 20;    // fewer multiplications than this are done before a second thread has woken

// The layers' outputs in a row, cut into one piece of about equal work for each thread. Every output is summed by one
// thread in an order that follows from in_features alone, so cutting changes no bit.
struct Group {
  const std::vector<OnebitCall>& calls;
  std::vector<int64_t> first;  // of each layer, in units; then the total
  int64_t pieces;
};

int64_t units(const Linear& linear) { return (linear.out_features + UNIT - 1) / UNIT; }

void skip(Vector& vector, int64_t elements) {
  if (vector.data) {
    vector.data = static_cast<const char*>(vector.data) + elements * vector.stride * size_of(vector.dtype);
  }
}

// Outputs begin .. end of a layer with a single row, whose outputs are neighbours whatever their number.
Linear part_of(const Linear& whole, int64_t begin, int64_t end) {
  Linear part = whole;
  part.out_features = end - begin;
  part.y = static_cast<char*>(whole.y) + begin * size_of(whole.dtype);
  skip(part.bias, begin);
  for (int p = 0; p < whole.planes; ++p) {
    part.plane[p].weight += begin;
    skip(part.plane[p].a, begin);
  }
  return part;
}

void compute_pieces(int64_t begin, int64_t end, void* context) {
  const Group& group = *static_cast<const Group*>(context);
  const int64_t total = group.first.back();
  const int64_t from = total * begin / group.pieces, to = total * end / group.pieces;
  for (size_t i = 0; i < group.calls.size(); ++i) {
    const Linear& linear = group.calls[i].linear;
    const int64_t low = std::max(from, group.first[i]), high = std::min(to, group.first[i + 1]);
    if (low >= high) continue;
    const int64_t first = (low - group.first[i]) * UNIT;
    const int64_t last = std::min((high - group.first[i]) * UNIT, linear.out_features);
    hf_onebit::onebit_linear(part_of(linear, first, last), {1, nullptr});
  }
}

std::vector<Tensor> onebit_linear_group(const Tensor& x, const std::vector<Tensor>& weight,
                                        const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                        const std::optional<std::vector<Tensor>>& bias,
                                        const std::optional<std::vector<Tensor>>& weight_1,
                                        const std::optional<std::vector<Tensor>>& a_1,
                                        const std::optional<std::vector<Tensor>>& b_1) {
  constexpr Checks checks{"onebit_linear_group"};
  const size_t layers = weight.size();
  checks.check(layers > 0, "weight is empty, expected one tensor for each layer");
  const auto check_length = [&](const char* name, size_t length) {
    checks.check(length == layers, name, " has ", length, " tensors, expected ", layers, ", one for each of weight");
  };
  check_length("a", a.size());
  check_length("b", b.size());
  if (bias) check_length("bias", bias->size());
  if (weight_1) check_length("weight_1", weight_1->size());
  if (a_1) check_length("a_1", a_1->size());
  if (b_1) check_length("b_1", b_1->size());

  checks.check_x(x);
  const Tensor X = in_rows(x);
  std::vector<OnebitCall> calls;
  calls.reserve(layers);
  Group group{calls, {0}, 1};
  double work = 0;
  const auto entry = [](const std::optional<std::vector<Tensor>>& list, size_t i) {
    return list ? std::optional<Tensor>((*list)[i]) : std::nullopt;
  };
  for (size_t i = 0; i < layers; ++i) {
    const auto bias_i = entry(bias, i), weight_1_i = entry(weight_1, i), a_1_i = entry(a_1, i), b_1_i = entry(b_1, i);
    const OnebitTensors tensors{weight[i], a[i], b[i], bias_i, weight_1_i, a_1_i, b_1_i};
    calls.push_back(prepare_onebit(checks.op, x, X, tensors));
    const Linear& linear = calls.back().linear;
    group.first.push_back(group.first.back() + units(linear));
    work += static_cast<double>(linear.rows) * linear.in_features * linear.out_features * linear.planes;
  }

  const Pool pool = torch_pool();
  const bool one_row = calls[0].linear.rows == 1;
  if (one_row && pool.threads > 1 && work >= SERIAL) {
    group.pieces = std::max<int64_t>(std::min(pool.threads, group.first.back()), 1);
    pool.run(group.pieces, compute_pieces, &group);
  } else {
    for (const OnebitCall& call : calls) hf_onebit::onebit_linear(call.linear, pool);
  }
  std::vector<Tensor> results;
  results.reserve(layers);
  for (OnebitCall& call : calls) results.push_back(std::move(call.y));
  return results;
}

}  // namespace
}  // namespace hf_onebit::binding

STABLE_TORCH_LIBRARY_IMPL(hf_onebit, CPU, library) {
  library.impl("onebit_linear_group", TORCH_BOX(&hf_onebit::binding::onebit_linear_group));
}
