// Products of many rows with group-quantized weights by units that multiply tiles of bfloat16 (AMX).
//
// No digit is lost on the way in: q - zero_point is an integer of at most eight bits, which bfloat16 holds exactly, and
// x is one, two or three bfloat16 numbers that add up to it (bfloat16, float16 or float32 x). Scales and zeros stay outside
// of the product:
//
//   y[r][n] = bias[n] + sum over pieces g of scale[g][n] * (sum of x[r][k] (q[n][k] - zero_point)) - offset[g][n] * (sum of
//   x[r][k]), offset = zero - scale * zero_point.
//
// A piece is at most BLOCK_STEPS steps of 32 inputs of one group. Rounding, all in float32: up to 17 + 8 in a tile's sum of
// products, 4 over the pieces of a batch (8 with zeros), one for each batch, of 128 inputs or more, and scale and offset.
// So |y - y64| <= (32 + in / 128) 2^-24 * sum_k (|s| |q - zero_point| + |z - s zero_point|) |x_k|, before y is rounded.
#pragma once

#include <cstdint>

#include "mpq_linear.h"

namespace hf_onebit {

constexpr int64_t STEP = 32;           // inputs of a tile
constexpr int64_t BLOCK_STEPS = 8;     // of a panel: what is expanded at once, 16 KiB
constexpr int64_t PIECES = 8;          // in a block, at most: one a step
constexpr int64_t GROUP_ROWS = 32;     // rows of x that are multiplied at once, two tiles
constexpr int64_t TILE_OUTPUTS_2 = 32; // outputs of a panel, two tiles
constexpr int64_t HALVES = 16 * STEP;  // bfloat16 numbers in a tile
constexpr int64_t MOST_TERMS = 3;

// All groups of rows by one panel. A group has two tiles of 16 rows; the last has one where it has no more rows.
struct TileProduct {
  const uint16_t* x = nullptr;      // of each group: all steps x terms x tiles x HALVES
  int64_t x_stride = 0;             // numbers from one group to the next
  int64_t rows = 0, terms = 1;
  const uint16_t* panel = nullptr;  // steps x 2 x HALVES
  int64_t first_step = 0;           // of the panel
  int64_t pieces = 0;
  const int64_t* steps = nullptr;   // of each piece
  const float* scales = nullptr;    // pieces x TILE_OUTPUTS_2
  const float* offsets = nullptr;   // likewise; null where symmetric
  const float* sums = nullptr;      // of each group: pieces x GROUP_ROWS, the sums of x over the pieces
  int64_t sum_stride = 0;           // numbers from one group to the next
  const float* bias = nullptr;      // TILE_OUTPUTS_2, what the first panel adds to; null for the others, which add to y
  float* y = nullptr;               // groups x GROUP_ROWS x TILE_OUTPUTS_2

  int64_t groups() const { return (rows + GROUP_ROWS - 1) / GROUP_ROWS; }
  int64_t tiles_of(int64_t group) const { return rows - group * GROUP_ROWS > GROUP_ROWS / 2 ? 2 : 1; }
};

struct TileKernels {
  // One row of x, `steps` of them, as `terms` bfloat16 numbers each, in the order in which `expand` lays codes of
  // `bits` bits. Steps and terms lie `step_stride` and `term_stride` numbers apart.
  void (*split)(const float* x, int64_t steps, int64_t terms, int64_t bits, uint16_t* target, int64_t step_stride,
                int64_t term_stride);

  // Largest magnitude of n numbers, a multiple of STEP; NaN or infinity where there is one. Their sum, in float64.
  float (*measure)(const float* x, int64_t n, double* sum);

  // q - zero_point of `outputs` <= TILE_OUTPUTS_2 outputs and `steps` steps. Outputs past those get any finite numbers.
  void (*expand)(const int32_t* weight, int64_t row_stride, int64_t bits, int64_t steps, int64_t outputs,
                 uint16_t* panel);

  void (*multiply)(const TileProduct& product);

  // `rows` rows of TILE_OUTPUTS_2 sums to 16-bit or float32 elements, rounded to nearest, ties to even.
  void (*store)(const float* y, int64_t rows, int64_t outputs, Dtype dtype, char* target, int64_t row_bytes);
};

// Null where the instruction set in use has no such units.
const TileKernels* tile_kernels();

// Whether this many rows are computed by tiles.
bool tiles_pay(const MpqLinear& linear);

// y. False, and nothing is computed, where there are no such units. Rows that hold infinities or NaNs, or whose
// magnitudes leave what sums in float32 can hold, are left to `other`, one by one.
void mpq_linear_by_tiles(const MpqLinear& linear, const Pool& pool, void (*other)(const MpqLinear&, const Pool&));

}  // namespace hf_onebit
