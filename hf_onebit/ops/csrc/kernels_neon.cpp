// NEON (aarch64): a table of 16 floats is stored as four planes of 16 bytes, byte 0 of every entry, byte 1 and so on.
// One tbl looks up one byte for 16 neighbouring outputs, and zips put the floats together again.
//
// A nibble of 16 outputs, 64 weights, costs 4 tbl, 8 zips, 4 additions and, shared by all rows, 1 shift or mask for the
// index: 17 instructions. Looking up whole floats (a tbl over four registers for 4 outputs) would need the index
// arithmetic 4 times, and such a tbl takes as long as four. A sign xor and an addition for each weight would need 64.
//
// Sums are taken in the order of kernels_scalar.cpp, so every bit of a result is the same.
#include "kernels.h"

#ifdef HF_ONEBIT_NEON
#include <arm_neon.h>

#include <cstring>

namespace hf_onebit {
namespace {

void to_float(const void* source, Dtype dtype, int64_t n, float* target) {
  if (dtype == Dtype::f64) return scalar_kernels.to_float(source, dtype, n, target);
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    float32x4_t value;
    if (dtype == Dtype::f32) {
      value = vld1q_f32(static_cast<const float*>(source) + i);
    } else {
      const uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(source) + i);
      value = dtype == Dtype::f16 ? vcvt_f32_f16(vreinterpret_f16_u16(half))
                                  : vreinterpretq_f32_u32(vshll_n_u16(half, 16));
    }
    vst1q_f32(target + i, value);
  }
  scalar_kernels.to_float(static_cast<const char*>(source) + i * size_of(dtype), dtype, n - i, target + i);
}

inline uint16x4_t bf16_of(float32x4_t value) {  // as bf16_of_float
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t number = vceqq_f32(value, value);
  return vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000u)), 16);
}

void from_double(const double* source, int64_t n, Dtype dtype, void* target) {
  int64_t i = 0;
  for (; i + 4 <= n && dtype != Dtype::f64; i += 4) {
    const float32x4_t value = vcvt_high_f32_f64(vcvt_f32_f64(vld1q_f64(source + i)), vld1q_f64(source + i + 2));
    if (dtype == Dtype::f32) {
      vst1q_f32(static_cast<float*>(target) + i, value);
    } else {
      vst1_u16(static_cast<uint16_t*>(target) + i,
               dtype == Dtype::f16 ? vreinterpret_u16_f16(vcvt_f16_f32(value)) : bf16_of(value));
    }
  }
  scalar_kernels.from_double(source + i, n - i, dtype, static_cast<char*>(target) + i * size_of(dtype));
}

inline uint8x16_t bytes_of(uint16x8_t value) { return vreinterpretq_u8_u16(value); }
inline uint16x8_t halves_of(float32x4_t value) { return vreinterpretq_u16_f32(value); }

void build_tables(const float* u, int64_t words, float* tables) {
  for (int64_t nibble = 0; nibble < words * NIBBLES; ++nibble, u += 4, tables += TABLE) {
    const float low_entries[4] = {-u[0] - u[1], u[0] - u[1], u[1] - u[0], u[0] + u[1]};
    const float32x4_t low = vld1q_f32(low_entries);
    const float32x4_t entries[4] = {
        vaddq_f32(low, vdupq_n_f32(-u[2] - u[3])),
        vaddq_f32(low, vdupq_n_f32(u[2] - u[3])),
        vaddq_f32(low, vdupq_n_f32(u[3] - u[2])),
        vaddq_f32(low, vdupq_n_f32(u[2] + u[3])),
    };
    const uint16x8_t low_0 = vuzp1q_u16(halves_of(entries[0]), halves_of(entries[1]));
    const uint16x8_t low_1 = vuzp1q_u16(halves_of(entries[2]), halves_of(entries[3]));
    const uint16x8_t high_0 = vuzp2q_u16(halves_of(entries[0]), halves_of(entries[1]));
    const uint16x8_t high_1 = vuzp2q_u16(halves_of(entries[2]), halves_of(entries[3]));
    uint8_t* planes = reinterpret_cast<uint8_t*>(tables);
    vst1q_u8(planes, vuzp1q_u8(bytes_of(low_0), bytes_of(low_1)));
    vst1q_u8(planes + 16, vuzp2q_u8(bytes_of(low_0), bytes_of(low_1)));
    vst1q_u8(planes + 32, vuzp1q_u8(bytes_of(high_0), bytes_of(high_1)));
    vst1q_u8(planes + 48, vuzp2q_u8(bytes_of(high_0), bytes_of(high_1)));
  }
}

struct Sixteen {
  float32x4_t part[4];
};

inline Sixteen operator+(const Sixteen& a, const Sixteen& b) {
  return {vaddq_f32(a.part[0], b.part[0]), vaddq_f32(a.part[1], b.part[1]), vaddq_f32(a.part[2], b.part[2]),
          vaddq_f32(a.part[3], b.part[3])};
}

inline float32x4_t floats_of(uint16x8_t value) { return vreinterpretq_f32_u16(value); }

inline Sixteen look_up(uint8x16_t index, const float* table) {
  const uint8_t* planes = reinterpret_cast<const uint8_t*>(table);
  const uint8x16_t byte_0 = vqtbl1q_u8(vld1q_u8(planes), index);
  const uint8x16_t byte_1 = vqtbl1q_u8(vld1q_u8(planes + 16), index);
  const uint8x16_t byte_2 = vqtbl1q_u8(vld1q_u8(planes + 32), index);
  const uint8x16_t byte_3 = vqtbl1q_u8(vld1q_u8(planes + 48), index);
  const uint16x8_t low_0 = vreinterpretq_u16_u8(vzip1q_u8(byte_0, byte_1));
  const uint16x8_t low_1 = vreinterpretq_u16_u8(vzip2q_u8(byte_0, byte_1));
  const uint16x8_t high_0 = vreinterpretq_u16_u8(vzip1q_u8(byte_2, byte_3));
  const uint16x8_t high_1 = vreinterpretq_u16_u8(vzip2q_u8(byte_2, byte_3));
  return {floats_of(vzip1q_u16(low_0, high_0)), floats_of(vzip2q_u16(low_0, high_0)),
          floats_of(vzip1q_u16(low_1, high_1)), floats_of(vzip2q_u16(low_1, high_1))};
}

// The eight nibbles of a word: byte g of 16 words holds two of them.
inline Sixteen look_up_byte(uint8x16_t bytes, const float* tables) {
  return look_up(vandq_u8(bytes, vdupq_n_u8(15)), tables) + look_up(vshrq_n_u8(bytes, 4), tables + TABLE);
}

template <int ROWS>
void accumulate_16(const int32_t* weight, int64_t row_stride, int64_t words, const float* tables, double* totals,
                   int64_t totals_stride) {
  Sixteen sums[ROWS];
  for (int r = 0; r < ROWS; ++r) sums[r] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  for (int64_t k = 0; k < words; ++k, tables += NIBBLES * TABLE, weight += row_stride) {
    __builtin_prefetch(reinterpret_cast<const char*>(weight) + 1024);  // the same row, 16 times 16 outputs on
    const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(weight));
    for (int r = 0; r < ROWS; ++r) {
      const float* t = tables + r * BLOCK_WORDS * NIBBLES * TABLE;
      const Sixteen low = look_up_byte(bytes.val[0], t) + look_up_byte(bytes.val[1], t + 2 * TABLE);
      const Sixteen high = look_up_byte(bytes.val[2], t + 4 * TABLE) + look_up_byte(bytes.val[3], t + 6 * TABLE);
      sums[r] = sums[r] + (low + high);
    }
  }
  for (int r = 0; r < ROWS; ++r, totals += totals_stride) {
    for (int i = 0; i < 4; ++i) {
      const float32x4_t sum = sums[r].part[i];
      double* target = totals + 4 * i;
      vst1q_f64(target, vaddq_f64(vld1q_f64(target), vcvt_f64_f32(vget_low_f32(sum))));
      vst1q_f64(target + 2, vaddq_f64(vld1q_f64(target + 2), vcvt_high_f64_f32(sum)));
    }
  }
}

template <int ROWS>
void accumulate_rows(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, const float* tables,
                     double* totals, int64_t totals_stride) {
  int64_t n = 0;
  for (; n + 16 <= outputs; n += 16) {
    accumulate_16<ROWS>(weight + n, row_stride, words, tables, totals + n, totals_stride);
  }
  if (n < outputs) {  // there is no masked load: words past the last output are not ours to read
    int32_t padded[BLOCK_WORDS * 16] = {};
    for (int64_t k = 0; k < words; ++k) {
      std::memcpy(padded + k * 16, weight + k * row_stride + n, static_cast<size_t>(outputs - n) * sizeof *padded);
    }
    accumulate_16<ROWS>(padded, 16, words, tables, totals + n, totals_stride);
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

const Kernels neon_kernels = {"neon", to_float, from_double, build_tables, accumulate};

}  // namespace hf_onebit
#endif
