// What a backward pass adds to the forward's kernels: a square of 32 words of 32 bits is four registers, and of the
// five steps that transpose it two are between them and three are within each.
#include "kernels.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#include <algorithm>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define TARGET_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline

namespace hf_onebit {
namespace {

constexpr int64_t STREAMS = 8;  // squares side by side: 1 KiB is read at a time, and as many rows are written

TARGET_INLINE __m256i select(__m256i chosen, __m256i then, __m256i otherwise) {
  return _mm256_or_si256(_mm256_and_si256(chosen, then), _mm256_andnot_si256(chosen, otherwise));
}

template <int DISTANCE>
TARGET_INLINE void trade_between(__m256i& low, __m256i& high, uint32_t stays) {
  const __m256i own = _mm256_set1_epi32(static_cast<int32_t>(stays));
  const __m256i moved = select(own, _mm256_srli_epi32(low, DISTANCE), high);
  low = select(own, low, _mm256_slli_epi32(high, DISTANCE));
  high = moved;
}

// Lane i takes from lane i ^ distance, which is `partner`, the bits whose number differs from i at `distance`.
template <int DISTANCE>
TARGET_INLINE __m256i trade(__m256i word, __m256i partner, uint32_t stays) {
  const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), distance = _mm256_set1_epi32(DISTANCE);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(numbers, distance), distance);
  const __m256i own = _mm256_xor_si256(_mm256_set1_epi32(static_cast<int32_t>(stays)), set);
  const __m256i moved =
      select(set, _mm256_srli_epi32(partner, DISTANCE), _mm256_slli_epi32(partner, DISTANCE));
  return select(own, word, moved);
}

TARGET_INLINE __m256i within(__m256i word) {
  word = trade<4>(word, _mm256_permute2x128_si256(word, word, 0x01), 0x0f0f0f0fu);
  word = trade<2>(word, _mm256_shuffle_epi32(word, 0x4e), 0x33333333u);
  return trade<1>(word, _mm256_shuffle_epi32(word, 0xb1), 0x55555555u);
}

TARGET_INLINE __m256i load_8(const int32_t* source, int64_t left) {
  if (left >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t count = static_cast<int32_t>(std::max<int64_t>(left, 0));
  return _mm256_maskload_epi32(source, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), numbers));
}

TARGET_INLINE void transpose_32(const int32_t* source, int64_t left, int32_t* target) {
  __m256i word[4];
  for (int i = 0; i < 4; ++i) word[i] = load_8(source + 8 * i, left - 8 * i);
  trade_between<16>(word[0], word[2], 0x0000ffffu);
  trade_between<16>(word[1], word[3], 0x0000ffffu);
  trade_between<8>(word[0], word[1], 0x00ff00ffu);
  trade_between<8>(word[2], word[3], 0x00ff00ffu);
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 8 * i), within(word[i]));
}

}  // namespace

TARGET void avx2_transpose(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, int32_t* target,
                           int64_t target_stride) {
  for (int64_t n = 0; n < outputs; n += STREAMS * WORD, target += STREAMS * target_stride) {
    const int64_t end = std::min(outputs, n + STREAMS * WORD);
    for (int64_t k = 0; k < words; ++k) {
      int32_t* square = target + k * WORD;
      for (int64_t i = n; i < end; i += WORD, square += target_stride) {
        transpose_32(weight + k * row_stride + i, outputs - i, square);
      }
    }
  }
}

TARGET void avx2_add_products(const float* u, const float* v, int64_t n, double* sums) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const __m256d product = _mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(u + i)), _mm256_cvtps_pd(_mm_loadu_ps(v + i)));
    _mm256_storeu_pd(sums + i, _mm256_add_pd(_mm256_loadu_pd(sums + i), product));
  }
  scalar_add_products(u + i, v + i, n - i, sums + i);
}

}  // namespace hf_onebit
#endif
