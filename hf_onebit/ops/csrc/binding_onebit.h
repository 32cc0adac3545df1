// A layer as the operators receive it, checked and turned into pointers: shared by the operators that compute it.
#pragma once

#include "binding.h"
#include "onebit_linear.h"

namespace hf_onebit::binding {

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
