// Rows of a group-quantized matrix. A row's words lie one cache line apart from the next, so this waits for memory and
// plain C++ is enough.
#include <algorithm>

#include "half.h"
#include "kernels.h"
#include "mpq_linear.h"
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

void look_up_rows(int64_t begin, int64_t end, void* context) {
  const MpqEmbedding& embedding = *static_cast<const MpqEmbedding*>(context);
  const GroupMatrix& matrix = embedding.matrix;
  const int64_t n = matrix.in_features;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = embedding.wide ? static_cast<const int64_t*>(embedding.ids)[i]
                                      : static_cast<const int32_t*>(embedding.ids)[i];
    char* y = static_cast<char*>(embedding.y) + i * n * size_of(embedding.dtype);
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
