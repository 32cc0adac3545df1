// y = x W' + bias and rows of W, for W[n][k] = scales[g][n] * q[n][k] - zeros[g][n], g = k / group_size
// or group_of[k].
//
// Codes q of `bits` bits: word row i * bits + w holds word w of the bit stream of inputs 32 i .. 32 i + 31 of every
// output, side by side. Code j of them takes stream bits j * bits .. j * bits + bits - 1, its lowest first.
#pragma once

#include <cstdint>

#include "linear.h"

namespace hf_onebit {

// (groups, outputs) of floats; strides count elements.
struct Statistics {
  const void* data = nullptr;
  Dtype dtype = Dtype::f16;
  int64_t group_stride = 0, output_stride = 1;

  Vector row(int64_t group, int64_t output) const {
    const int64_t offset = (group * group_stride + output * output_stride) * size_of(dtype);
    return {static_cast<const char*>(data) + offset, dtype, output_stride};
  }
};

// A packed matrix (out_features, in_features).
struct GroupMatrix {
  int64_t in_features = 0, out_features = 0;
  int64_t bits = 0, group_size = 0;  // group_size a multiple of 32
  const int32_t* weight = nullptr;
  int64_t row_stride = 0;  // words from one word row to the next
  Statistics scales;
  Statistics zeros;  // data is null where it is symmetric: then they are scales * zero_point()
  // The group of each input, in_features of them, below `groups`; null where they are neighbours.
  const int32_t* group_of = nullptr;
  int64_t groups = 0;

  float zero_point() const { return bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1)); }
};

struct MpqLinear {
  GroupMatrix matrix;
  int64_t rows = 0;
  const void* x = nullptr;   // rows of in_features neighbouring elements
  int64_t x_stride = 0;      // elements from one row to the next
  Dtype dtype = Dtype::f32;  // of x and y
  Vector bias;               // data is null where there is none
  void* y = nullptr;         // rows x out_features, contiguous
};

struct MpqEmbedding {
  GroupMatrix matrix;
  int64_t count = 0;
  const void* ids = nullptr;  // neighbouring int64 or int32, all of them rows of the matrix
  bool wide = true;           // int64
  Dtype dtype = Dtype::f32;   // of y
  void* y = nullptr;          // count x in_features, contiguous
};

// No result depends on the number of threads.
void mpq_linear(const MpqLinear& linear, const Pool& pool);
void mpq_embedding(const MpqEmbedding& embedding, const Pool& pool);

// Code j of 32, from the first of their words; words are `stride` apart.
inline uint32_t code_of(const int32_t* words, int64_t stride, int64_t bits, int64_t j) {
  const int64_t bit = j * bits, word = bit / 32, shift = bit % 32;
  uint32_t code = static_cast<uint32_t>(words[word * stride]) >> shift;
  if (shift + bits > 32) code |= static_cast<uint32_t>(words[(word + 1) * stride]) << (32 - shift);
  return code & ((1u << bits) - 1u);
}

}  // namespace hf_onebit
