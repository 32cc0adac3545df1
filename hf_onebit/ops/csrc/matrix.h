// Products of many rows in integers, for units that multiply 8-bit numbers: AMX, AVX-512-VNNI, AVX2.
//
// A row of inputs becomes codes, block by block: u = scale * (256 high + low), two int8 digits, or one in int8 mode.
// Weights become panels of bytes, expanded from their bits once for all rows. Sums of codes are exact, so all error is
// in the codes, and known before anything is multiplied: where one term of two digits is not near enough, what it left
// over becomes a second term, a row of codes with a smaller scale.
//
// Nothing here knows signs but `expand`: any weights of eight bits or less can be multiplied as a panel.
#pragma once

#include <cstdint>

#include "linear.h"

namespace hf_onebit {

constexpr int64_t TILE_ROWS = 16;      // rows of codes in a tile
constexpr int64_t TILE_INPUTS = 64;    // inputs in a tile: a cache line of each row
constexpr int64_t TILE = TILE_ROWS * TILE_INPUTS;
constexpr int64_t PANEL_OUTPUTS = 32;  // outputs in a panel, two tiles side by side
constexpr int64_t MOST_INPUTS = 1024;  // in a block: its panel and a group's codes lie in the first two caches

// How rows lie in groups. High digit of row r: tile row r; low digit: tile row r + low. Tile row i is line i % 16 of tile
// i / 16. One digit: low is 0.
struct Layout {
  int64_t tiles = 2;  // of a group, 1 or 2
  int64_t low = TILE_ROWS;

  int64_t group_rows() const { return low ? low : tiles * TILE_ROWS; }
};

// One term of all rows for one block of inputs.
struct Codes {
  const int8_t* codes = nullptr;   // groups x steps x tiles x TILE
  const float* scale = nullptr;    // groups x group_rows
  const int32_t* sum = nullptr;    // likewise: the sum of a row's codes, high and low put together
  const uint8_t* used = nullptr;   // groups: 0 where the codes are not there, because all would be 0
  int64_t rows = 0;                // in all groups
  Layout layout;
};

// Signs to make a panel of, `inputs` (a multiple of TILE_INPUTS) by PANEL_OUTPUTS: for every TILE_INPUTS inputs two tiles
// of 16 outputs, in which line j holds inputs 4 j .. 4 j + 3 of each output. Words past `words` or `outputs` are not read.
struct Expansion {
  const int32_t* weight = nullptr;
  int64_t row_stride = 0, words = 0, outputs = 0, inputs = 0;
  uint8_t* panel = nullptr;
};

// Where finished rows go, rounded once: `outputs` <= PANEL_OUTPUTS contiguous elements of each.
struct Target {
  char* y = nullptr;  // null while more is to be added
  Dtype dtype = Dtype::f32;
  int64_t row_bytes = 0, outputs = 0;
};

// y[r][n] += a[n] * scale[r] * sum over inputs of code[r] * (panel byte[n] - offset), y having PANEL_OUTPUTS columns and
// sums in float32 or float64. `next` is expanded meanwhile, if it has a panel.
template <typename T>
struct Product {
  Codes codes;
  const uint8_t* panel = nullptr;
  int64_t inputs = 0;  // a multiple of TILE_INPUTS
  int32_t offset = 0;
  const float* a = nullptr;
  T* y = nullptr;
  Target target;
  Expansion next;
};

// Another library's settings of the units, to be put back.
struct alignas(64) SavedState {
  uint8_t bytes[64];
};

struct MatrixUnits {
  // Fewer rows than these are left to the tables.
  int64_t least_rows_half, least_rows_f32, least_rows_int8;

  // Panel bytes are unsigned: weights + offset. This is the offset of `expand`.
  int32_t sign_offset;

  // u *= b; returns the largest magnitude, or NaN or infinity if there is one.
  float (*scale_inputs)(const float* b, int64_t n, float* u);

  // The first term of n inputs (a multiple of TILE_INPUTS): digits 1 or 2, lines `stride` bytes apart, and the sum of
  // codes. Leaves in u what is left over, in units of 1 / inverse, and returns the sum of its magnitudes over that of u's.
  float (*quantize)(float* u, int64_t n, float inverse, int digits, int8_t* high, int8_t* low, int64_t stride,
                    int32_t* sum);

  void (*expand)(const Expansion& signs);

  void (*multiply_f32)(const Product<float>& product);
  void (*multiply_f64)(const Product<double>& product);

  // Around any number of multiplications by one thread; null where there is nothing to prepare.
  void (*enter)(SavedState* saved);
  void (*leave)(const SavedState* saved);
};

}  // namespace hf_onebit
