// How a product of many rows with group-quantized weights is cut into tiles. A chunk of rows becomes bfloat16 once, in the
// order of tiles; then 32 outputs and 256 inputs of the weight at a time become a panel in the first cache, and meet all
// rows of the chunk. No matrix of expanded weights exists. Outputs are shared out among threads.
#include "mpq_tiles.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "workspace.h"

namespace hf_onebit {
namespace {

constexpr int64_t CHUNK_BYTES = 3 << 19;  // of x as bfloat16: what stays in the second cache beside all else
constexpr int64_t MOST_ROWS = 512;        // of a chunk: more do not make the expansion any cheaper
constexpr int64_t SERIAL = 1 << 19;       // fewer weights times rows than this are done before a second thread has woken

// Beyond these magnitudes, sums of codes might overflow in float32, or lose digits where the units take tiny numbers for 0.
constexpr float SMALLEST = 1e-25f, LARGEST = 1e30f;

// Fewest rows that pay, by the bfloat16 numbers in one of x and by bits; measured against mpq_linear.cpp's other paths.
constexpr int64_t LEAST_ROWS[MOST_TERMS + 1][9] = {
    {}, {0, 6, 4, 4, 4, 3, 3, 3, 4}, {0, 8, 5, 5, 4, 3, 3, 3, 5}, {0, 9, 5, 5, 5, 3, 3, 3, 5}};

int64_t terms_of(Dtype dtype) { return dtype == Dtype::bf16 ? 1 : dtype == Dtype::f16 ? 2 : 3; }

// As many as are not all zeros: float32 x that was cast from 16 bits, as by a layer of several widths, costs no more than
// those did. Terms of zeros would not change a bit.
int64_t terms_of(const MpqLinear& linear) {
  if (linear.dtype != Dtype::f32) return terms_of(linear.dtype);
  uint32_t digits = 0;
  for (int64_t row = 0; row < linear.rows && !(digits & 0xffu); ++row) {
    const uint32_t* x = static_cast<const uint32_t*>(linear.x) + row * linear.x_stride;
    for (int64_t k = 0; k < linear.matrix.in_features; ++k) digits |= x[k];
  }
  return digits & 0xffu ? 3 : digits & 0xff00u ? 2 : 1;
}

int64_t asked_rows = 0;  // what somebody asked for instead

// Neighbouring steps of one group, at most BLOCK_STEPS.
struct Piece {
  int64_t group, steps;
};

struct Block {
  int64_t first_piece = 0, pieces = 0, first_step = 0, steps = 0;
};

struct Chunk {
  const MpqLinear& linear;
  const TileKernels& tiles;
  int64_t terms = 1, steps = 0;
  std::vector<Piece> pieces;
  std::vector<Block> blocks;
  uint16_t* x = nullptr;      // groups x steps x terms x tiles x HALVES, of the last group fewer tiles
  float* sums = nullptr;      // groups x pieces x GROUP_ROWS
  uint8_t* beyond = nullptr;  // of each row, whether it is left out
  int64_t first_row = 0, rows = 0;

  int64_t tiles_of(int64_t group) const { return rows - group * GROUP_ROWS > GROUP_ROWS / 2 ? 2 : 1; }
  int64_t x_stride() const { return steps * terms * 2 * HALVES; }
  int64_t sum_stride() const { return static_cast<int64_t>(pieces.size()) * GROUP_ROWS; }
};

void cut(const GroupMatrix& matrix, Chunk& chunk) {
  const int64_t group_steps = matrix.group_size / STEP;
  Block block;
  for (int64_t s = 0; s < chunk.steps;) {
    const int64_t group_end = (s / group_steps + 1) * group_steps;
    const int64_t end = std::min({group_end, chunk.steps, block.first_step + BLOCK_STEPS});
    chunk.pieces.push_back({s / group_steps, end - s});
    s = end;
    ++block.pieces;
    block.steps = s - block.first_step;
    if (block.steps == BLOCK_STEPS || s == chunk.steps) {
      chunk.blocks.push_back(block);
      block = Block{static_cast<int64_t>(chunk.pieces.size()), 0, s, 0};
    }
  }
}

void prepare_rows(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  const MpqLinear& linear = chunk.linear;
  const int64_t width = chunk.steps * STEP, n = linear.matrix.in_features;
  std::vector<float> values(static_cast<size_t>(width));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t group = row / GROUP_ROWS, r = row % GROUP_ROWS, tiles = chunk.tiles_of(group);
    const char* x = static_cast<const char*>(linear.x) +
                    (chunk.first_row + row) * linear.x_stride * size_of(linear.dtype);
    if (row < chunk.rows) {
      kernels().to_float(x, linear.dtype, n, values.data());
      std::fill(values.begin() + n, values.end(), 0.0f);
    } else {
      std::fill(values.begin(), values.end(), 0.0f);
    }
    const float* piece_values = values.data();
    float* sums = chunk.sums + group * chunk.sum_stride() + r;
    bool beyond = false;
    float most = 0.0f;
    for (const Piece& piece : chunk.pieces) {
      double sum;
      const float here = chunk.tiles.measure(piece_values, piece.steps * STEP, &sum);
      *sums = static_cast<float>(sum);
      most = here > most || here != here ? here : most;
      beyond |= here != here;
      piece_values += piece.steps * STEP;
      sums += GROUP_ROWS;
    }
    beyond |= most != 0.0f && !(most >= SMALLEST && most <= LARGEST);
    if (row < chunk.rows) chunk.beyond[row] = beyond;
    if (beyond) std::fill(values.begin(), values.end(), 0.0f);
    chunk.tiles.split(values.data(), chunk.steps, chunk.terms, linear.matrix.bits,
                      chunk.x + group * chunk.x_stride() + r / 16 * HALVES + r % 16 * STEP, chunk.terms * tiles * HALVES, tiles * HALVES);
  }
}

// All rows of the chunk, TILE_OUTPUTS_2 outputs from `first` on.
void compute_panel(const Chunk& chunk, int64_t first) {
  const MpqLinear& linear = chunk.linear;
  const GroupMatrix& matrix = linear.matrix;
  constexpr int64_t COLUMNS = TILE_OUTPUTS_2;
  const int64_t outputs = std::min(COLUMNS, matrix.out_features - first);
  alignas(64) float y[MOST_ROWS * COLUMNS];
  alignas(64) uint16_t panel[BLOCK_STEPS * 2 * HALVES];
  alignas(64) float scales[PIECES * COLUMNS] = {}, offsets[PIECES * COLUMNS] = {};
  alignas(64) float bias[COLUMNS] = {};
  int64_t steps[PIECES];
  for (int64_t n = 0; linear.bias.data && n < outputs; ++n) {
    bias[n] = static_cast<float>(load(linear.bias, first + n));
  }
  for (const Block& block : chunk.blocks) {
    for (int64_t i = 0; i < block.pieces; ++i) {
      const Piece& piece = chunk.pieces[block.first_piece + i];
      steps[i] = piece.steps;
      to_float(kernels(), matrix.scales.row(piece.group, first), 0, outputs, scales + i * COLUMNS);
      if (!matrix.zeros.data) continue;
      float* offset = offsets + i * COLUMNS;
      to_float(kernels(), matrix.zeros.row(piece.group, first), 0, outputs, offset);
      for (int64_t n = 0; n < outputs; ++n) offset[n] -= scales[i * COLUMNS + n] * matrix.zero_point();
    }
    chunk.tiles.expand(matrix.weight + block.first_step * matrix.bits * matrix.row_stride + first, matrix.row_stride,
                       matrix.bits, block.steps, outputs, panel);
    TileProduct product;
    product.x = chunk.x;
    product.x_stride = chunk.x_stride();
    product.rows = chunk.rows;
    product.terms = chunk.terms;
    product.panel = panel;
    product.first_step = block.first_step;
    product.pieces = block.pieces;
    product.steps = steps;
    product.scales = scales;
    product.offsets = matrix.zeros.data ? offsets : nullptr;
    product.sums = chunk.sums + block.first_piece * GROUP_ROWS;
    product.sum_stride = chunk.sum_stride();
    product.bias = block.first_step ? nullptr : bias;
    product.y = y;
    chunk.tiles.multiply(product);
  }
  if (chunk.blocks.empty()) {
    for (int64_t r = 0; r < chunk.rows; ++r) std::copy(bias, bias + COLUMNS, y + r * COLUMNS);
  }
  const int64_t size = size_of(linear.dtype);
  chunk.tiles.store(y, chunk.rows, outputs, linear.dtype,
                    static_cast<char*>(linear.y) + (chunk.first_row * matrix.out_features + first) * size,
                    matrix.out_features * size);
}

void compute_panels(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  SavedState saved;
  kernels().matrix->enter(&saved);
  for (int64_t i = begin; i < end; ++i) compute_panel(chunk, i * TILE_OUTPUTS_2);
  kernels().matrix->leave(&saved);
}

}  // namespace

bool tiles_pay(const MpqLinear& linear) {
  if (!tile_kernels() || linear.matrix.group_of || linear.dtype == Dtype::f64) return false;
  const int64_t least = asked_rows > 0 ? asked_rows : LEAST_ROWS[terms_of(linear.dtype)][linear.matrix.bits];
  return linear.rows >= least;
}

void mpq_linear_by_tiles(const MpqLinear& linear, const Pool& pool, void (*other)(const MpqLinear&, const Pool&)) {
  const GroupMatrix& matrix = linear.matrix;
  Chunk chunk{linear, *tile_kernels()};
  chunk.terms = terms_of(linear);
  chunk.steps = (matrix.in_features + STEP - 1) / STEP;
  cut(matrix, chunk);
  const int64_t row_bytes = std::max<int64_t>(chunk.steps, 1) * STEP * chunk.terms * 2;
  const int64_t fitting = std::min(std::max(CHUNK_BYTES / row_bytes / GROUP_ROWS, int64_t{1}) * GROUP_ROWS, MOST_ROWS);
  const int64_t most = std::min(round_up(linear.rows, GROUP_ROWS), fitting);
  const int64_t x_floats = most * row_bytes / 4, sum_floats = most * static_cast<int64_t>(chunk.pieces.size());
  chunk.x = reinterpret_cast<uint16_t*>(workspace().of_size(static_cast<size_t>(x_floats + sum_floats)));
  chunk.sums = reinterpret_cast<float*>(chunk.x) + x_floats;
  std::vector<uint8_t> beyond(static_cast<size_t>(most));
  chunk.beyond = beyond.data();
  std::vector<int64_t> left;
  const int64_t panels = (matrix.out_features + TILE_OUTPUTS_2 - 1) / TILE_OUTPUTS_2;
  for (int64_t row = 0; row < linear.rows; row += most) {
    chunk.first_row = row;
    chunk.rows = std::min(most, linear.rows - row);
    const double work = static_cast<double>(chunk.rows) * chunk.steps * STEP;
    run(pool, work < (1 << 15), round_up(chunk.rows, GROUP_ROWS / 2), prepare_rows, &chunk);
    run(pool, work * matrix.out_features < SERIAL, panels, compute_panels, &chunk);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      if (beyond[static_cast<size_t>(r)]) left.push_back(row + r);
    }
  }
  for (const int64_t row : left) {
    MpqLinear one = linear;
    one.rows = 1;
    one.x = static_cast<const char*>(linear.x) + row * linear.x_stride * size_of(linear.dtype);
    one.y = static_cast<char*>(linear.y) + row * matrix.out_features * size_of(linear.dtype);
    other(one, pool);
  }
}

}  // namespace hf_onebit

int64_t hf_onebit_tile_rows() { return hf_onebit::asked_rows; }

void hf_onebit_select_tile_rows(int64_t rows) { hf_onebit::asked_rows = rows; }
