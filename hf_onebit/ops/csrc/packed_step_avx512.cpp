// The loops of packed_step_strip.h with AVX-512.
#include "packed_step.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#if defined(__clang__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#define OWN_PHILOX

namespace hf_onebit {
namespace {

// Each word is in the low half of 64 bits, where a product reads it; what is in the high half never matters.
TARGET __attribute__((always_inline)) inline void philox(uint32_t quad, uint32_t column, uint32_t count,
                                                         uint32_t stream, uint64_t seed, uint32_t* words) {
  constexpr int SETS = 2, LANES = 8;  // two sets in flight hide how long a product takes
  const __m512i left_factor = _mm512_set1_epi64(PHILOX_LEFT), right_factor = _mm512_set1_epi64(PHILOX_RIGHT);
  for (int64_t n = 0; n < STRIP; n += SETS * LANES) {
    __m512i c0[SETS], c1[SETS], c2[SETS], c3[SETS];
    for (int s = 0; s < SETS; ++s) {
      const uint32_t first = column + static_cast<uint32_t>(n + s * LANES);
      c0[s] = _mm512_set1_epi64(quad);
      c1[s] = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
      c2[s] = _mm512_set1_epi64(count);
      c3[s] = _mm512_set1_epi64(stream);
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round, k0 += PHILOX_KEY0, k1 += PHILOX_KEY1) {
      const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
      for (int s = 0; s < SETS; ++s) {
        const __m512i left = _mm512_mul_epu32(c0[s], left_factor), right = _mm512_mul_epu32(c2[s], right_factor);
        c0[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(right, 32), c1[s], key0, 0x96);
        c2[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(left, 32), c3[s], key1, 0x96);
        c1[s] = right;
        c3[s] = left;
      }
    }
    for (int s = 0; s < SETS; ++s) {
      uint32_t* target = words + n + s * LANES;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi64_epi32(c0[s]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + STRIP), _mm512_cvtepi64_epi32(c1[s]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 2 * STRIP), _mm512_cvtepi64_epi32(c2[s]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 3 * STRIP), _mm512_cvtepi64_epi32(c3[s]));
    }
  }
}

}  // namespace
}  // namespace hf_onebit

#include "packed_step_strip.h"

namespace hf_onebit {

void avx512_packed_strip(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally) {
  strip(step, first, n, memory, tally);
}

}  // namespace hf_onebit
#endif
