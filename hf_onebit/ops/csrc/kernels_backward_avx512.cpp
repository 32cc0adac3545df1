// What a backward pass adds to the forward's kernels: a square of 32 words of 32 bits is two registers, and of the
// five steps that transpose it one is between them and four are within each.
#include "kernels.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#include <algorithm>

#define TARGET __attribute__((target("avx512f")))
#define TARGET_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace hf_onebit {
namespace {

constexpr int64_t STREAMS = 8;  // squares side by side: 1 KiB is read at a time, and as many rows are written

TARGET_INLINE __m512i select(__m512i chosen, __m512i then, __m512i otherwise) {
  return _mm512_ternarylogic_epi32(chosen, then, otherwise, 0xca);
}

// Lane i takes from lane i ^ distance, which is `partner`, the bits whose number differs from i at `distance`.
template <int DISTANCE>
TARGET_INLINE __m512i trade(__m512i word, __m512i partner, uint32_t stays) {
  constexpr __mmask16 set = DISTANCE == 8 ? 0xff00 : DISTANCE == 4 ? 0xf0f0 : DISTANCE == 2 ? 0xcccc : 0xaaaa;
  const __m512i count = _mm512_mask_mov_epi32(_mm512_set1_epi32(DISTANCE), set, _mm512_set1_epi32(32 - DISTANCE));
  const __m512i own = _mm512_mask_mov_epi32(_mm512_set1_epi32(static_cast<int32_t>(stays)), set,
                                            _mm512_set1_epi32(static_cast<int32_t>(~stays)));
  return select(own, word, _mm512_rolv_epi32(partner, count));
}

TARGET_INLINE __m512i within(__m512i word) {
  word = trade<8>(word, _mm512_shuffle_i32x4(word, word, 0x4e), 0x00ff00ffu);
  word = trade<4>(word, _mm512_shuffle_i32x4(word, word, 0xb1), 0x0f0f0f0fu);
  word = trade<2>(word, _mm512_shuffle_epi32(word, static_cast<_MM_PERM_ENUM>(0x4e)), 0x33333333u);
  return trade<1>(word, _mm512_shuffle_epi32(word, static_cast<_MM_PERM_ENUM>(0xb1)), 0x55555555u);
}

TARGET_INLINE void transpose_32(__m512i first, __m512i second, int32_t* target) {
  const __m512i low_half = _mm512_set1_epi32(0xffff);
  const __m512i low = select(low_half, first, _mm512_slli_epi32(second, 16));
  const __m512i high = select(low_half, _mm512_srli_epi32(first, 16), second);
  _mm512_storeu_si512(target, within(low));
  _mm512_storeu_si512(target + 16, within(high));
}

TARGET_INLINE __mmask16 lanes(int64_t n) {
  return static_cast<__mmask16>((1u << std::min<int64_t>(std::max<int64_t>(n, 0), 16)) - 1u);
}

}  // namespace

TARGET void avx512_transpose(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs,
                             int32_t* target, int64_t target_stride) {
  for (int64_t n = 0; n < outputs; n += STREAMS * WORD, target += STREAMS * target_stride) {
    const int64_t end = std::min(outputs, n + STREAMS * WORD);
    for (int64_t k = 0; k < words; ++k) {
      const int32_t* source = weight + k * row_stride;
      int32_t* square = target + k * WORD;
      for (int64_t i = n; i < end; i += WORD, square += target_stride) {
        transpose_32(_mm512_maskz_loadu_epi32(lanes(outputs - i), source + i),
                     _mm512_maskz_loadu_epi32(lanes(outputs - i - 16), source + i + 16), square);
      }
    }
  }
}

TARGET void avx512_add_products(const float* u, const float* v, int64_t n, double* sums) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m512d product =
        _mm512_mul_pd(_mm512_cvtps_pd(_mm256_loadu_ps(u + i)), _mm512_cvtps_pd(_mm256_loadu_ps(v + i)));
    _mm512_storeu_pd(sums + i, _mm512_add_pd(_mm512_loadu_pd(sums + i), product));
  }
  scalar_add_products(u + i, v + i, n - i, sums + i);
}

}  // namespace hf_onebit
#endif
