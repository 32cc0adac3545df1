// How a product with group-quantized weights is cut into pieces. Few rows go through sign tables, many rows through
// pieces of the weight expanded to float32 in cache; outputs are shared out among threads either way. Where each input
// names its group, no table serves more than one of them, so any number of rows goes through pieces. Processors with units
// for it compute many rows by tiles instead (mpq_tiles.cpp).
#include "mpq_linear.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "mpq_kernels.h"
#include "mpq_tiles.h"
#include "workspace.h"

namespace hf_onebit {
namespace {

constexpr int64_t PANEL = 1024;       // most outputs of a panel: the float64 sums of MAX_ROWS rows are 32 KiB
constexpr int64_t TABLE_CHUNK = 16;   // rows of x prepared at once, repeated `bits` times
constexpr int64_t EXPAND_CHUNK = 64;  // rows of x that share one expansion
constexpr int64_t EXPAND_INPUTS = 64;
constexpr int64_t SERIAL = 1 << 19;   // fewer weights times rows than this are done before a second thread has woken

// Fewest rows that pay for expanding the weight, by bits: tables cost as much for each bit, an expansion hardly more
// for many bits than for few.
constexpr int64_t LEAST_ROWS[9] = {0, 40, 24, 16, 8, 6, 5, 4, 3};
constexpr int64_t LEAST_ROWS_OF_DOTS = 12;

// One chunk of rows: what the pieces share.
struct Chunk {
  const MpqLinear& linear;
  const MpqKernels& isa;
  int64_t width;       // in_features padded to whole words
  int64_t block;       // inputs of a block, whose words are at most BLOCK_WORDS
  int64_t panel;       // outputs of a panel
  bool expand;
  int64_t row_floats;  // of u, for each row: x repeated, or x
  float* u;            // rows x row_floats
  float* sums;         // blocks x MAX_ROWS for every MAX_ROWS rows
  int64_t first_row = 0, rows = 0;

  int64_t block_count() const { return count_of(linear.matrix, width, block); }

  // Blocks do not cross from one group to the next.
  static int64_t count_of(const GroupMatrix& matrix, int64_t width, int64_t block) {
    const int64_t size = std::min(matrix.group_size, width);
    if (size == 0) return 0;
    const int64_t full = width / size, rest = width % size;
    return full * ((size + block - 1) / block) + (rest + block - 1) / block;
  }
};

// The block after the one that begins at input k.
int64_t block_end(const Chunk& chunk, int64_t k) {
  const int64_t group = chunk.linear.matrix.group_size;
  const int64_t group_end = group >= chunk.width ? chunk.width : (k / group + 1) * group;
  return std::min({k + chunk.block, group_end, chunk.width});
}

const char* x_of(const Chunk& chunk, int64_t row) {
  const MpqLinear& linear = chunk.linear;
  return static_cast<const char*>(linear.x) + (chunk.first_row + row) * linear.x_stride * size_of(linear.dtype);
}

void prepare_rows(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  const GroupMatrix& matrix = chunk.linear.matrix;
  const int64_t n = matrix.in_features, bits = matrix.bits;
  const float middle = static_cast<float>((1 << bits) - 1) / 2;
  const bool dots = chunk.isa.dots(bits);
  const double factor = matrix.zeros.data ? 1.0 : matrix.zero_point() - (dots ? 0.0f : middle);
  for (int64_t row = begin; row < end; ++row) {
    float* u = chunk.u + row * chunk.row_floats;
    // At the far end of its room, where repeating it from the front never overwrites what is still to be read.
    float* x = u + chunk.row_floats - chunk.width;  // u itself where nothing is repeated
    chunk.isa.base->to_float(x_of(chunk, row), chunk.linear.dtype, n, x);
    std::fill(x + n, x + chunk.width, 0.0f);
    if (chunk.expand) continue;
    float* sums = chunk.sums + row / MAX_ROWS * chunk.block_count() * MAX_ROWS + row % MAX_ROWS;
    for (int64_t k = 0; k < chunk.width; sums += MAX_ROWS) {
      const int64_t stop = block_end(chunk, k);
      double sum = 0;
      for (; k < stop; ++k) {
        sum += x[k];
        if (dots) continue;
        float value = 0.5f * x[k];
        for (int64_t i = 0; i < bits; ++i, value *= 2) u[k * bits + i] = value;
      }
      *sums = static_cast<float>(factor * sum);
    }
  }
}

void begin_with_bias(const Chunk& chunk, int64_t begin, int64_t outputs, int64_t rows, double* y, int64_t y_stride) {
  const Vector& bias = chunk.linear.bias;
  for (int64_t r = 0; r < rows; ++r, y += y_stride) {
    for (int64_t n = 0; n < outputs; ++n) y[n] = bias.data ? load(bias, begin + n) : 0.0;
    std::fill(y + outputs, y + round_up(outputs, LANES), 0.0);
  }
}

void finish(const Chunk& chunk, int64_t begin, int64_t outputs, int64_t row, int64_t rows, const double* y,
            int64_t y_stride) {
  const MpqLinear& linear = chunk.linear;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = (chunk.first_row + row + r) * linear.matrix.out_features + begin;
    chunk.isa.base->from_double(y + r * y_stride, outputs, linear.dtype,
                                static_cast<char*>(linear.y) + offset * size_of(linear.dtype));
  }
}

// All rows of the chunk, outputs begin .. end <= begin + PANEL, by tables.
void compute_panel(const Chunk& chunk, int64_t begin, int64_t end) {
  const GroupMatrix& matrix = chunk.linear.matrix;
  const int64_t outputs = end - begin, bits = matrix.bits;
  constexpr int64_t ROW_TABLES = BLOCK_WORDS * NIBBLES * TABLE;
  alignas(64) float tables[MAX_ROWS * ROW_TABLES];
  alignas(64) double y[MAX_ROWS * PANEL];
  alignas(64) float scales[PANEL], zeros[PANEL];
  int32_t digits[MAX_ROWS * DIGIT_ROOM];
  float steps[MAX_ROWS];
  const bool dots = chunk.isa.dots(bits);
  std::fill_n(scales, round_up(outputs, LANES), 0.0f);
  std::fill_n(zeros, round_up(outputs, LANES), 0.0f);
  GroupBlock block{};
  block.row_stride = matrix.row_stride;
  block.outputs = outputs;
  block.scales = scales;
  block.zeros = matrix.zeros.data ? zeros : nullptr;
  block.middle = static_cast<float>((1 << bits) - 1) / 2;
  for (int64_t row = 0; row < chunk.rows; row += MAX_ROWS) {
    const int64_t rows = std::min(MAX_ROWS, chunk.rows - row);
    begin_with_bias(chunk, begin, outputs, rows, y, PANEL);
    block.sums = chunk.sums + row * chunk.block_count();
    int64_t group = -1;
    for (int64_t k = 0; k < chunk.width; block.sums += MAX_ROWS) {
      if (k / matrix.group_size != group) {
        group = k / matrix.group_size;
        to_float(*chunk.isa.base, matrix.scales.row(group, begin), 0, outputs, scales);
        if (block.zeros) to_float(*chunk.isa.base, matrix.zeros.row(group, begin), 0, outputs, zeros);
      }
      const int64_t stop = block_end(chunk, k);
      block.words = (stop - k) / WORD * bits;
      block.weight = matrix.weight + k / WORD * bits * matrix.row_stride + begin;
      if (dots) {
        for (int64_t r = 0; r < rows; ++r) {
          steps[r] = chunk.isa.split(chunk.u + (row + r) * chunk.row_floats + k, stop - k, bits,
                                     digits + r * DIGIT_ROOM);
        }
        chunk.isa.dot(block, bits, digits, steps, rows, y, PANEL);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          chunk.isa.base->build_tables(chunk.u + (row + r) * chunk.row_floats + k * bits, block.words,
                                       tables + r * ROW_TABLES);
        }
        chunk.isa.accumulate(block, tables, rows, y, PANEL);
      }
      k = stop;
    }
    finish(chunk, begin, outputs, row, rows, y, PANEL);
  }
}

// The same, by expanding the weight of TILE_OUTPUTS outputs and a few inputs at a time.
void compute_expanded(const Chunk& chunk, int64_t begin, int64_t end) {
  const GroupMatrix& matrix = chunk.linear.matrix;
  const int64_t bits = matrix.bits;
  alignas(64) float W[EXPAND_INPUTS * TILE_OUTPUTS];
  alignas(64) double y[EXPAND_CHUNK * TILE_OUTPUTS];
  alignas(64) float scales[TILE_OUTPUTS], zeros[TILE_OUTPUTS];
  std::vector<float> all_scales, all_zeros;  // of all groups, where any may come next
  int64_t at[WORD];
  if (matrix.group_of) all_scales.resize(matrix.groups * TILE_OUTPUTS);
  if (matrix.group_of && matrix.zeros.data) all_zeros.resize(matrix.groups * TILE_OUTPUTS);
  for (int64_t first = begin; first < end; first += TILE_OUTPUTS) {
    const int64_t outputs = std::min(TILE_OUTPUTS, end - first);
    for (int64_t g = 0; matrix.group_of && g < matrix.groups; ++g) {
      const int64_t room = g * TILE_OUTPUTS;
      to_float(*chunk.isa.base, matrix.scales.row(g, first), 0, outputs, all_scales.data() + room);
      if (matrix.zeros.data) to_float(*chunk.isa.base, matrix.zeros.row(g, first), 0, outputs, all_zeros.data() + room);
    }
    begin_with_bias(chunk, first, outputs, chunk.rows, y, TILE_OUTPUTS);
    int64_t group = -1;
    for (int64_t k = 0; k < chunk.width; k += EXPAND_INPUTS) {
      const int64_t inputs = std::min(EXPAND_INPUTS, chunk.width - k);
      for (int64_t i = 0; i < inputs; i += WORD) {
        const int32_t* words = matrix.weight + (k + i) / WORD * bits * matrix.row_stride + first;
        if (matrix.group_of) {
          const int64_t used = std::min<int64_t>(WORD, matrix.in_features - k - i);
          for (int64_t j = 0; j < WORD; ++j) at[j] = j < used ? matrix.group_of[k + i + j] * TILE_OUTPUTS : 0;
          chunk.isa.expand(words, matrix.row_stride, bits, outputs, all_scales.data(),
                           matrix.zeros.data ? all_zeros.data() : nullptr, matrix.zero_point(), at,
                           W + i * TILE_OUTPUTS);
          continue;
        }
        if ((k + i) / matrix.group_size != group) {
          group = (k + i) / matrix.group_size;
          to_float(*chunk.isa.base, matrix.scales.row(group, first), 0, outputs, scales);
          if (matrix.zeros.data) to_float(*chunk.isa.base, matrix.zeros.row(group, first), 0, outputs, zeros);
        }
        chunk.isa.expand(words, matrix.row_stride, bits, outputs, scales, matrix.zeros.data ? zeros : nullptr,
                         matrix.zero_point(), nullptr, W + i * TILE_OUTPUTS);
      }
      chunk.isa.multiply(chunk.u + k, chunk.row_floats, chunk.rows, W, inputs, y, TILE_OUTPUTS);
    }
    finish(chunk, first, outputs, 0, chunk.rows, y, TILE_OUTPUTS);
  }
}

void compute_panels(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * chunk.panel;
    const int64_t last = std::min(first + chunk.panel, chunk.linear.matrix.out_features);
    chunk.expand ? compute_expanded(chunk, first, last) : compute_panel(chunk, first, last);
  }
}

// y in float64 arithmetic throughout, for float64 x. Right, not fast.
void compute_f64(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  const MpqLinear& linear = chunk.linear;
  const GroupMatrix& matrix = linear.matrix;
  const int64_t first = begin * chunk.panel, last = std::min(end * chunk.panel, matrix.out_features);
  for (int64_t r = 0; r < linear.rows; ++r) {
    const double* x = static_cast<const double*>(linear.x) + r * linear.x_stride;
    double* y = static_cast<double*>(linear.y) + r * matrix.out_features;
    for (int64_t n = first; n < last; ++n) y[n] = linear.bias.data ? load(linear.bias, n) : 0.0;
    for (int64_t k = 0; k < matrix.in_features; ++k) {
      const int32_t* words = matrix.weight + k / WORD * matrix.bits * matrix.row_stride;
      const int64_t group = matrix.group_of ? matrix.group_of[k] : k / matrix.group_size;
      const Vector scales = matrix.scales.row(group, 0);
      const Vector zeros = matrix.zeros.data ? matrix.zeros.row(group, 0) : Vector{};
      for (int64_t n = first; n < last; ++n) {
        const double q = code_of(words + n, matrix.row_stride, matrix.bits, k % WORD);
        const double scale = load(scales, n);
        y[n] += x[k] * (zeros.data ? scale * q - load(zeros, n) : scale * (q - matrix.zero_point()));
      }
    }
  }
}

// By tables, or in float32.
void compute(const MpqLinear& linear, const Pool& pool) {
  const GroupMatrix& matrix = linear.matrix;
  const int64_t width = round_up(matrix.in_features, WORD);
  const bool serial = static_cast<double>(linear.rows) * width * matrix.out_features < SERIAL;
  const bool f64 = linear.dtype == Dtype::f64;
  const MpqKernels& isa = mpq_kernels();
  const bool expand =
      matrix.group_of || linear.rows >= (isa.dots(matrix.bits) ? LEAST_ROWS_OF_DOTS : LEAST_ROWS[matrix.bits]);

  // Panels of equal size, their number a multiple of the threads'.
  const int64_t threads = serial ? 1 : std::max<int64_t>(pool.threads, 1);
  int64_t panels = round_up((matrix.out_features + PANEL - 1) / PANEL, threads);
  const int64_t panel = round_up((matrix.out_features + panels - 1) / panels, expand ? TILE_OUTPUTS : LANES);
  panels = (matrix.out_features + panel - 1) / panel;

  const int64_t row_floats = expand || isa.dots(matrix.bits) ? width : width * matrix.bits;
  const int64_t block = std::max<int64_t>(BLOCK_WORDS / matrix.bits, 1) * WORD;
  Chunk chunk{linear, isa, width, block, panel, expand, row_floats, nullptr, nullptr};
  if (f64) return run(pool, serial, panels, compute_f64, &chunk);

  const int64_t most = std::min(linear.rows, expand ? EXPAND_CHUNK : TABLE_CHUNK);
  const int64_t sums = expand ? 0 : round_up(most, MAX_ROWS) * chunk.block_count();
  chunk.u = workspace().of_size(static_cast<size_t>(most) * chunk.row_floats + sums);
  chunk.sums = chunk.u + most * chunk.row_floats;
  for (int64_t row = 0; row < linear.rows; row += most) {
    chunk.first_row = row;
    chunk.rows = std::min(most, linear.rows - row);
    run(pool, serial || chunk.rows * chunk.row_floats < (1 << 15), chunk.rows, prepare_rows, &chunk);
    run(pool, serial, panels, compute_panels, &chunk);
  }
}

}  // namespace

void mpq_linear(const MpqLinear& linear, const Pool& pool) {
  if (linear.rows == 0 || linear.matrix.out_features == 0) return;
  tiles_pay(linear) ? mpq_linear_by_tiles(linear, pool, compute) : compute(linear, pool);
}

}  // namespace hf_onebit
