// AVX-512F: a table is one register, and one vpermps looks up a nibble of 16 neighbouring outputs. vpermps reads
// only the low four bits of each index, so a nibble needs a shift and no mask.
#include "kernels.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f")))
#define TARGET_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace hf_onebit {
namespace {

TARGET_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

TARGET void to_float(const void* source, Dtype dtype, int64_t n, float* target) {
  if (dtype == Dtype::f64) return scalar_kernels.to_float(source, dtype, n, target);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512 value;
    if (dtype == Dtype::f32) {
      value = _mm512_loadu_ps(static_cast<const float*>(source) + i);
    } else {
      const __m256i half = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(source) + i));
      value = dtype == Dtype::f16
                  ? _mm512_cvtph_ps(half)
                  : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    _mm512_storeu_ps(target + i, value);
  }
  scalar_kernels.to_float(static_cast<const char*>(source) + i * size_of(dtype), dtype, n - i, target + i);
}

TARGET_INLINE __m256i bf16_of(__m512 value) {  // as bf16_of_float
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

TARGET void from_double(const double* source, int64_t n, Dtype dtype, void* target) {
  int64_t i = 0;
  for (; i + 16 <= n && dtype != Dtype::f64; i += 16) {
    const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(source + i));
    const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(source + i + 8));
    const __m512 value = _mm512_castpd_ps(
        _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(low)), _mm256_castps_pd(high), 1));
    if (dtype == Dtype::f32) {
      _mm512_storeu_ps(static_cast<float*>(target) + i, value);
    } else {
      const __m256i half = dtype == Dtype::f16
                               ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                               : bf16_of(value);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(target) + i), half);
    }
  }
  scalar_kernels.from_double(source + i, n - i, dtype, static_cast<char*>(target) + i * size_of(dtype));
}

// u in every lane, negated where bit i of the lane's number is clear.
TARGET_INLINE __m512 signed_copies(const float* u, __mmask16 negative) {
  const __m512i bits = _mm512_castps_si512(_mm512_set1_ps(*u));
  return _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, negative, bits, _mm512_set1_epi32(INT32_MIN)));
}

TARGET void build_tables(const float* u, int64_t words, float* tables) {
  for (int64_t nibble = 0; nibble < words * NIBBLES; ++nibble, u += 4, tables += TABLE) {
    const __m512 low = _mm512_add_ps(signed_copies(u, 0x5555), signed_copies(u + 1, 0x3333));
    const __m512 high = _mm512_add_ps(signed_copies(u + 2, 0x0f0f), signed_copies(u + 3, 0x00ff));
    _mm512_store_ps(tables, _mm512_add_ps(low, high));
  }
}

TARGET_INLINE __m512 look_up_two(const __m512i* index, const float* tables) {
  return _mm512_add_ps(_mm512_permutexvar_ps(index[0], _mm512_load_ps(tables)),
                       _mm512_permutexvar_ps(index[1], _mm512_load_ps(tables + TABLE)));
}

TARGET_INLINE __m512 look_up(const __m512i* index, const float* tables) {
  return _mm512_add_ps(
      _mm512_add_ps(look_up_two(index, tables), look_up_two(index + 2, tables + 2 * TABLE)),
      _mm512_add_ps(look_up_two(index + 4, tables + 4 * TABLE), look_up_two(index + 6, tables + 6 * TABLE)));
}

template <int I>
TARGET_INLINE __m512 entry(__m512i word, const __m512* table) {
  return _mm512_permutexvar_ps(I ? _mm512_srli_epi32(word, 4 * I) : word, table[I]);
}

// As look_up, with a word's tables in registers.
TARGET_INLINE __m512 look_up_word(__m512i word, const __m512* table) {
  return _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(entry<0>(word, table), entry<1>(word, table)),
                                     _mm512_add_ps(entry<2>(word, table), entry<3>(word, table))),
                       _mm512_add_ps(_mm512_add_ps(entry<4>(word, table), entry<5>(word, table)),
                                     _mm512_add_ps(entry<6>(word, table), entry<7>(word, table))));
}

TARGET_INLINE void add_to_totals(__m512 sums, double* totals) {
  const __m256 low = _mm512_castps512_ps256(sums);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums), 1));
  _mm512_storeu_pd(totals, _mm512_add_pd(_mm512_loadu_pd(totals), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(totals + 8, _mm512_add_pd(_mm512_loadu_pd(totals + 8), _mm512_cvtps_pd(high)));
}

// 16 outputs: the sums stay in registers over the block, the shifted words serve all rows.
template <int ROWS>
TARGET_INLINE void accumulate_16(const int32_t* weight, int64_t row_stride, int64_t words, __mmask16 lanes,
                                 const float* tables, double* totals, int64_t totals_stride) {
  __m512 sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_setzero_ps();
  for (int64_t k = 0; k < words; ++k, tables += NIBBLES * TABLE, weight += row_stride) {
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
      const __m512 sum = look_up(index, tables + r * BLOCK_WORDS * NIBBLES * TABLE);
      sums[r] = _mm512_add_ps(sums[r], sum);
    }
  }
  for (int r = 0; r < ROWS; ++r) add_to_totals(sums[r], totals + r * totals_stride);
}

// One row. The tables of two words fill half the registers, and whole rows of words stream past them. The sums lie in
// L1; they are those of accumulate_16, in the same order.
template <int WORDS>
TARGET_INLINE void add_word_rows(const int32_t* weight, int64_t row_stride, int64_t outputs, const float* tables,
                                 float* sums) {
  __m512 table[WORDS][NIBBLES];
  for (int64_t i = 0; i < WORDS * NIBBLES; ++i) table[i / NIBBLES][i % NIBBLES] = _mm512_load_ps(tables + i * TABLE);
  int64_t n = 0;
  for (; n + 16 <= outputs; n += 16, weight += 16) {
    __m512 sum = _mm512_load_ps(sums + n);
    for (int k = 0; k < WORDS; ++k) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + k * row_stride) + 1024, _MM_HINT_T0);
      __m512i word = _mm512_loadu_si512(weight + k * row_stride);
      __asm__("" : "+v"(word));  // or every shift would load it again
      sum = _mm512_add_ps(sum, look_up_word(word, table[k]));
    }
    _mm512_store_ps(sums + n, sum);
  }
  if (n == outputs) return;
  __m512 sum = _mm512_load_ps(sums + n);
  for (int k = 0; k < WORDS; ++k) {
    const __m512i word = _mm512_maskz_loadu_epi32(first(outputs - n), weight + k * row_stride);
    sum = _mm512_add_ps(sum, look_up_word(word, table[k]));
  }
  _mm512_store_ps(sums + n, sum);
}

TARGET void accumulate_one(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs,
                           const float* tables, double* totals) {
  constexpr int64_t STRIP = 4096;  // outputs: 16 KiB of sums
  alignas(64) float sums[STRIP];
  for (int64_t begin = 0; begin < outputs; begin += STRIP, weight += STRIP, totals += STRIP) {
    const int64_t n = outputs - begin < STRIP ? outputs - begin : STRIP;
    for (int64_t i = 0; i < n; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());
    int64_t k = 0;
    for (; k + 2 <= words; k += 2) {
      add_word_rows<2>(weight + k * row_stride, row_stride, n, tables + k * NIBBLES * TABLE, sums);
    }
    if (k < words) add_word_rows<1>(weight + k * row_stride, row_stride, n, tables + k * NIBBLES * TABLE, sums);
    for (int64_t i = 0; i < n; i += 16) add_to_totals(_mm512_load_ps(sums + i), totals + i);
  }
}

template <int ROWS>
TARGET void accumulate_rows(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs,
                            const float* tables, double* totals, int64_t totals_stride) {
  int64_t n = 0;
  for (; n + 16 <= outputs; n += 16) {
    accumulate_16<ROWS>(weight + n, row_stride, words, 0xffff, tables, totals + n, totals_stride);
  }
  if (n < outputs) {
    accumulate_16<ROWS>(weight + n, row_stride, words, first(outputs - n), tables, totals + n, totals_stride);
  }
}

void accumulate(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, const float* tables,
                int64_t rows, double* totals, int64_t totals_stride) {
  static_assert(MAX_ROWS == 4, "one case for each number of rows");
  switch (rows) {
    case 1: return accumulate_one(weight, row_stride, words, outputs, tables, totals);
    case 2: return accumulate_rows<2>(weight, row_stride, words, outputs, tables, totals, totals_stride);
    case 3: return accumulate_rows<3>(weight, row_stride, words, outputs, tables, totals, totals_stride);
    default: return accumulate_rows<4>(weight, row_stride, words, outputs, tables, totals, totals_stride);
  }
}

}  // namespace

const Kernels avx512_kernels = {"avx512",    to_float,         from_double,          build_tables,
                               accumulate, avx512_transpose, avx512_add_products};

}  // namespace hf_onebit
#endif
