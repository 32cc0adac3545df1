// Group-quantized weights with AVX-512F; the tables and their look-up are those of kernels_avx512.cpp.
#include "mpq_kernels.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f")))
#define TARGET_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace hf_onebit {
namespace {

TARGET_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }

TARGET_INLINE void add_to(double* y, __m512 value) {
  const __m256 low = _mm512_castps512_ps256(value);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1));
  _mm512_storeu_pd(y, _mm512_add_pd(_mm512_loadu_pd(y), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(y + 8, _mm512_add_pd(_mm512_loadu_pd(y + 8), _mm512_cvtps_pd(high)));
}

TARGET_INLINE __m512 look_up_two(const __m512i* index, const float* tables) {
  return _mm512_add_ps(_mm512_permutexvar_ps(index[0], _mm512_load_ps(tables)),
                       _mm512_permutexvar_ps(index[1], _mm512_load_ps(tables + TABLE)));
}

template <int ROWS>
TARGET_INLINE void accumulate_16(const GroupBlock& block, int64_t n, __mmask16 lanes, const float* tables, double* y,
                                 int64_t y_stride) {
  const int32_t* weight = block.weight + n;
  __m512 sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < block.words; ++k, tables += NIBBLES * TABLE, weight += block.row_stride) {
    _mm_prefetch(reinterpret_cast<const char*>(weight) + 1024, _MM_HINT_T0);  // the same row, 16 registers on
    const __m512i word = _mm512_maskz_loadu_epi32(lanes, weight);
    const __m512i index[NIBBLES] = {
        word,
        _mm512_srli_epi32(word, 4),
        _mm512_srli_epi32(word, 8),
        _mm512_srli_epi32(word, 12),
        _mm512_srli_epi32(word, 16),
        _mm512_srli_epi32(word, 20),
        _mm512_srli_epi32(word, 24),
        _mm512_srli_epi32(word, 28),
    };
    for (int r = 0; r < ROWS; ++r) {
      const float* t = tables + r * BLOCK_WORDS * NIBBLES * TABLE;
      const __m512 low = _mm512_add_ps(look_up_two(index, t), look_up_two(index + 2, t + 2 * TABLE));
      const __m512 high = _mm512_add_ps(look_up_two(index + 4, t + 4 * TABLE), look_up_two(index + 6, t + 6 * TABLE));
      sums[r] = _mm512_add_ps(sums[r], _mm512_add_ps(low, high));
    }
  }
  const __m512 scale = _mm512_loadu_ps(block.scales + n);
  if (block.zeros) {
    const __m512 offset =
        _mm512_fnmadd_ps(scale, _mm512_set1_ps(block.middle), _mm512_loadu_ps(block.zeros + n));
    for (int r = 0; r < ROWS; ++r, y += y_stride) {
      add_to(y + n, _mm512_fnmadd_ps(offset, _mm512_set1_ps(block.sums[r]), _mm512_mul_ps(scale, sums[r])));
    }
  } else {
    for (int r = 0; r < ROWS; ++r, y += y_stride) {
      add_to(y + n, _mm512_mul_ps(scale, _mm512_sub_ps(sums[r], _mm512_set1_ps(block.sums[r]))));
    }
  }
}

template <int ROWS>
TARGET void accumulate_rows(const GroupBlock& block, const float* tables, double* y, int64_t y_stride) {
  for (int64_t n = 0; n < block.outputs; n += 16) {
    accumulate_16<ROWS>(block, n, first(block.outputs - n), tables, y, y_stride);
  }
}

void accumulate(const GroupBlock& block, const float* tables, int64_t rows, double* y, int64_t y_stride) {
  static_assert(MAX_ROWS == 4, "one case for each number of rows");
  switch (rows) {
    case 1: return accumulate_rows<1>(block, tables, y, y_stride);
    case 2: return accumulate_rows<2>(block, tables, y, y_stride);
    case 3: return accumulate_rows<3>(block, tables, y, y_stride);
    default: return accumulate_rows<4>(block, tables, y, y_stride);
  }
}

TARGET void expand(const int32_t* weight, int64_t row_stride, int64_t bits, int64_t outputs, const float* scales,
                   const float* zeros, float zero_point, const int64_t* at, float* W) {
  const __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
  for (int64_t n = 0; n < TILE_OUTPUTS; n += 16) {
    const __mmask16 lanes = n < outputs ? first(outputs - n) : 0;
    __m512 scale = _mm512_maskz_loadu_ps(lanes, scales + n);
    __m512 offset = zeros ? _mm512_maskz_loadu_ps(lanes, zeros + n) : _mm512_mul_ps(scale, _mm512_set1_ps(zero_point));
    __m512i words[9];  // one more than there can be, so that the word after the last exists
    for (int64_t w = 0; w < bits; ++w) {
      words[w] = _mm512_maskz_loadu_epi32(lanes, weight + w * row_stride + n);
      // These pieces of rows lie too far apart for the processor to guess the next ones.
      _mm_prefetch(reinterpret_cast<const char*>(weight + (w + 2 * bits) * row_stride + n), _MM_HINT_T0);
    }
    words[bits] = _mm512_setzero_si512();
    for (int64_t j = 0; j < WORD; ++j) {
      const int64_t word = j * bits / 32, shift = j * bits % 32;
      __m512i code = _mm512_srl_epi32(words[word], _mm_cvtsi64_si128(shift));
      if (shift + bits > 32) {
        code = _mm512_or_si512(code, _mm512_sll_epi32(words[word + 1], _mm_cvtsi64_si128(32 - shift)));
      }
      if (at) {
        scale = _mm512_maskz_loadu_ps(lanes, scales + at[j] + n);
        offset = zeros ? _mm512_maskz_loadu_ps(lanes, zeros + at[j] + n)
                       : _mm512_mul_ps(scale, _mm512_set1_ps(zero_point));
      }
      const __m512 q = _mm512_cvtepi32_ps(_mm512_and_si512(code, mask));
      _mm512_store_ps(W + j * TILE_OUTPUTS + n, _mm512_fmsub_ps(scale, q, offset));
    }
  }
}

template <int ROWS>
TARGET_INLINE void multiply_rows(const float* x, int64_t x_stride, const float* W, int64_t inputs, double* y,
                                 int64_t y_stride) {
  constexpr int COLUMNS = TILE_OUTPUTS / 16;
  __m512 sums[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < inputs; ++k, W += TILE_OUTPUTS) {
    __m512 w[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) w[c] = _mm512_load_ps(W + 16 * c);
    for (int r = 0; r < ROWS; ++r) {
      const __m512 value = _mm512_set1_ps(x[r * x_stride + k]);
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = _mm512_fmadd_ps(value, w[c], sums[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) add_to(y + r * y_stride + 16 * c, sums[r][c]);
  }
}

TARGET void multiply(const float* x, int64_t x_stride, int64_t rows, const float* W, int64_t inputs, double* y,
                     int64_t y_stride) {
  constexpr int ROWS = 6;  // with their 24 sums and 4 registers of W, 32 registers are nearly full
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) {
    multiply_rows<ROWS>(x + r * x_stride, x_stride, W, inputs, y + r * y_stride, y_stride);
  }
  for (; r + 2 <= rows; r += 2) {
    multiply_rows<2>(x + r * x_stride, x_stride, W, inputs, y + r * y_stride, y_stride);
  }
  if (r < rows) multiply_rows<1>(x + r * x_stride, x_stride, W, inputs, y + r * y_stride, y_stride);
}

}  // namespace

const MpqKernels avx512_mpq_kernels = {&avx512_kernels, accumulate, expand, multiply};

}  // namespace hf_onebit
#endif
