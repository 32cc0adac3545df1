// What the kernels of all operators are told: dtypes, vectors, and whose threads to use.
//
// This header and everything behind it know no torch: pointers, sizes and ranges of outputs. Only the files named
// binding see tensors.
#pragma once

#include <cstdint>

namespace hf_onebit {

enum class Dtype { f16, bf16, f32, f64 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Any vector of floats; `stride` counts elements.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride = 1;
};

// Somebody else's thread pool: calls body(begin, end, context) until 0 .. count is covered, at once or one by one.
using Body = void (*)(int64_t begin, int64_t end, void* context);
struct Pool {
  int64_t threads = 1;
  void (*run)(int64_t count, Body body, void* context) = nullptr;
};

}  // namespace hf_onebit
