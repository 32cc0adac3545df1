// y = sum over planes of a * (S (b * x)) + bias, S a matrix of signs packed 32 to a word.
//
// Words: row i of `weight` holds inputs 32 i .. 32 i + 31 of every output, side by side; bit j of a word is the
// sign of input 32 i + j, 1 meaning +1. A register of neighbouring words is thus one input block of neighbouring
// outputs, and is used as it lies in memory.
#pragma once

#include <cstdint>

#include "linear.h"

namespace hf_onebit {

struct Plane {
  const int32_t* weight = nullptr;
  int64_t row_stride = 0;  // words from one input block to the next
  Vector a;                // out_features
  Vector b;                // in_features
};

struct Linear {
  int64_t rows = 0, in_features = 0, out_features = 0;
  const void* x = nullptr;  // rows of in_features neighbouring elements
  int64_t x_stride = 0;     // elements from one row to the next
  Dtype dtype = Dtype::f32;  // of x and y
  int planes = 1;
  Plane plane[2];
  Vector bias;        // data is null where there is none
  void* y = nullptr;  // rows x out_features, contiguous
  bool y_float32 = false;  // y is float32, unless x is float64
  bool exact = false;      // also where int8 activations were asked for

  Dtype y_dtype() const { return y_float32 && dtype != Dtype::f64 ? Dtype::f32 : dtype; }
};

// No result depends on the number of threads, nor one row's on the other rows: every output is summed by one
// thread, in an order that follows from in_features alone.
void onebit_linear(const Linear& linear, const Pool& pool);

}  // namespace hf_onebit
