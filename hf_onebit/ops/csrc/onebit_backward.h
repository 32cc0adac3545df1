// The gradients of y = sum over planes of a * (S (b * x)) with respect to x, a and b, from the packed signs.
//
// With g the gradient of y, S (out, in), and for each plane
//     z = S (b * x)      grad a = sum over rows of g * z
//     d = S^T (a * g)    grad b = sum over rows of d * x      grad x = sum over planes of b * d
#pragma once

#include <cstdint>

#include "onebit_linear.h"

namespace hf_onebit {

struct Backward {
  int64_t rows = 0, in_features = 0, out_features = 0;
  const void* grad = nullptr;  // rows of out_features neighbouring elements
  int64_t grad_stride = 0;     // elements from one row to the next
  const void* x = nullptr;     // as grad, in_features; read only for gradients of scales, may be null without
  int64_t x_stride = 0;
  Dtype dtype = Dtype::f32;  // of grad, x and grad_x
  int planes = 1;
  Plane plane[2];
  // Each is null where it is not wanted, and contiguous. Gradients of scales have the dtypes of the scales.
  void* grad_x = nullptr;
  void* grad_a[2] = {};
  void* grad_b[2] = {};
};

// As with onebit_linear, no result depends on the number of threads.
void onebit_linear_backward(const Backward& backward, const Pool& pool);

}  // namespace hf_onebit
