// Group-quantized weights with AVX2 and FMA; the half tables and their mirror image are those of kernels_avx2.cpp.
#include "mpq_kernels.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define TARGET_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline

namespace hf_onebit {
namespace {

TARGET_INLINE __m256i first(int64_t n) {
  const int32_t left = static_cast<int32_t>(n < 8 ? n : 8);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

TARGET_INLINE void add_to(double* y, __m256 value) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(value));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(value, 1));
  _mm256_storeu_pd(y, _mm256_add_pd(_mm256_loadu_pd(y), low));
  _mm256_storeu_pd(y + 4, _mm256_add_pd(_mm256_loadu_pd(y + 4), high));
}

TARGET_INLINE __m256 look_up_one(__m256i index, __m256i negative, const float* table) {
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(table), index), _mm256_castsi256_ps(negative));
}

TARGET_INLINE __m256 look_up_two(const __m256i* index, const __m256i* negative, const float* tables) {
  return _mm256_add_ps(look_up_one(index[0], negative[0], tables),
                       look_up_one(index[1], negative[1], tables + TABLE));
}

template <int ROWS>
TARGET_INLINE void accumulate_8(const GroupBlock& block, int64_t n, const float* tables, double* y, int64_t y_stride) {
  const __m256i lanes = first(block.outputs - n);
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const int32_t* weight = block.weight + n;
  __m256 sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = _mm256_setzero_ps();
  for (int64_t k = 0; k < block.words; ++k, tables += NIBBLES * TABLE, weight += block.row_stride) {
    _mm_prefetch(reinterpret_cast<const char*>(weight) + 1024, _MM_HINT_T0);
    const __m256i word = _mm256_maskload_epi32(weight, lanes);
    const __m256i mirrored = _mm256_andnot_si256(word, _mm256_set1_epi32(static_cast<int32_t>(0x88888888u)));
    const __m256i entry = _mm256_xor_si256(word, _mm256_sub_epi32(mirrored, _mm256_srli_epi32(mirrored, 3)));
    const __m256i index[NIBBLES] = {
        entry,
        _mm256_srli_epi32(entry, 4),
        _mm256_srli_epi32(entry, 8),
        _mm256_srli_epi32(entry, 12),
        _mm256_srli_epi32(entry, 16),
        _mm256_srli_epi32(entry, 20),
        _mm256_srli_epi32(entry, 24),
        _mm256_srli_epi32(entry, 28),
    };
    const __m256i negative[NIBBLES] = {
        _mm256_and_si256(_mm256_slli_epi32(mirrored, 28), sign),
        _mm256_and_si256(_mm256_slli_epi32(mirrored, 24), sign),
        _mm256_and_si256(_mm256_slli_epi32(mirrored, 20), sign),
        _mm256_and_si256(_mm256_slli_epi32(mirrored, 16), sign),
        _mm256_and_si256(_mm256_slli_epi32(mirrored, 12), sign),
        _mm256_and_si256(_mm256_slli_epi32(mirrored, 8), sign),
        _mm256_and_si256(_mm256_slli_epi32(mirrored, 4), sign),
        _mm256_and_si256(mirrored, sign),
    };
    for (int r = 0; r < ROWS; ++r) {
      const float* t = tables + r * BLOCK_WORDS * NIBBLES * TABLE;
      const __m256 low = _mm256_add_ps(look_up_two(index, negative, t),
                                       look_up_two(index + 2, negative + 2, t + 2 * TABLE));
      const __m256 high = _mm256_add_ps(look_up_two(index + 4, negative + 4, t + 4 * TABLE),
                                        look_up_two(index + 6, negative + 6, t + 6 * TABLE));
      sums[r] = _mm256_add_ps(sums[r], _mm256_add_ps(low, high));
    }
  }
  const __m256 scale = _mm256_loadu_ps(block.scales + n);
  if (block.zeros) {
    const __m256 offset = _mm256_fnmadd_ps(scale, _mm256_set1_ps(block.middle), _mm256_loadu_ps(block.zeros + n));
    for (int r = 0; r < ROWS; ++r, y += y_stride) {
      add_to(y + n, _mm256_fnmadd_ps(offset, _mm256_set1_ps(block.sums[r]), _mm256_mul_ps(scale, sums[r])));
    }
  } else {
    for (int r = 0; r < ROWS; ++r, y += y_stride) {
      add_to(y + n, _mm256_mul_ps(scale, _mm256_sub_ps(sums[r], _mm256_set1_ps(block.sums[r]))));
    }
  }
}

template <int ROWS>
TARGET void accumulate_rows(const GroupBlock& block, const float* tables, double* y, int64_t y_stride) {
  for (int64_t n = 0; n < block.outputs; n += 8) accumulate_8<ROWS>(block, n, tables, y, y_stride);
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
  const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
  for (int64_t n = 0; n < TILE_OUTPUTS; n += 8) {
    const __m256i lanes = first(outputs - n);
    __m256 scale = _mm256_maskload_ps(scales + n, lanes);
    __m256 offset = zeros ? _mm256_maskload_ps(zeros + n, lanes) : _mm256_mul_ps(scale, _mm256_set1_ps(zero_point));
    __m256i words[9];  // one more than there can be, so that the word after the last exists
    for (int64_t w = 0; w < bits; ++w) {
      words[w] = _mm256_maskload_epi32(weight + w * row_stride + n, lanes);
      // These pieces of rows lie too far apart for the processor to guess the next ones.
      _mm_prefetch(reinterpret_cast<const char*>(weight + (w + 2 * bits) * row_stride + n), _MM_HINT_T0);
    }
    words[bits] = _mm256_setzero_si256();
    for (int64_t j = 0; j < WORD; ++j) {
      const int64_t word = j * bits / 32, shift = j * bits % 32;
      __m256i code = _mm256_srl_epi32(words[word], _mm_cvtsi64_si128(shift));
      if (shift + bits > 32) {
        code = _mm256_or_si256(code, _mm256_sll_epi32(words[word + 1], _mm_cvtsi64_si128(32 - shift)));
      }
      if (at) {
        scale = _mm256_maskload_ps(scales + at[j] + n, lanes);
        offset = zeros ? _mm256_maskload_ps(zeros + at[j] + n, lanes)
                       : _mm256_mul_ps(scale, _mm256_set1_ps(zero_point));
      }
      const __m256 q = _mm256_cvtepi32_ps(_mm256_and_si256(code, mask));
      _mm256_store_ps(W + j * TILE_OUTPUTS + n, _mm256_fmsub_ps(scale, q, offset));
    }
  }
}

template <int ROWS>
TARGET_INLINE void multiply_rows(const float* x, int64_t x_stride, const float* W, int64_t inputs, double* y,
                                 int64_t y_stride) {
  constexpr int COLUMNS = 2;
  __m256 sums[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < inputs; ++k, W += TILE_OUTPUTS) {
    __m256 w[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) w[c] = _mm256_load_ps(W + 8 * c);
    for (int r = 0; r < ROWS; ++r) {
      const __m256 value = _mm256_broadcast_ss(x + r * x_stride + k);
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = _mm256_fmadd_ps(value, w[c], sums[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) add_to(y + r * y_stride + 8 * c, sums[r][c]);
  }
}

TARGET void multiply(const float* x, int64_t x_stride, int64_t rows, const float* W, int64_t inputs, double* y,
                     int64_t y_stride) {
  constexpr int ROWS = 6;  // their 12 sums, 2 registers of W and one of x: 15 of 16
  for (int64_t n = 0; n < TILE_OUTPUTS; n += 16) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) {
      multiply_rows<ROWS>(x + r * x_stride, x_stride, W + n, inputs, y + r * y_stride + n, y_stride);
    }
    for (; r + 2 <= rows; r += 2) {
      multiply_rows<2>(x + r * x_stride, x_stride, W + n, inputs, y + r * y_stride + n, y_stride);
    }
    if (r < rows) multiply_rows<1>(x + r * x_stride, x_stride, W + n, inputs, y + r * y_stride + n, y_stride);
  }
}

}  // namespace

const MpqKernels avx2_mpq_kernels = {&avx2_kernels, accumulate, expand, multiply};

}  // namespace hf_onebit
#endif
