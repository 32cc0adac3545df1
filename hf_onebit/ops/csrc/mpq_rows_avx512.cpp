// Rows of a group-quantized matrix with AVX-512F: 16 rows are computed side by side, as their words lie, and turned in
// registers, so that each row is written 64 bytes at a time. The operations are those of mpq_embedding.cpp, to the bit.
#include "mpq_rows.h"

#ifdef HF_ONEBIT_X86
#include <cstring>

#include "matrix_avx512.h"

#define TARGET __attribute__((target("avx512f")))
#define TARGET_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace hf_onebit {
namespace {

// 16 registers of 16 numbers of 32 bits become their transpose.
TARGET_INLINE void turn(__m512i* r) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i top = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x44), low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xee);
    const __m512i top_2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x44);
    const __m512i low_2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xee);
    a[i] = _mm512_shuffle_i32x4(top, top_2, 0x88);
    a[4 + i] = _mm512_shuffle_i32x4(top, top_2, 0xdd);
    a[8 + i] = _mm512_shuffle_i32x4(low, low_2, 0x88);
    a[12 + i] = _mm512_shuffle_i32x4(low, low_2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = a[i];
}

TARGET_INLINE void store_rows(__m512i* r, int64_t rows, int64_t bytes, char* y, int64_t row_bytes) {
  turn(r);
  for (int64_t n = 0; n < rows; ++n, y += row_bytes) {
    if (bytes >= 64) {
      _mm512_storeu_si512(y, r[n]);
    } else {
      alignas(64) char row[64];
      _mm512_store_si512(row, r[n]);
      std::memcpy(y, row, static_cast<size_t>(bytes > 0 ? bytes : 0));
    }
  }
}

template <int BITS, bool ZEROS>
TARGET void expand_rows(const RowPiece& piece) {
  const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
  const __mmask16 valid = avx512::lanes(piece.rows);
  const int64_t stride = piece.matrix->row_stride;
  const __m512 scale = _mm512_maskz_loadu_ps(valid, piece.scales);
  const __m512 offset =
      ZEROS ? _mm512_maskz_loadu_ps(valid, piece.zeros) : _mm512_set1_ps(piece.matrix->zero_point());
  __m512i words[BITS + 1];
  for (int w = 0; w < BITS; ++w) {
    words[w] = _mm512_maskz_loadu_epi32(valid, piece.words + w * stride);
    _mm_prefetch(reinterpret_cast<const char*>(piece.words + (w + 8 * BITS) * stride), _MM_HINT_T0);
  }
  words[BITS] = _mm512_setzero_si512();
  __m512 values[WORD];
#pragma GCC unroll 32
  for (int j = 0; j < WORD; ++j) {
    const int bit = j * BITS, shift = bit % 32;
    __m512i code = _mm512_srli_epi32(words[bit / 32], shift);
    if (shift + BITS > 32) {
      code = _mm512_or_si512(code, _mm512_slli_epi32(words[bit / 32 + 1], (32 - shift) % 32));
    }
    const __m512 q = _mm512_cvtepi32_ps(_mm512_and_si512(code, mask));
    values[j] = ZEROS ? _mm512_sub_ps(_mm512_mul_ps(scale, q), offset) : _mm512_mul_ps(scale, _mm512_sub_ps(q, offset));
  }
  __m512i halves[16];
  if (piece.dtype == Dtype::f32) {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 16; ++i) halves[i] = _mm512_castps_si512(values[16 * half + i]);
      store_rows(halves, piece.rows, (piece.used - 16 * half) * 4, piece.y + 64 * half, piece.row_bytes);
    }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const __m512i low = _mm512_cvtepu16_epi32(avx512::half_of(values[2 * i], piece.dtype));
    const __m512i high = _mm512_cvtepu16_epi32(avx512::half_of(values[2 * i + 1], piece.dtype));
    halves[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  store_rows(halves, piece.rows, piece.used * 2, piece.y, piece.row_bytes);
}

template <bool ZEROS>
void expand_bits(const RowPiece& piece) {
  switch (piece.matrix->bits) {
    case 1: return expand_rows<1, ZEROS>(piece);
    case 2: return expand_rows<2, ZEROS>(piece);
    case 3: return expand_rows<3, ZEROS>(piece);
    case 4: return expand_rows<4, ZEROS>(piece);
    case 5: return expand_rows<5, ZEROS>(piece);
    case 6: return expand_rows<6, ZEROS>(piece);
    case 7: return expand_rows<7, ZEROS>(piece);
    default: return expand_rows<8, ZEROS>(piece);
  }
}

}  // namespace

void avx512_expand_rows(const RowPiece& piece) {
  piece.matrix->zeros.data ? expand_bits<true>(piece) : expand_bits<false>(piece);
}

}  // namespace hf_onebit
#endif
