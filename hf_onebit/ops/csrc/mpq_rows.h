// Rows of a group-quantized matrix side by side, by one instruction set; see mpq_embedding.cpp.
#pragma once

#include "kernels.h"
#include "mpq_linear.h"

namespace hf_onebit {

constexpr int64_t ROWS_AT_ONCE = 16;

// 32 inputs of `rows` <= ROWS_AT_ONCE neighbouring rows, from the first of their words; `used` of the inputs are written
// for each. The dtype is not float64.
struct RowPiece {
  const GroupMatrix* matrix = nullptr;
  const int32_t* words = nullptr;
  int64_t rows = 0, used = 0;
  const float *scales = nullptr, *zeros = nullptr;  // of the rows; zeros are read where the matrix has some
  Dtype dtype = Dtype::f32;
  char* y = nullptr;
  int64_t row_bytes = 0;
};

#ifdef HF_ONEBIT_X86
void avx512_expand_rows(const RowPiece& piece);
#endif

}  // namespace hf_onebit
