// How a product is cut into pieces: rows of x in chunks that fit the workspace, outputs in panels that threads take.
#include "onebit_linear.h"

#include <algorithm>
#include <cstddef>

#include "kernels.h"
#include "onebit_matrix.h"
#include "workspace.h"

namespace hf_onebit {
namespace {

constexpr int64_t PANEL = 1024;       // most outputs of a panel: the float64 totals of MAX_ROWS rows are 32 KiB
constexpr int64_t LONG_PANEL = MAX_ROWS * PANEL;  // the same of a single row, whose tables are then built less often
constexpr int64_t CHUNK = 64;         // rows of x prepared at once
constexpr int64_t SERIAL = 1 << 20;   // fewer multiplications than this are done before a second thread has woken

// One chunk of rows: what the pieces share.
struct Chunk {
  const Linear& linear;
  const Kernels& isa;
  int64_t first_row, rows;
  int64_t width;    // in_features padded to whole words
  int64_t panel;    // outputs of a panel
  const float* b;   // planes x width
  float* u;         // planes x rows x width: b * x, zeros in the padding so that its bits cannot count

  float* u_of(int p, int64_t row) const { return u + (p * rows + row) * width; }
};

void prepare_rows(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  const Linear& linear = chunk.linear;
  const int64_t n = linear.in_features;
  for (int64_t row = begin; row < end; ++row) {
    const char* x = static_cast<const char*>(linear.x) +
                    (chunk.first_row + row) * linear.x_stride * size_of(linear.dtype);
    for (int p = 0; p < linear.planes; ++p) {
      float* u = chunk.u_of(p, row);
      const float* b = chunk.b + p * chunk.width;
      chunk.isa.to_float(x, linear.dtype, n, u);
      for (int64_t k = 0; k < n; ++k) u[k] *= b[k];
      std::fill(u + n, u + chunk.width, 0.0f);
    }
  }
}

// All rows of the chunk, outputs begin .. end <= begin + PANEL, or + LONG_PANEL of a single row.
void compute_panel(const Chunk& chunk, int64_t begin, int64_t end) {
  const Linear& linear = chunk.linear;
  const Kernels& isa = chunk.isa;
  const int64_t outputs = end - begin;
  alignas(64) float tables[MAX_ROWS * BLOCK_WORDS * NIBBLES * TABLE];
  alignas(64) double totals[LONG_PANEL];
  alignas(64) double y[LONG_PANEL];
  alignas(64) float scale[LONG_PANEL];
  for (int64_t row = 0; row < chunk.rows; row += MAX_ROWS) {
    const int64_t rows = std::min(MAX_ROWS, chunk.rows - row);
    for (int64_t r = 0; r < rows; ++r) std::fill_n(y + r * PANEL, outputs, 0.0);
    if (linear.bias.data) {
      to_float(isa, linear.bias, begin, outputs, scale);
      for (int64_t r = 0; r < rows; ++r) std::copy(scale, scale + outputs, y + r * PANEL);
    }
    for (int p = 0; p < linear.planes; ++p) {
      const Plane& plane = linear.plane[p];
      for (int64_t r = 0; r < rows; ++r) std::fill_n(totals + r * PANEL, round_up(outputs, LANES), 0.0);
      for (int64_t k = 0; k < chunk.width; k += BLOCK_WORDS * WORD) {
        const int64_t words = std::min(BLOCK_WORDS, (chunk.width - k) / WORD);
        for (int64_t r = 0; r < rows; ++r) {
          isa.build_tables(chunk.u_of(p, row + r) + k, words, tables + r * BLOCK_WORDS * NIBBLES * TABLE);
        }
        isa.accumulate(plane.weight + k / WORD * plane.row_stride + begin, plane.row_stride, words, outputs, tables,
                       rows, totals, PANEL);
      }
      to_float(isa, plane.a, begin, outputs, scale);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < outputs; ++n) y[r * PANEL + n] += scale[n] * totals[r * PANEL + n];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t offset = (chunk.first_row + row + r) * linear.out_features + begin;
      isa.from_double(y + r * PANEL, outputs, linear.y_dtype(),
                      static_cast<char*>(linear.y) + offset * size_of(linear.y_dtype()));
    }
  }
}

void compute_panels(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * chunk.panel;
    compute_panel(chunk, first, std::min(first + chunk.panel, chunk.linear.out_features));
  }
}

void compute_f64(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  onebit_linear_f64(chunk.linear, begin * chunk.panel,
                    std::min(end * chunk.panel, chunk.linear.out_features));
}

}  // namespace

void onebit_linear_tables(const Linear& linear, const Pool& pool) {
  const int64_t width = round_up(linear.in_features, WORD);
  const double work = static_cast<double>(linear.rows) * width * linear.out_features * linear.planes;
  const bool serial = work < SERIAL;

  const Kernels& isa = kernels();

  // Panels of equal size, their number a multiple of the threads'.
  const int64_t threads = serial ? 1 : std::max<int64_t>(pool.threads, 1);
  const int64_t most_outputs = linear.rows == 1 ? LONG_PANEL : PANEL;
  int64_t panels = round_up((linear.out_features + most_outputs - 1) / most_outputs, threads);
  const int64_t panel = round_up((linear.out_features + panels - 1) / panels, LANES);
  panels = (linear.out_features + panel - 1) / panel;

  const bool f64 = linear.dtype == Dtype::f64;
  const int64_t most = f64 ? 0 : std::min(linear.rows, CHUNK);
  float* b = workspace().of_size(static_cast<size_t>(linear.planes * width) * static_cast<size_t>(1 + most));
  Chunk chunk{linear, isa, 0, 0, width, panel, b, b + linear.planes * width};
  if (f64) return run(pool, serial, panels, compute_f64, &chunk);

  for (int p = 0; p < linear.planes; ++p) to_float(isa, linear.plane[p].b, 0, linear.in_features, b + p * width);
  for (int64_t row = 0; row < linear.rows; row += CHUNK) {
    chunk.first_row = row;
    chunk.rows = std::min(CHUNK, linear.rows - row);
    const bool few = serial || chunk.rows * width < (1 << 15);
    run(pool, few, chunk.rows, prepare_rows, &chunk);
    run(pool, serial, panels, compute_panels, &chunk);
  }
}

void onebit_linear(const Linear& linear, const Pool& pool) {
  if (linear.rows == 0 || linear.out_features == 0) return;
  const bool int8 = int8_activations() && !linear.exact;
  matrix_units_pay(linear, kernels(), int8) ? onebit_linear_matrix(linear, pool, int8)
                                            : onebit_linear_tables(linear, pool);
}

}  // namespace hf_onebit
