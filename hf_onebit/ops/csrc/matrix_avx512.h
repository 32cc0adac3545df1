// What the units of matrix.h have in common: codes, panels and the way from integer sums to floats, in AVX-512F.
#pragma once

#include "kernels.h"
#include "matrix.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#include <algorithm>

#define AVX512_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace hf_onebit::avx512 {

float scale_inputs(const float* b, int64_t n, float* u);
float quantize(float* u, int64_t n, float inverse, int digits, int8_t* high, int8_t* low, int64_t stride,
               int32_t* sum);

AVX512_INLINE __mmask16 lanes(int64_t n) {
  return static_cast<__mmask16>((1u << std::min<int64_t>(std::max<int64_t>(n, 0), 16)) - 1u);
}

// Signs to bytes. One permutation makes the line of 4 inputs by 16 outputs that the units want out of a nibble of 16
// words; it reads only the low four bits of each index.
class Expander {
 public:
  // Bytes for the two signs.
  AVX512_INLINE Expander(const Expansion& signs, uint8_t minus, uint8_t plus)
      : signs_(signs), units_(signs.panel ? signs.inputs / WORD * 2 : 0) {
    alignas(64) uint8_t nibbles[64];
    for (int i = 0; i < 64; ++i) nibbles[i] = (i / 4) >> (i % 4) & 1 ? plus : minus;
    table_ = _mm512_load_si512(nibbles);
    lanes_[0] = lanes(signs.outputs);
    lanes_[1] = lanes(signs.outputs - 16);
  }

  AVX512_INLINE int64_t units() const { return units_; }

  // The next unit: one word row of 16 outputs.
  AVX512_INLINE void step() {
    if (next_ == units_) return;
    const int64_t k = next_ / 2, half = next_ % 2;
    ++next_;
    const int32_t* words = signs_.weight + k * signs_.row_stride + 16 * half;
    // Further word rows are far away in memory; a prefetch beyond the last one does no harm.
    _mm_prefetch(reinterpret_cast<const char*>(words + 8 * signs_.row_stride), _MM_HINT_T0);
    __m512i word = k < signs_.words ? _mm512_maskz_loadu_epi32(lanes_[half], words) : _mm512_setzero_si512();
    // Even word rows are the upper lines of their tiles, odd ones the lower.
    uint8_t* line = signs_.panel + (k / 2 * 2 + half) * TILE + k % 2 * (TILE / 2);
    for (int64_t j = 0; j < NIBBLES; ++j) {
      _mm512_store_si512(line + j * 64, _mm512_permutexvar_epi32(word, table_));
      word = _mm512_srli_epi32(word, 4);
    }
  }

  AVX512_INLINE void finish() {
    while (next_ < units_) step();
  }

 private:
  Expansion signs_;
  int64_t units_, next_ = 0;
  __m512i table_;
  __mmask16 lanes_[2];
};

AVX512_INLINE __m512 low_half(__m512d low, __m512d high) {
  return _mm512_castpd_ps(_mm512_insertf64x4(
      _mm512_castpd256_pd512(_mm256_castps_pd(_mm512_cvtpd_ps(low))), _mm256_castps_pd(_mm512_cvtpd_ps(high)), 1));
}

// 16 sums times a scale and a, added to y; returned as float32.
AVX512_INLINE __m512 add_16(__m512i sum, float scale, const float* a, float* y) {
  const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale));
  const __m512 result = _mm512_fmadd_ps(product, _mm512_loadu_ps(a), _mm512_loadu_ps(y));
  _mm512_storeu_ps(y, result);
  return result;
}

AVX512_INLINE __m512d add_8(__m256i sum, __m512d scale, const float* a, double* y) {
  const __m512d product = _mm512_mul_pd(_mm512_cvtepi32_pd(sum), scale);
  const __m512d result = _mm512_fmadd_pd(product, _mm512_cvtps_pd(_mm256_loadu_ps(a)), _mm512_loadu_pd(y));
  _mm512_storeu_pd(y, result);
  return result;
}

AVX512_INLINE __m512 add_16(__m512i sum, float scale, const float* a, double* y) {
  const __m512d wide = _mm512_set1_pd(static_cast<double>(scale));
  const __m512d low = add_8(_mm512_castsi512_si256(sum), wide, a, y);
  return low_half(low, add_8(_mm512_extracti64x4_epi64(sum, 1), wide, a + 8, y + 8));
}

AVX512_INLINE __m256i half_of(__m512 value, Dtype dtype) {
  if (dtype == Dtype::f16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // As bf16_of_float.
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(half, nan, _mm512_set1_epi32(0x7fc0)));
}

AVX512_INLINE void store_row(__m512 left, __m512 right, const Target& target, char* y) {
  if (target.dtype == Dtype::f32) {
    _mm512_mask_storeu_ps(y, lanes(target.outputs), left);
    _mm512_mask_storeu_ps(y + 64, lanes(target.outputs - 16), right);
    return;
  }
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(half_of(left, target.dtype)),
                                          half_of(right, target.dtype), 1);
  if (target.outputs == PANEL_OUTPUTS) {
    _mm512_storeu_si512(y, both);
  } else {
    alignas(64) uint16_t row[PANEL_OUTPUTS];
    _mm512_store_si512(row, both);
    std::copy(row, row + target.outputs, reinterpret_cast<uint16_t*>(y));
  }
}

// Integer sums of a group's rows to floats, row by row.
template <typename T>
class Adder {
 public:
  AVX512_INLINE explicit Adder(const Product<T>& product) : product_(product) {}

  // sums: tile rows x PANEL_OUTPUTS, of the rows from `row` on.
  AVX512_INLINE void start(const int32_t* sums, int64_t row, int64_t rows) {
    sums_ = sums;
    row_ = row;
    end_ = row + rows;
  }

  AVX512_INLINE void step() {
    if (row_ == end_) return;
    const Codes& codes = product_.codes;
    const __m512i excess = _mm512_set1_epi32(product_.offset * codes.sum[row_]);
    T* y = product_.y + row_ * PANEL_OUTPUTS;
    const __m512 left = add_16(total(sums_, excess), codes.scale[row_], product_.a, y);
    const __m512 right = add_16(total(sums_ + 16, excess), codes.scale[row_], product_.a + 16, y + 16);
    const Target& target = product_.target;
    if (target.y) store_row(left, right, target, target.y + row_ * target.row_bytes);
    sums_ += PANEL_OUTPUTS;
    ++row_;
  }

  AVX512_INLINE void finish() {
    while (row_ < end_) step();
  }

 private:
  // The two digits put together, less what the offset of the panel added.
  AVX512_INLINE __m512i total(const int32_t* high, __m512i excess) const {
    __m512i sum = _mm512_load_si512(high);
    const int64_t low = product_.codes.layout.low;
    if (low) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(high + low * PANEL_OUTPUTS));
    return _mm512_sub_epi32(sum, excess);
  }

  const Product<T>& product_;
  const int32_t* sums_ = nullptr;
  int64_t row_ = 0, end_ = 0;
};

}  // namespace hf_onebit::avx512
#endif
