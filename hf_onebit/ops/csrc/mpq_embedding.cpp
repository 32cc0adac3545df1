// Rows of a group-quantized matrix. A row's words lie one cache line apart from the next, so a single row waits for memory
// and plain C++ is enough. Neighbouring rows, as of the whole matrix in a backward pass, share those lines: they are
// unpacked side by side, by loops over rows that the compiler makes vectors of.
#include <algorithm>

#include "half.h"
#include "kernels.h"
#include "mpq_linear.h"
#include "mpq_rows.h"
#include "workspace.h"

namespace hf_onebit {
namespace {

// As the reference: float32 arithmetic, float64 for float64 results.
template <typename T>
void expand_row(const GroupMatrix& matrix, int64_t id, T* row) {
  const T zero_point = matrix.zero_point();
  T scale = 0, zero = 0;
  for (int64_t k = 0; k < matrix.in_features; ++k) {
    if (k % matrix.group_size == 0) {
      scale = static_cast<T>(load(matrix.scales.row(k / matrix.group_size, id), 0));
      if (matrix.zeros.data) zero = static_cast<T>(load(matrix.zeros.row(k / matrix.group_size, id), 0));
    }
    const int32_t* words = matrix.weight + k / WORD * matrix.bits * matrix.row_stride + id;
    const T q = static_cast<T>(code_of(words, matrix.row_stride, matrix.bits, k % WORD));
    row[k] = matrix.zeros.data ? scale * q - zero : scale * (q - zero_point);
  }
}

void store(const float* row, int64_t n, Dtype dtype, void* target) {
  for (int64_t k = 0; k < n; ++k) {
    static_cast<uint16_t*>(target)[k] = dtype == Dtype::f16 ? f16_of_float(row[k]) : bf16_of_float(row[k]);
  }
}

constexpr int64_t TILE_ROWS = 64, FEWEST_NEIGHBOURS = 8;

// 32 inputs of some neighbouring rows.
struct Tile {
  alignas(64) float values[WORD][TILE_ROWS];
  alignas(64) uint16_t halves[WORD][TILE_ROWS];
  alignas(64) float scales[TILE_ROWS], zeros[TILE_ROWS];
};

// The operations of expand_row and store, in their order.
__attribute__((always_inline)) inline void expand_tile(const GroupMatrix& matrix, const int32_t* words, int64_t rows,
                                                       Dtype dtype, Tile& tile) {
  const uint32_t mask = (1u << matrix.bits) - 1u;
  const float zero_point = matrix.zero_point();
  for (int64_t j = 0; j < WORD; ++j) {
    const int64_t bit = j * matrix.bits;
    const int shift = static_cast<int>(bit % 32);
    const int32_t* low = words + bit / 32 * matrix.row_stride;
    float* values = tile.values[j];
    if (shift + matrix.bits > 32) {
      const int32_t* high = low + matrix.row_stride;
      for (int64_t n = 0; n < rows; ++n) {
        const uint32_t code = static_cast<uint32_t>(low[n]) >> shift | static_cast<uint32_t>(high[n]) << (32 - shift);
        values[n] = static_cast<float>(static_cast<int32_t>(code & mask));
      }
    } else {
      for (int64_t n = 0; n < rows; ++n) {
        values[n] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(low[n]) >> shift & mask));
      }
    }
    if (matrix.zeros.data) {
      for (int64_t n = 0; n < rows; ++n) values[n] = tile.scales[n] * values[n] - tile.zeros[n];
    } else {
      for (int64_t n = 0; n < rows; ++n) values[n] = tile.scales[n] * (values[n] - zero_point);
    }
    if (dtype == Dtype::bf16) {
      for (int64_t n = 0; n < rows; ++n) tile.halves[j][n] = bf16_of_float(values[n]);
    } else if (dtype == Dtype::f16) {
      for (int64_t n = 0; n < rows; ++n) tile.halves[j][n] = f16_of_float(values[n]);
    }
  }
}

using ExpandTile = void (*)(const GroupMatrix& matrix, const int32_t* words, int64_t rows, Dtype dtype, Tile& tile);

void expand_tile_plainly(const GroupMatrix& matrix, const int32_t* words, int64_t rows, Dtype dtype, Tile& tile) {
  expand_tile(matrix, words, rows, dtype, tile);
}

#ifdef HF_ONEBIT_X86
__attribute__((target("avx2"))) void expand_tile_avx2(const GroupMatrix& matrix, const int32_t* words, int64_t rows,
                                                      Dtype dtype, Tile& tile) {
  expand_tile(matrix, words, rows, dtype, tile);
}
#endif

ExpandTile expand_tile_in_use() {
#ifdef HF_ONEBIT_X86
  if (&kernels() != &scalar_kernels) return expand_tile_avx2;  // every other set comes after AVX2
#endif
  return expand_tile_plainly;
}

// Null where rows are written number by number.
auto expand_rows_in_use() -> void (*)(const RowPiece& piece) {
#ifdef HF_ONEBIT_X86
  if (&kernels() != &scalar_kernels && &kernels() != &avx2_kernels) return avx512_expand_rows;
#endif
  return nullptr;
}

// Rows id .. id + rows, rows <= TILE_ROWS, of a dtype other than float64.
void expand_neighbours(const GroupMatrix& matrix, int64_t id, int64_t rows, Dtype dtype, char* y) {
  static const size_t FLOATS = (sizeof(Tile) + sizeof(float) - 1) / sizeof(float);
  Tile& tile = *reinterpret_cast<Tile*>(workspace().of_size(FLOATS));
  const ExpandTile expand = expand_tile_in_use();
  void (*const expand_rows)(const RowPiece& piece) = expand_rows_in_use();
  const int64_t inputs = matrix.in_features;
  for (int64_t k = 0; k < inputs; k += WORD) {
    if (k % matrix.group_size == 0) {
      const int64_t group = k / matrix.group_size;
      to_float(kernels(), matrix.scales.row(group, id), 0, rows, tile.scales);
      if (matrix.zeros.data) to_float(kernels(), matrix.zeros.row(group, id), 0, rows, tile.zeros);
    }
    const int32_t* words = matrix.weight + k / WORD * matrix.bits * matrix.row_stride + id;
    const int64_t used = std::min(WORD, inputs - k), size = size_of(dtype);
    for (int64_t n = 0; expand_rows && n < rows; n += ROWS_AT_ONCE) {
      expand_rows({&matrix, words + n, std::min(ROWS_AT_ONCE, rows - n), used, tile.scales + n, tile.zeros + n, dtype,
                   y + (n * inputs + k) * size, inputs * size});
    }
    if (expand_rows) continue;
    expand(matrix, words, rows, dtype, tile);
    for (int64_t n = 0; n < rows; ++n) {
      if (dtype == Dtype::f32) {
        float* target = reinterpret_cast<float*>(y) + n * inputs + k;
        for (int64_t j = 0; j < used; ++j) target[j] = tile.values[j][n];
      } else {
        uint16_t* target = reinterpret_cast<uint16_t*>(y) + n * inputs + k;
        for (int64_t j = 0; j < used; ++j) target[j] = tile.halves[j][n];
      }
    }
  }
}

int64_t id_of(const MpqEmbedding& embedding, int64_t i) {
  return embedding.wide ? static_cast<const int64_t*>(embedding.ids)[i]
                        : static_cast<const int32_t*>(embedding.ids)[i];
}

void look_up_rows(int64_t begin, int64_t end, void* context) {
  const MpqEmbedding& embedding = *static_cast<const MpqEmbedding*>(context);
  const GroupMatrix& matrix = embedding.matrix;
  const int64_t n = matrix.in_features;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = id_of(embedding, i);
    char* y = static_cast<char*>(embedding.y) + i * n * size_of(embedding.dtype);
    if (embedding.dtype != Dtype::f64) {
      int64_t neighbours = 1;
      while (neighbours < std::min(TILE_ROWS, end - i) && id_of(embedding, i + neighbours) == id + neighbours) {
        ++neighbours;
      }
      if (neighbours >= FEWEST_NEIGHBOURS) {
        expand_neighbours(matrix, id, neighbours, embedding.dtype, y);
        i += neighbours - 1;
        continue;
      }
    }
    if (embedding.dtype == Dtype::f64) {
      expand_row(matrix, id, reinterpret_cast<double*>(y));
    } else if (embedding.dtype == Dtype::f32) {
      expand_row(matrix, id, reinterpret_cast<float*>(y));
    } else {
      float* row = workspace().of_size(static_cast<size_t>(n));
      expand_row(matrix, id, row);
      store(row, n, embedding.dtype, y);
    }
  }
}

}  // namespace

void mpq_embedding(const MpqEmbedding& embedding, const Pool& pool) {
  const int64_t n = embedding.matrix.in_features;
  if (embedding.count == 0 || n == 0) return;
  run(pool, embedding.count * n < (1 << 15), embedding.count, look_up_rows, const_cast<MpqEmbedding*>(&embedding));
}

}  // namespace hf_onebit
