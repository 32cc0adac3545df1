// Group-quantized weights of 4 and 8 bits with AVX-512-VNNI: one instruction multiplies four unsigned bytes, which
// codes are once shifted and masked, by four signed ones. An input is four such digits of a 32-bit integer, so products
// and sums are exact and only the inputs are rounded, to 2^-30 of the largest of their block.
#include "mpq_kernels.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

#define TARGET __attribute__((target("avx512f,avx512vnni")))
#define TARGET_INLINE __attribute__((target("avx512f,avx512vnni"), always_inline)) inline

namespace hf_onebit {
namespace {

constexpr int DIGITS = 4;

TARGET_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u); }

TARGET float split(const float* x, int64_t inputs, int64_t bits, int32_t* digits) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  for (int64_t k = 0; k < inputs; k += 16) {
    const __m512 value = _mm512_abs_ps(_mm512_loadu_ps(x + k));
    unordered |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    largest = _mm512_max_ps(largest, value);
  }
  const float most = _mm512_reduce_max_ps(largest);
  if (unordered || std::isinf(most) || most == 0) {
    std::memset(digits, 0, static_cast<size_t>(inputs) * sizeof(int32_t));
    return most == 0 && !unordered ? 0.0f : std::nanf("");
  }
  // A power of two, so that scaling rounds nothing. Its exponent is bounded where the inverse must stay finite.
  int exponent;
  std::frexp(most, &exponent);
  exponent = exponent < -90 ? -90 : exponent;
  const __m512 inverse = _mm512_set1_ps(std::ldexp(1.0f, 30 - exponent));
  alignas(64) int32_t low_digits[DIGIT_ROOM];  // four signed bytes, the lowest first
  for (int64_t k = 0; k < inputs; k += 16) {
    // Adding 0x80 to each of the three lower bytes carries into the next where it is to be negative.
    const __m512i bias = _mm512_set1_epi32(0x00808080);
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), inverse));
    _mm512_store_si512(low_digits + k, _mm512_xor_si512(_mm512_add_epi32(value, bias), bias));
  }
  // The codes that a shift of `bits * part` brings to the low ends of a word's four bytes lie `parts` inputs apart.
  const int64_t parts = 8 / bits;
  for (int64_t k = 0; k < inputs; k += 4 * parts) {
    for (int64_t part = 0; part < parts; ++part, digits += DIGITS) {
      uint32_t v[4];
      for (int64_t t = 0; t < 4; ++t) v[t] = static_cast<uint32_t>(low_digits[k + t * parts + part]);
      for (int d = 0; d < DIGITS; ++d) {
        digits[d] = static_cast<int32_t>((v[0] >> 8 * d & 255u) | (v[1] >> 8 * d & 255u) << 8 |
                                         (v[2] >> 8 * d & 255u) << 16 | (v[3] >> 8 * d & 255u) << 24);
      }
    }
  }
  return std::ldexp(1.0f, exponent - 30);
}

TARGET_INLINE void add_to(double* y, __m512 value) {
  const __m256 low = _mm512_castps512_ps256(value);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1));
  _mm512_storeu_pd(y, _mm512_add_pd(_mm512_loadu_pd(y), _mm512_cvtps_pd(low)));
  _mm512_storeu_pd(y + 8, _mm512_add_pd(_mm512_loadu_pd(y + 8), _mm512_cvtps_pd(high)));
}

template <int BITS, int ROWS, int COLUMNS>
TARGET_INLINE void dot_columns(const GroupBlock& block, int64_t n, const int32_t* digits, const float* steps, double* y,
                               int64_t y_stride) {
  constexpr int PARTS = 8 / BITS;
  constexpr int64_t ROW_DIGITS = DIGIT_ROOM;
  const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(((1u << BITS) - 1u) * 0x01010101u));
  __m512i sums[ROWS][COLUMNS][DIGITS];
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < COLUMNS; ++c) {
      for (int d = 0; d < DIGITS; ++d) sums[r][c][d] = _mm512_setzero_si512();
    }
  }
  const int32_t* weight = block.weight + n;
  for (int64_t k = 0; k < block.words; ++k, weight += block.row_stride) {
    __m512i word[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + 16 * c) + 1024, _MM_HINT_T0);
      word[c] = _mm512_maskz_loadu_epi32(first(block.outputs - n - 16 * c), weight + 16 * c);
    }
    for (int part = 0; part < PARTS; ++part, digits += DIGITS) {
      for (int c = 0; c < COLUMNS; ++c) {
        const __m512i codes = BITS == 8 ? word[c] : _mm512_and_si512(_mm512_srli_epi32(word[c], BITS * part), mask);
        for (int r = 0; r < ROWS; ++r) {
          for (int d = 0; d < DIGITS; ++d) {
            sums[r][c][d] =
                _mm512_dpbusd_epi32(sums[r][c][d], codes, _mm512_set1_epi32(digits[r * ROW_DIGITS + d]));
          }
        }
      }
    }
  }
  const __m512 base = _mm512_set1_ps(256.0f);
  for (int c = 0; c < COLUMNS; ++c) {
    const __m512 scale = _mm512_loadu_ps(block.scales + n + 16 * c);
    const __m512 zero = block.zeros ? _mm512_loadu_ps(block.zeros + n + 16 * c) : scale;
    for (int r = 0; r < ROWS; ++r) {
      __m512 total = _mm512_cvtepi32_ps(sums[r][c][DIGITS - 1]);
      for (int d = DIGITS - 2; d >= 0; --d) total = _mm512_fmadd_ps(total, base, _mm512_cvtepi32_ps(sums[r][c][d]));
      total = _mm512_mul_ps(total, _mm512_set1_ps(steps[r]));
      const __m512 sum = _mm512_set1_ps(block.sums[r]);
      add_to(y + r * y_stride + n + 16 * c,
             block.zeros ? _mm512_fnmadd_ps(zero, sum, _mm512_mul_ps(scale, total))
                         : _mm512_mul_ps(scale, _mm512_sub_ps(total, sum)));
    }
  }
}

template <int BITS, int ROWS>
TARGET void dot_rows(const GroupBlock& block, const int32_t* digits, const float* steps, double* y, int64_t y_stride) {
  int64_t n = 0;
  constexpr int COLUMNS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // sums for 4 rows or columns, 16 registers
  for (; n + 16 * COLUMNS <= block.outputs; n += 16 * COLUMNS) {
    dot_columns<BITS, ROWS, COLUMNS>(block, n, digits, steps, y, y_stride);
  }
  for (; n < block.outputs; n += 16) dot_columns<BITS, ROWS, 1>(block, n, digits, steps, y, y_stride);
}

template <int BITS>
void dot_bits(const GroupBlock& block, const int32_t* digits, const float* steps, int64_t rows, double* y,
              int64_t y_stride) {
  static_assert(MAX_ROWS == 4, "one case for each number of rows");
  switch (rows) {
    case 1: return dot_rows<BITS, 1>(block, digits, steps, y, y_stride);
    case 2: return dot_rows<BITS, 2>(block, digits, steps, y, y_stride);
    case 3: return dot_rows<BITS, 3>(block, digits, steps, y, y_stride);
    default: return dot_rows<BITS, 4>(block, digits, steps, y, y_stride);
  }
}

void dot(const GroupBlock& block, int64_t bits, const int32_t* digits, const float* steps, int64_t rows, double* y,
         int64_t y_stride) {
  return bits == 4 ? dot_bits<4>(block, digits, steps, rows, y, y_stride)
                   : dot_bits<8>(block, digits, steps, rows, y, y_stride);
}

}  // namespace

const MpqKernels* vnni_mpq_kernels() {
  if (!__builtin_cpu_supports("avx512vnni")) return nullptr;
  static const MpqKernels kernels = {&avx512_kernels, avx512_mpq_kernels.accumulate, avx512_mpq_kernels.expand,
                                     avx512_mpq_kernels.multiply, split, dot};
  return &kernels;
}

}  // namespace hf_onebit
#endif
