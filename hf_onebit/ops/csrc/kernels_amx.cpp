// AMX: matrix units for many rows of float16 or bfloat16. Fewer rows, and float32, are left to AVX-512.
//
// Signs are exact in bfloat16. An input b x is not, so it goes in as two bfloat16 numbers, itself rounded and the
// rest rounded: 2^-18 of it is lost at most. The tile of 32 inputs by 16 outputs that the units want has two
// inputs to a dword: one vpermd over the words, shifted, makes a line of it.
#include "kernels.h"

#if defined(HF_ONEBIT_X86) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#define TARGET __attribute__((target("avx512f,amx-tile,amx-bf16")))
#define TARGET_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace hf_onebit {
namespace {

constexpr int64_t TILE = TILE_ROWS * WORD;  // bfloat16 numbers in a tile
constexpr int64_t STEP = 8;                 // word rows expanded at once: 32 KiB of signs, which stay in L1

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

TARGET_INLINE __m512i rounded(__m512 value) {  // to bfloat16, in the low half of each dword
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i result =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(result, nan, _mm512_set1_epi32(0x7fc0));
}

TARGET void split_row(const float* u, int64_t words, uint16_t* parts, int64_t tiles) {
  for (int64_t k = 0; k < words; ++k, u += WORD, parts += tiles * TILE_PARTS * TILE) {
    for (int64_t j = 0; j < WORD; j += 16) {
      const __m512 value = _mm512_loadu_ps(u + j);
      const __m512i high = rounded(value);
      const __m512 high_value = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
      // An infinity has no rest, and infinity minus infinity would make a NaN of it.
      const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(high_value),
                                                  _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000)), _CMP_LT_OQ);
      const __m512i low = rounded(_mm512_maskz_sub_ps(finite, value, high_value));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts + j), _mm512_cvtepi32_epi16(high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts + TILE + j), _mm512_cvtepi32_epi16(low));
    }
  }
}

// The tiles of TILE_OUTPUTS outputs for one word row: +1 and -1 in bfloat16.
TARGET_INLINE void expand(const int32_t* weight, int64_t outputs, uint16_t* signs) {
  // Entry m: the signs that bits 0 and 1 of m stand for; the index's two further bits must not matter.
  const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi32(
      static_cast<int32_t>(0xbf80bf80u), static_cast<int32_t>(0xbf803f80u), 0x3f80bf80, 0x3f803f80));
  for (int64_t n = 0; n < TILE_OUTPUTS; n += 16, signs += TILE) {
    const int64_t left = std::min<int64_t>(std::max<int64_t>(outputs - n, 0), 16);
    __m512i word = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << left) - 1u), weight + n);
    for (int64_t line = 0; line < TILE_ROWS; ++line) {
      _mm512_store_si512(signs + line * WORD, _mm512_permutexvar_epi32(word, pairs));
      word = _mm512_srli_epi32(word, 2);
    }
  }
}

// 16 rows by 64 outputs over `words` word rows, added to sums, which are tiles 0..3. The signs come from L1, the
// inputs from L2: so it is the inputs that are loaded once, and each sum has two products in a row to wait for.
TARGET void multiply_tile(const uint16_t* parts, int64_t word_stride, const uint16_t* signs, int64_t words,
                          float* sums) {
  constexpr int64_t LINE = TILE_OUTPUTS * sizeof(float);
  _tile_loadd(0, sums, LINE);
  _tile_loadd(1, sums + 16, LINE);
  _tile_loadd(2, sums + 32, LINE);
  _tile_loadd(3, sums + 48, LINE);
  for (int64_t k = 0; k < words; ++k, parts += word_stride, signs += 4 * TILE) {
    _tile_loadd(4, parts, 64);
    _tile_loadd(5, parts + TILE, 64);
    _tile_loadd(6, signs, 64);
    _tile_loadd(7, signs + TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, signs + 2 * TILE, 64);
    _tile_loadd(7, signs + 3 * TILE, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, LINE);
  _tile_stored(1, sums + 16, LINE);
  _tile_stored(2, sums + 32, LINE);
  _tile_stored(3, sums + 48, LINE);
}

TARGET void multiply(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs,
                     const uint16_t* parts, int64_t tiles, float* sums) {
  alignas(64) uint16_t signs[STEP * 4 * TILE];
  // Other libraries configure tiles too and may rely on finding theirs.
  Configuration ours, theirs;
  _tile_storeconfig(&theirs);
  _tile_loadconfig(&ours);
  const int64_t word_stride = tiles * TILE_PARTS * TILE;
  std::memset(sums, 0, static_cast<size_t>(tiles * TILE_ROWS * TILE_OUTPUTS) * sizeof(float));
  for (int64_t k = 0; k < words; k += STEP) {
    const int64_t count = std::min(STEP, words - k);
    for (int64_t i = 0; i < count; ++i) expand(weight + (k + i) * row_stride, outputs, signs + i * 4 * TILE);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      multiply_tile(parts + k * word_stride + tile * TILE_PARTS * TILE, word_stride, signs, count,
                    sums + tile * TILE_ROWS * TILE_OUTPUTS);
    }
  }
  if (theirs.palette) {
    _tile_loadconfig(&theirs);
  } else {
    _tile_release();
  }
}

TARGET void add_scaled(const float* scale, const float* sums, double* y) {
  for (int64_t n = 0; n < TILE_OUTPUTS; n += 8) {
    const __m512d product = _mm512_mul_pd(_mm512_cvtps_pd(_mm256_load_ps(scale + n)),
                                          _mm512_cvtps_pd(_mm256_load_ps(sums + n)));
    _mm512_store_pd(y + n, _mm512_add_pd(_mm512_load_pd(y + n), product));
  }
}

}  // namespace

bool amx_is_usable() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = (d >> 22) & 1u, tile = (d >> 24) & 1u;
  if (!bf16 || !tile) return false;
  // Linux gives a process the large registers on request only: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

const Kernels amx_kernels = {"amx",
                             avx512_kernels.to_float,
                             avx512_kernels.from_double,
                             avx512_kernels.build_tables,
                             avx512_kernels.accumulate,
                             avx512_transpose,
                             avx512_add_products,
                             12,
                             split_row,
                             multiply,
                             add_scaled};

}  // namespace hf_onebit
#elif defined(HF_ONEBIT_X86)
namespace hf_onebit {
bool amx_is_usable() { return false; }
const Kernels amx_kernels = {};
}  // namespace hf_onebit
#endif
