// The loops of packed_step_strip.h with AVX2.
#include "packed_step.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))
#define OWN_PHILOX

namespace hf_onebit {
namespace {

// As with AVX-512, of columns 0, 2, 4, 6 of eight in one register and of the others in another: so they are joined again
// by one shift and one blend.
TARGET __attribute__((always_inline)) inline void philox(uint32_t quad, uint32_t column, uint32_t count,
                                                         uint32_t stream, uint64_t seed, uint32_t* words) {
  constexpr int SETS = 2, LANES = 8;
  const __m256i left_factor = _mm256_set1_epi64x(PHILOX_LEFT), right_factor = _mm256_set1_epi64x(PHILOX_RIGHT);
  for (int64_t n = 0; n < STRIP; n += LANES) {
    __m256i c[4][SETS];
    for (int s = 0; s < SETS; ++s) {
      const uint32_t first = column + static_cast<uint32_t>(n + s);
      c[0][s] = _mm256_set1_epi64x(quad);
      c[1][s] = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(6, 4, 2, 0));
      c[2][s] = _mm256_set1_epi64x(count);
      c[3][s] = _mm256_set1_epi64x(stream);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_KEY0, k1 += PHILOX_KEY1) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      for (int s = 0; s < SETS; ++s) {
        const __m256i left = _mm256_mul_epu32(c[0][s], left_factor), right = _mm256_mul_epu32(c[2][s], right_factor);
        c[0][s] = _mm256_xor_si256(_mm256_srli_epi64(right, 32), _mm256_xor_si256(c[1][s], key0));
        c[2][s] = _mm256_xor_si256(_mm256_srli_epi64(left, 32), _mm256_xor_si256(c[3][s], key1));
        c[1][s] = right;
        c[3][s] = left;
      }
    }
    for (int i = 0; i < 4; ++i) {
      const __m256i joined = _mm256_blend_epi32(c[i][0], _mm256_slli_epi64(c[i][1], 32), 0xaa);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i * STRIP + n), joined);
    }
  }
}

}  // namespace
}  // namespace hf_onebit

#include "packed_step_strip.h"

namespace hf_onebit {

void avx2_packed_strip(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally) {
  strip(step, first, n, memory, tally);
}

}  // namespace hf_onebit
#endif
