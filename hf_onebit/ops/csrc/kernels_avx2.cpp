// AVX2: a permutation looks up among eight entries only, so a table keeps the half with +u3 and the other half is
// its mirror image: the entry of nibble q with bit 3 clear is minus the entry of ~q.
#include "half_avx2.h"
#include "kernels.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define TARGET_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline

namespace hf_onebit {
namespace {

TARGET void to_float(const void* source, Dtype dtype, int64_t n, float* target) {
  if (dtype == Dtype::f64) return scalar_kernels.to_float(source, dtype, n, target);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 value;
    if (dtype == Dtype::f32) {
      value = _mm256_loadu_ps(static_cast<const float*>(source) + i);
    } else {
      const __m128i half =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(source) + i));
      value = dtype == Dtype::f16 ? _mm256_cvtph_ps(half)
                                  : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    _mm256_storeu_ps(target + i, value);
  }
  scalar_kernels.to_float(static_cast<const char*>(source) + i * size_of(dtype), dtype, n - i, target + i);
}

TARGET void from_double(const double* source, int64_t n, Dtype dtype, void* target) {
  int64_t i = 0;
  for (; i + 8 <= n && dtype != Dtype::f64; i += 8) {
    const __m128 low = _mm256_cvtpd_ps(_mm256_loadu_pd(source + i));
    const __m128 high = _mm256_cvtpd_ps(_mm256_loadu_pd(source + i + 4));
    const __m256 value = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
    if (dtype == Dtype::f32) {
      _mm256_storeu_ps(static_cast<float*>(target) + i, value);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(target) + i), avx2::half_of(value, dtype));
    }
  }
  scalar_kernels.from_double(source + i, n - i, dtype, static_cast<char*>(target) + i * size_of(dtype));
}

// The eight entries with bit 3 set; the second half of a table's room is unused.
TARGET void build_tables(const float* u, int64_t words, float* tables) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256 negative_0 = _mm256_blend_ps(sign, _mm256_setzero_ps(), 0xaa);
  const __m256 negative_1 = _mm256_blend_ps(sign, _mm256_setzero_ps(), 0xcc);
  const __m256 negative_2 = _mm256_blend_ps(sign, _mm256_setzero_ps(), 0xf0);
  for (int64_t nibble = 0; nibble < words * NIBBLES; ++nibble, u += 4, tables += TABLE) {
    const __m256 low = _mm256_add_ps(_mm256_xor_ps(_mm256_set1_ps(u[0]), negative_0),
                                     _mm256_xor_ps(_mm256_set1_ps(u[1]), negative_1));
    const __m256 high = _mm256_add_ps(_mm256_xor_ps(_mm256_set1_ps(u[2]), negative_2), _mm256_set1_ps(u[3]));
    _mm256_store_ps(tables, _mm256_add_ps(low, high));
  }
}

TARGET_INLINE __m256 look_up_one(__m256i index, __m256i negative, const float* table) {
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(_mm256_load_ps(table), index), _mm256_castsi256_ps(negative));
}

TARGET_INLINE __m256 look_up_two(const __m256i* index, const __m256i* negative, const float* tables) {
  return _mm256_add_ps(look_up_one(index[0], negative[0], tables),
                       look_up_one(index[1], negative[1], tables + TABLE));
}

template <int ROWS>
TARGET_INLINE void accumulate_8(const int32_t* weight, int64_t row_stride, int64_t words, __m256i lanes,
                                const float* tables, double* totals, int64_t totals_stride) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  __m256 sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = _mm256_setzero_ps();
  for (int64_t k = 0; k < words; ++k, tables += NIBBLES * TABLE, weight += row_stride) {
    _mm_prefetch(reinterpret_cast<const char*>(weight) + 1024, _MM_HINT_T0);
    const __m256i word = _mm256_maskload_epi32(weight, lanes);
    // 8 in every nibble whose bit 3 is clear; minus its eighth that is 7, the bits to complement.
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
      const __m256 sum = _mm256_add_ps(low, high);
      sums[r] = _mm256_add_ps(sums[r], sum);
    }
  }
  for (int r = 0; r < ROWS; ++r, totals += totals_stride) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(sums[r]));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(sums[r], 1));
    _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), low));
    _mm256_storeu_pd(totals + 4, _mm256_add_pd(_mm256_loadu_pd(totals + 4), high));
  }
}

template <int ROWS>
TARGET void accumulate_rows(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs,
                            const float* tables, double* totals, int64_t totals_stride) {
  const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t n = 0; n < outputs; n += 8) {
    const int32_t left = static_cast<int32_t>(outputs - n < 8 ? outputs - n : 8);
    const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), numbers);
    accumulate_8<ROWS>(weight + n, row_stride, words, lanes, tables, totals + n, totals_stride);
  }
}

void accumulate(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, const float* tables,
                int64_t rows, double* totals, int64_t totals_stride) {
  static_assert(MAX_ROWS == 4, "one case for each number of rows");
  switch (rows) {
    case 1: return accumulate_rows<1>(weight, row_stride, words, outputs, tables, totals, totals_stride);
    case 2: return accumulate_rows<2>(weight, row_stride, words, outputs, tables, totals, totals_stride);
    case 3: return accumulate_rows<3>(weight, row_stride, words, outputs, tables, totals, totals_stride);
    default: return accumulate_rows<4>(weight, row_stride, words, outputs, tables, totals, totals_stride);
  }
}

}  // namespace

const Kernels avx2_kernels = {"avx2",    to_float,         from_double,          build_tables,
                             accumulate, avx2_transpose, avx2_add_products, &avx2_units};

}  // namespace hf_onebit
#endif
