// A loop around another library's dot product, so that a comparison counts that library's work and no call from Python.
#pragma once

#include <cstddef>

#include "kernels.h"

// ggml's two functions of a weight type (ggml-cpu.h, struct ggml_type_traits_cpu).
using ForeignPrepare = void (*)(const float* x, void* prepared, int64_t n);
using ForeignDot = void (*)(int n, float* sum, size_t sum_stride, const void* weight, size_t weight_stride,
                            const void* prepared, size_t prepared_stride, int rows);

// For each of `count` weights in turn: x (batch rows of in_features floats) is prepared into `prepared`, batch rows of
// prepared_bytes; then y[r * out_features + n] is the dot product of its row r with weight row n, for begin <= n < end.
// A weight row, weight_bytes long, meets all rows of x while it is in the cache.
HF_ONEBIT_EXPORT void hf_onebit_foreign_linear(ForeignPrepare prepare, ForeignDot dot, const void* const* weights,
                                               int64_t count, int64_t weight_bytes, const float* x, int64_t batch,
                                               int64_t in_features, void* prepared, int64_t prepared_bytes, float* y,
                                               int64_t out_features, int64_t begin, int64_t end);
