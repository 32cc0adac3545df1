#include "matrix_avx512.h"

#ifdef HF_ONEBIT_X86
#define TARGET __attribute__((target("avx512f,avx512bw")))
#define TARGET_INLINE __attribute__((target("avx512f,avx512bw"), always_inline)) inline

namespace hf_onebit::avx512 {
namespace {

// 64 codes of 16 bits to bytes; `places` undoes the order in which packing takes lanes.
TARGET_INLINE void store_bytes(__m512i low, __m512i high, __m512i places, int8_t* target) {
  _mm512_storeu_si512(target, _mm512_permutexvar_epi32(places, _mm512_packs_epi16(low, high)));
}

}  // namespace

TARGET float scale_inputs(const float* b, int64_t n, float* u) {
  const __m512i magnitude = _mm512_set1_epi32(INT32_MAX);
  __m512i most = _mm512_setzero_si512();  // compared as integers, in which infinity and NaN are the largest
  for (int64_t k = 0; k < n; k += 16) {
    const __mmask16 valid = lanes(n - k);
    const __m512 product = _mm512_mul_ps(_mm512_maskz_loadu_ps(valid, u + k), _mm512_maskz_loadu_ps(valid, b + k));
    _mm512_mask_storeu_ps(u + k, valid, product);
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(product), magnitude));
  }
  const int32_t bits = _mm512_reduce_max_epi32(most);
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
}

TARGET float quantize(float* u, int64_t n, float inverse, int digits, int8_t* high, int8_t* low, int64_t stride,
                      int32_t* sum) {
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i half = _mm512_set1_epi16(128);
  const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i sums = _mm512_setzero_si512();
  __m512 error = _mm512_setzero_ps(), all = _mm512_setzero_ps();
  for (int64_t k = 0; k < n; k += TILE_INPUTS, high += stride, low += stride) {
    __m512i code[4];
    for (int j = 0; j < 4; ++j) {
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(u + k + 16 * j), factor);
      code[j] = _mm512_cvtps_epi32(value);
      sums = _mm512_add_epi32(sums, code[j]);
      if (digits == 2) {
        const __m512 rest = _mm512_sub_ps(value, _mm512_cvtepi32_ps(code[j]));
        _mm512_storeu_ps(u + k + 16 * j, rest);
        error = _mm512_add_ps(error, _mm512_abs_ps(rest));
        all = _mm512_add_ps(all, _mm512_abs_ps(value));
      }
    }
    const __m512i first = _mm512_packs_epi32(code[0], code[1]), second = _mm512_packs_epi32(code[2], code[3]);
    if (digits == 1) {
      store_bytes(first, second, places, high);
    } else {
      store_bytes(_mm512_srai_epi16(_mm512_add_epi16(first, half), 8),
                  _mm512_srai_epi16(_mm512_add_epi16(second, half), 8), places, high);
      store_bytes(_mm512_srai_epi16(_mm512_slli_epi16(first, 8), 8),
                  _mm512_srai_epi16(_mm512_slli_epi16(second, 8), 8), places, low);
    }
  }
  *sum = _mm512_reduce_add_epi32(sums);
  if (digits == 1) return 0.0f;
  const float whole = _mm512_reduce_add_ps(all);
  return whole > 0.0f ? _mm512_reduce_add_ps(error) / whole : 0.0f;
}

}  // namespace hf_onebit::avx512
#endif
