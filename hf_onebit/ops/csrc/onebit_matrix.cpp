// onebit_linear by matrix units: rows of x become codes once, panels of signs are expanded once for all of them.
#include "onebit_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "matrix.h"
#include "workspace.h"

namespace hf_onebit {
namespace {

constexpr int64_t MOST_ROWS = 512;          // of a chunk: more do not make the expansion of signs any cheaper
constexpr int64_t CHUNK_BYTES = 3 << 19;    // of codes: what fits the second cache beside all else
constexpr int TERMS = 2;

// What a term may leave over, as a part of sum |b x| of a row's block, before the row gets a second one.
constexpr float TOLERANCE_HALF = 2e-4f, TOLERANCE_F32 = 1e-7f;
// Beyond these, scales and their reciprocals might not be normal numbers of float32.
constexpr float SMALLEST = 1e-30f, LARGEST = 1e30f;

// One chunk of rows: what the pieces share. Slots number (plane, block, term, group).
struct Chunk {
  const Linear& linear;
  const Kernels& isa;
  const MatrixUnits& units;
  Layout layout;
  int64_t blocks = 0, block = 0;  // of inputs, and the inputs in each
  int64_t first_row = 0, rows = 0, groups = 0;
  const float* b = nullptr;       // planes x blocks x block
  int8_t* codes = nullptr;
  float* scale = nullptr;
  int32_t* sum = nullptr;
  uint32_t* beyond = nullptr;     // planes x blocks x groups: a bit for each row that has no codes
  uint8_t* used = nullptr;

  int digits() const { return layout.low ? 2 : 1; }
  int64_t slot(int p, int64_t block_, int term) const { return ((p * blocks + block_) * TERMS + term) * groups; }
  int64_t slots() const { return linear.planes * blocks * TERMS * groups; }
  int64_t slot_bytes() const { return block * layout.tiles * TILE_ROWS; }

  Codes codes_of(int p, int64_t block_, int term) const {
    const int64_t s = slot(p, block_, term), first = s * layout.group_rows();
    return {codes + s * slot_bytes(), scale + first, sum + first, used + s, rows, layout};
  }
};

// Codes of one group of rows for one block of inputs and one plane.
void prepare_group(const Chunk& chunk, int p, int64_t block, int64_t g) {
  const Linear& linear = chunk.linear;
  const MatrixUnits& units = chunk.units;
  const Layout layout = chunk.layout;
  const int64_t group_rows = layout.group_rows(), stride = layout.tiles * TILE;
  const int64_t begin = block * chunk.block, n = std::min(chunk.block, linear.in_features - begin);
  const float highest = chunk.digits() == 1 ? 127.0f : 32512.0f;
  const float tolerance = linear.dtype == Dtype::f32 ? TOLERANCE_F32 : TOLERANCE_HALF;
  alignas(64) float u[MOST_INPUTS];
  int64_t slot[TERMS];
  int8_t* codes[TERMS];
  for (int term = 0; term < TERMS; ++term) {
    slot[term] = chunk.slot(p, block, term) + g;
    codes[term] = chunk.codes + slot[term] * chunk.slot_bytes();
    chunk.used[slot[term]] = 0;
  }
  uint32_t beyond = 0;
  for (int64_t r = 0; r < group_rows; ++r) {
    const int64_t row = g * group_rows + r;
    float* scale[TERMS];
    int32_t* sum[TERMS];
    for (int term = 0; term < TERMS; ++term) {
      scale[term] = chunk.scale + slot[term] * group_rows + r;
      sum[term] = chunk.sum + slot[term] * group_rows + r;
      *scale[term] = 0.0f;
      *sum[term] = 0;
    }
    const auto quantize = [&](int term, float inverse) {
      const auto line = [&](int64_t i) { return codes[term] + i / TILE_ROWS * TILE + i % TILE_ROWS * TILE_INPUTS; };
      return units.quantize(u, chunk.block, inverse, chunk.digits(), line(r), line(r + layout.low), stride, sum[term]);
    };
    float most = 0.0f;
    if (row < chunk.rows) {
      const char* x = static_cast<const char*>(linear.x) +
                      ((chunk.first_row + row) * linear.x_stride + begin) * size_of(linear.dtype);
      chunk.isa.to_float(x, linear.dtype, n, u);
      most = units.scale_inputs(chunk.b + (p * chunk.blocks + block) * chunk.block, n, u);
      if (most != 0.0f && !(most >= SMALLEST && most <= LARGEST)) {
        beyond |= 1u << r;
        most = 0.0f;
      }
    }
    std::fill(most != 0.0f ? u + n : u, u + chunk.block, 0.0f);
    const float left = quantize(0, most != 0.0f ? highest / most : 0.0f);
    chunk.used[slot[0]] = 1;
    if (most == 0.0f) continue;
    *scale[0] = most / highest;
    if (left <= tolerance) continue;
    if (!chunk.used[slot[1]]) {  // of the group's other rows, too, something is multiplied
      std::memset(codes[1], 0, static_cast<size_t>(chunk.slot_bytes()));
      chunk.used[slot[1]] = 1;
    }
    *scale[1] = *scale[0] / (2 * highest);  // what is left over is half a code at most
    quantize(1, 2 * highest);
  }
  chunk.beyond[(p * chunk.blocks + block) * chunk.groups + g] = beyond;
}

void prepare(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block = i / chunk.groups;
    prepare_group(chunk, static_cast<int>(block / chunk.blocks), block % chunk.blocks, i % chunk.groups);
  }
}

void multiply(const MatrixUnits& units, const Product<float>& product) { units.multiply_f32(product); }

void multiply(const MatrixUnits& units, const Product<double>& product) { units.multiply_f64(product); }

// Panels first .. last of PANEL_OUTPUTS outputs, all rows of the chunk. T: how sums of blocks are kept.
template <typename T>
void compute_panels(int64_t begin, int64_t end, void* context) {
  const Chunk& chunk = *static_cast<const Chunk*>(context);
  const Linear& linear = chunk.linear;
  const int64_t words = (linear.in_features + WORD - 1) / WORD, block_words = chunk.block / WORD;
  const int64_t a_panel = linear.planes * chunk.blocks;  // parts of the sum for each panel of outputs
  alignas(64) uint8_t panels[2][MOST_INPUTS * PANEL_OUTPUTS];
  alignas(64) T y[MOST_ROWS * sizeof(float) / sizeof(T) * PANEL_OUTPUTS];
  alignas(64) float a[PANEL_OUTPUTS] = {};

  const auto outputs = [&](int64_t i) { return std::min(PANEL_OUTPUTS, linear.out_features - i * PANEL_OUTPUTS); };
  const auto part = [&](int64_t i) {  // the signs of part i, counted from panel 0
    const int64_t p = i % a_panel / chunk.blocks, block = i % chunk.blocks;
    const Plane& plane = linear.plane[p];
    return Expansion{plane.weight + block * block_words * plane.row_stride + i / a_panel * PANEL_OUTPUTS,
                     plane.row_stride, std::min(block_words, words - block * block_words), outputs(i / a_panel),
                     chunk.block, panels[i % 2]};
  };

  SavedState saved;
  if (chunk.units.enter) chunk.units.enter(&saved);
  chunk.units.expand(part(begin * a_panel));
  for (int64_t i = begin * a_panel; i < end * a_panel; ++i) {
    const int64_t first = i / a_panel * PANEL_OUTPUTS, n = outputs(i / a_panel), block = i % chunk.blocks;
    const int p = static_cast<int>(i % a_panel / chunk.blocks);
    if (i % a_panel == 0) {
      std::fill_n(a, PANEL_OUTPUTS, 0.0f);
      if (linear.bias.data) to_float(chunk.isa, linear.bias, first, n, a);
      for (int64_t r = 0; r < chunk.rows; ++r) std::copy(a, a + PANEL_OUTPUTS, y + r * PANEL_OUTPUTS);
    }
    if (block == 0) to_float(chunk.isa, linear.plane[p].a, first, n, a);
    // The second terms first, because the first ones are there in every group.
    for (int term = TERMS - 1; term >= 0; --term) {
      Product<T> product{chunk.codes_of(p, block, term), panels[i % 2], chunk.block, chunk.units.sign_offset, a, y,
                         {}, {}};
      if (term == 0 && i + 1 < end * a_panel) product.next = part(i + 1);
      if (term == 0 && (i + 1) % a_panel == 0) {
        product.target = {static_cast<char*>(linear.y) +
                              (chunk.first_row * linear.out_features + first) * size_of(linear.y_dtype()),
                          linear.y_dtype(), linear.out_features * size_of(linear.y_dtype()), n};
      }
      multiply(chunk.units, product);
    }
  }
  if (chunk.units.leave) chunk.units.leave(&saved);
}

// Rows that have no codes: infinities, NaNs, numbers close to what float32 can hold.
void compute_rest(const Linear& linear, const Pool& pool, const std::vector<int64_t>& rows) {
  for (size_t i = 0, next = 0; i < rows.size(); i = next) {
    for (next = i + 1; next < rows.size() && rows[next] == rows[next - 1] + 1;) ++next;
    Linear part = linear;
    part.rows = static_cast<int64_t>(next - i);
    part.x = static_cast<const char*>(linear.x) + rows[i] * linear.x_stride * size_of(linear.dtype);
    part.y = static_cast<char*>(linear.y) + rows[i] * linear.out_features * size_of(linear.y_dtype());
    onebit_linear_tables(part, pool);
  }
}

// Parts of the workspace, each aligned to a cache line.
class Parts {
 public:
  explicit Parts(size_t bytes) : next_(reinterpret_cast<char*>(workspace().of_size(bytes / sizeof(float)))) {}

  template <typename T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += bytes_of<T>(count);
    return part;
  }

  template <typename T>
  static size_t bytes_of(int64_t count) {
    return static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
  }

 private:
  char* next_;
};

}  // namespace

bool matrix_units_pay(const Linear& linear, const Kernels& isa, bool int8) {
  if (!isa.matrix || linear.dtype == Dtype::f64 || linear.in_features == 0) return false;
  const MatrixUnits& units = *isa.matrix;
  return linear.rows >= (int8                          ? units.least_rows_int8
                         : linear.dtype == Dtype::f32 ? units.least_rows_f32
                                                      : units.least_rows_half);
}

void onebit_linear_matrix(const Linear& linear, const Pool& pool, bool int8) {
  const Kernels& isa = kernels();
  Chunk chunk{linear, isa, *isa.matrix, {}};
  // Few rows fill one tile.
  const bool one_tile = linear.rows <= (int8 ? TILE_ROWS : TILE_ROWS / 2);
  chunk.layout.tiles = one_tile ? 1 : 2;
  chunk.layout.low = int8 ? 0 : chunk.layout.tiles * TILE_ROWS / 2;
  const int64_t group_rows = chunk.layout.group_rows();
  chunk.blocks = (linear.in_features + MOST_INPUTS - 1) / MOST_INPUTS;
  chunk.block = round_up((linear.in_features + chunk.blocks - 1) / chunk.blocks, TILE_INPUTS);
  chunk.blocks = (linear.in_features + chunk.block - 1) / chunk.block;

  const bool f32 = linear.dtype == Dtype::f32;  // two terms, sums in float64
  const int64_t group_bytes = linear.planes * chunk.blocks * chunk.slot_bytes() * (f32 && !int8 ? 2 : 1);
  const int64_t most_groups =
      std::max<int64_t>(std::min(CHUNK_BYTES / group_bytes, (f32 ? MOST_ROWS / 2 : MOST_ROWS) / group_rows), 1);
  const int64_t all_groups = (linear.rows + group_rows - 1) / group_rows;
  const int64_t chunks = (all_groups + most_groups - 1) / most_groups;
  chunk.groups = (all_groups + chunks - 1) / chunks;

  const int64_t width = chunk.blocks * chunk.block, slots = chunk.slots();
  Parts parts(Parts::bytes_of<float>(linear.planes * width) + Parts::bytes_of<int8_t>(slots * chunk.slot_bytes()) +
              2 * Parts::bytes_of<float>(slots * group_rows) + Parts::bytes_of<uint32_t>(slots) +
              Parts::bytes_of<uint8_t>(slots));
  float* b = parts.take<float>(linear.planes * width);
  chunk.b = b;
  chunk.codes = parts.take<int8_t>(slots * chunk.slot_bytes());
  chunk.scale = parts.take<float>(slots * group_rows);
  chunk.sum = parts.take<int32_t>(slots * group_rows);
  chunk.beyond = parts.take<uint32_t>(slots);
  chunk.used = parts.take<uint8_t>(slots);
  for (int p = 0; p < linear.planes; ++p) to_float(isa, linear.plane[p].b, 0, linear.in_features, b + p * width);

  const double work = static_cast<double>(linear.rows) * width * linear.out_features * linear.planes;
  const bool serial = work < (1 << 22);
  const int64_t panels = (linear.out_features + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
  const int64_t chunk_rows = chunk.groups * group_rows;
  std::vector<int64_t> rest;
  for (int64_t row = 0; row < linear.rows; row += chunk_rows) {
    chunk.first_row = row;
    chunk.rows = std::min(chunk_rows, linear.rows - row);
    chunk.groups = (chunk.rows + group_rows - 1) / group_rows;
    const int64_t prepared = linear.planes * chunk.blocks * chunk.groups;
    run(pool, serial || chunk.rows * width < (1 << 15), prepared, prepare, &chunk);
    run(pool, serial, panels, f32 ? compute_panels<double> : compute_panels<float>, &chunk);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      uint32_t beyond = 0;
      for (int64_t i = r / group_rows; i < prepared; i += chunk.groups) beyond |= chunk.beyond[i] >> r % group_rows;
      if (beyond & 1u) rest.push_back(row + r);
    }
  }
  compute_rest(linear, pool, rest);
}

}  // namespace hf_onebit
