// What one instruction set provides for group-quantized weights, and how signs' tables serve them.
//
// A code of b bits is q = sum of 2^i bit_i, so q - m = 1/2 sum of 2^i s_i with m = (2^b - 1) / 2 and signs s_i = +-1: a
// product with codes is one with signs, if input k is repeated b times as 2^i x_k / 2. The nibble tables of kernels.h
// then serve every width, also those whose codes straddle words.
//
// Rounding, for float32 x and few rows: the repeated inputs are exact; 2 roundings in the tables, 3 in the tree, 7 over
// the words of a block, 3 in scale and offset; blocks meet in float64. So
// |y - y64| <= 1e-6 * sum_k (|s| m + |z - s m|) |x_k|. Many rows: see multiply.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hf_onebit {

constexpr int64_t TILE_OUTPUTS = 64;  // of an expanded tile of W

// At most BLOCK_WORDS word rows of one group.
struct GroupBlock {
  const int32_t* weight;
  int64_t row_stride, words, outputs;
  const float* scales;  // outputs, padded to LANES
  const float* zeros;   // as scales; null where symmetric
  float middle;         // m
  // sum of x over the block, for each row; where symmetric times (zero point - m), for `dot` times the zero point
  const float* sums;
};

struct MpqKernels {
  const Kernels* base;  // its tables are the ones `accumulate` reads

  // y[r][n] += scale * (table sums - sums[r]), or scale * table sums - (zero - scale * m) * sums[r] where there are
  // zeros. Row r's tables start at tables + r * BLOCK_WORDS * NIBBLES * TABLE; y past `outputs`, up to the next
  // multiple of LANES, may be written.
  void (*accumulate)(const GroupBlock& block, const float* tables, int64_t rows, double* y, int64_t y_stride);

  // W[k][n] for 32 inputs, TILE_OUTPUTS outputs, in float32: scale * q - zero, or scale * (q - zero_point). Outputs
  // past `outputs` are zero. With `at`, the scales and zeros of input k begin at[k] numbers on.
  void (*expand)(const int32_t* weight, int64_t row_stride, int64_t bits, int64_t outputs, const float* scales,
                 const float* zeros, float zero_point, const int64_t* at, float* W);

  // y[r][n] += sum over `inputs` of x[r][k] W[k][n], TILE_OUTPUTS outputs, for any number of rows.
  void (*multiply)(const float* x, int64_t x_stride, int64_t rows, const float* W, int64_t inputs, double* y,
                   int64_t y_stride);

  // Where there are byte products, for 4 and 8 bits; null elsewhere. The digits of one row's block of x, as `dot`
  // reads them, `inputs` numbers, at most DIGIT_ROOM; returns what their last place is worth. NaN if x is not finite.
  float (*split)(const float* x, int64_t inputs, int64_t bits, int32_t* digits) = nullptr;

  // As accumulate, from codes instead of signs: y[r][n] += scale * (sum of q x) - zero * sums[r], or scale * (sum of
  // q x - sums[r]). Row r's digits start at digits + r * DIGIT_ROOM.
  void (*dot)(const GroupBlock& block, int64_t bits, const int32_t* digits, const float* steps, int64_t rows,
              double* y, int64_t y_stride) = nullptr;

  bool dots(int64_t bits) const { return dot && (bits == 4 || bits == 8); }
};

constexpr int64_t DIGIT_ROOM = BLOCK_WORDS * WORD / 4;  // inputs of a block of 4 bits, the most there are

extern const MpqKernels scalar_mpq_kernels;
#ifdef HF_ONEBIT_X86
extern const MpqKernels avx2_mpq_kernels;
extern const MpqKernels avx512_mpq_kernels;
const MpqKernels* vnni_mpq_kernels();  // null where there is no such instruction
#endif

// Those that go with the instruction set in use.
const MpqKernels& mpq_kernels();

}  // namespace hf_onebit
