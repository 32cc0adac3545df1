// AVX2: codes times panels of unsigned bytes, four inputs of 8 outputs an instruction, in sums of 16 bits.
#include "half_avx2.h"
#include "kernels.h"
#include "matrix.h"

#ifdef HF_ONEBIT_X86
#include <algorithm>
#include <cstring>
#include <type_traits>

#define TARGET __attribute__((target("avx2,fma,f16c")))

namespace hf_onebit {
namespace {

constexpr uint8_t PLUS = 2;  // minus is 0: the signs plus 1
constexpr int64_t WIDE = 8;  // outputs in a register of sums
constexpr int LINES = 4;     // tile rows by 16 outputs whose sums stay in registers
// Steps of TILE_INPUTS whose sums fit 16 bits: two inputs of 128 at most by a byte of 2 are 512, and 4 * 16 of those 2^15,
// which only codes of -128 reach.
constexpr int64_t NARROW_STEPS = 4;

AVX2_INLINE __m256i lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(n, 0), WIDE))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

AVX2_INLINE float sum_of(__m256 value) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

TARGET float scale_inputs(const float* b, int64_t n, float* u) {
  const __m256i magnitude = _mm256_set1_epi32(INT32_MAX);
  __m256i most = _mm256_setzero_si256();  // compared as integers, in which infinity and NaN are the largest
  for (int64_t k = 0; k < n; k += WIDE) {
    const __m256i valid = lanes(n - k);
    const __m256 product = _mm256_mul_ps(_mm256_maskload_ps(u + k, valid), _mm256_maskload_ps(b + k, valid));
    _mm256_maskstore_ps(u + k, valid, product);
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(product), magnitude));
  }
  alignas(32) int32_t each[WIDE];
  _mm256_store_si256(reinterpret_cast<__m256i*>(each), most);
  const int32_t bits = *std::max_element(each, each + WIDE);
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// 32 codes of 16 bits to bytes; packing takes turns between the halves of its registers, four bytes at a time.
AVX2_INLINE void store_bytes(__m256i first, __m256i second, int8_t* target) {
  const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                      _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), places));
}

TARGET float quantize(float* u, int64_t n, float inverse, int digits, int8_t* high, int8_t* low, int64_t stride,
                      int32_t* sum) {
  const __m256 factor = _mm256_set1_ps(inverse), sign = _mm256_set1_ps(-0.0f);
  const __m256i half = _mm256_set1_epi16(128);
  __m256i sums = _mm256_setzero_si256();
  __m256 error = _mm256_setzero_ps(), all = _mm256_setzero_ps();
  for (int64_t k = 0; k < n; k += TILE_INPUTS, high += stride, low += stride) {
    for (int64_t part = 0; part < TILE_INPUTS; part += 4 * WIDE) {
      float* values = u + k + part;
      __m256i code[4];
      for (int j = 0; j < 4; ++j) {
        const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(values + j * WIDE), factor);
        code[j] = _mm256_cvtps_epi32(value);
        sums = _mm256_add_epi32(sums, code[j]);
        if (digits == 2) {
          const __m256 rest = _mm256_sub_ps(value, _mm256_cvtepi32_ps(code[j]));
          _mm256_storeu_ps(values + j * WIDE, rest);
          error = _mm256_add_ps(error, _mm256_andnot_ps(sign, rest));
          all = _mm256_add_ps(all, _mm256_andnot_ps(sign, value));
        }
      }
      const __m256i first = _mm256_packs_epi32(code[0], code[1]), second = _mm256_packs_epi32(code[2], code[3]);
      if (digits == 1) {
        store_bytes(first, second, high + part);
      } else {
        store_bytes(_mm256_srai_epi16(_mm256_add_epi16(first, half), 8),
                    _mm256_srai_epi16(_mm256_add_epi16(second, half), 8), high + part);
        store_bytes(_mm256_srai_epi16(_mm256_slli_epi16(first, 8), 8),
                    _mm256_srai_epi16(_mm256_slli_epi16(second, 8), 8), low + part);
      }
    }
  }
  alignas(32) int32_t each[WIDE];
  _mm256_store_si256(reinterpret_cast<__m256i*>(each), sums);
  *sum = 0;
  for (int32_t one : each) *sum += one;
  const float whole = sum_of(all);
  return whole > 0.0f ? sum_of(error) / whole : 0.0f;
}

// The byte of every word that holds a nibble, four times over, meets the bit of each input.
TARGET void expand(const Expansion& signs) {
  const __m256i plus = _mm256_set1_epi8(PLUS);
  const __m256i bit[2] = {_mm256_set1_epi32(0x08040201), _mm256_set1_epi32(static_cast<int32_t>(0x80402010u))};
  for (int64_t k = 0; k < signs.inputs / WORD; ++k) {
    const int32_t* words = signs.weight + k * signs.row_stride;
    for (int64_t n = 0; n < PANEL_OUTPUTS; n += WIDE) {
      // Further word rows are far away in memory; a prefetch beyond the last one does no harm.
      _mm_prefetch(reinterpret_cast<const char*>(words + 8 * signs.row_stride + n), _MM_HINT_T0);
      const __m256i word = k < signs.words ? _mm256_maskload_epi32(words + n, lanes(signs.outputs - n))
                                           : _mm256_setzero_si256();
      // Even word rows are the upper lines of their tiles, odd ones the lower.
      uint8_t* line = signs.panel + (k / 2 * 2 + n / 16) * TILE + k % 2 * (TILE / 2) + n % 16 * 4;
      __m256i byte = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
      for (int64_t j = 0; j < NIBBLES; ++j) {
        const __m256i mask = bit[j % 2];
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(word, byte), mask), mask);
        _mm256_store_si256(reinterpret_cast<__m256i*>(line + j * 64), _mm256_and_si256(set, plus));
        if (j % 2) byte = _mm256_add_epi8(byte, _mm256_set1_epi8(1));
      }
    }
  }
}

AVX2_INLINE __m256i multiply_four(__m256i bytes, __m256i codes, __m256i sum) {
  return _mm256_add_epi16(sum, _mm256_maddubs_epi16(bytes, codes));
}

// Sums of 16 outputs for COUNT tile rows, the first of whose codes is `line`; `panel` is the left or the right tile.
template <int COUNT>
AVX2_INLINE void multiply_lines(const int8_t* line, int64_t tiles, const uint8_t* panel, int64_t steps, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t begin = 0; begin < steps; begin += NARROW_STEPS) {
    __m256i sum[COUNT][2];
    for (int i = 0; i < COUNT; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    for (int64_t k = begin; k < std::min(steps, begin + NARROW_STEPS); ++k, line += tiles * TILE, panel += 2 * TILE) {
      for (int64_t j = 0; j < TILE_INPUTS; j += 4) {
        const __m256i* bytes = reinterpret_cast<const __m256i*>(panel + j * 16);
        const __m256i left = _mm256_load_si256(bytes), right = _mm256_load_si256(bytes + 1);
        for (int i = 0; i < COUNT; ++i) {
          int32_t four;
          std::memcpy(&four, line + i * TILE_INPUTS + j, sizeof four);
          const __m256i codes = _mm256_set1_epi32(four);
          sum[i][0] = multiply_four(left, codes, sum[i][0]);
          sum[i][1] = multiply_four(right, codes, sum[i][1]);
        }
      }
    }
    for (int i = 0; i < COUNT; ++i) {
      for (int half = 0; half < 2; ++half) {
        __m256i* target = reinterpret_cast<__m256i*>(sums + i * PANEL_OUTPUTS + half * WIDE);
        const __m256i wide = _mm256_madd_epi16(sum[i][half], ones);
        _mm256_store_si256(target, begin ? _mm256_add_epi32(_mm256_load_si256(target), wide) : wide);
      }
    }
  }
}

// Tile rows `first` .. `first + count` of a group, which lie in one tile. One half of the panel stays in the first cache.
TARGET void multiply_run(const int8_t* codes, int64_t tiles, int64_t first, int64_t count, const uint8_t* panel,
                         int64_t steps, int32_t* sums) {
  for (int64_t half = 0; half < 2; ++half) {
    const auto next = [&](auto lines, int64_t i) __attribute__((target("avx2,fma,f16c"), always_inline)) {
      const int64_t row = first + i;
      multiply_lines<decltype(lines)::value>(codes + row / TILE_ROWS * TILE + row % TILE_ROWS * TILE_INPUTS, tiles,
                                             panel + half * TILE, steps, sums + row * PANEL_OUTPUTS + half * 2 * WIDE);
    };
    int64_t i = 0;
    for (; i + LINES <= count; i += LINES) next(std::integral_constant<int, LINES>(), i);
    switch (count - i) {
      case 3: next(std::integral_constant<int, 3>(), i); break;
      case 2: next(std::integral_constant<int, 2>(), i); break;
      case 1: next(std::integral_constant<int, 1>(), i); break;
      default: break;
    }
  }
}

AVX2_INLINE __m256 add_8(__m256i sum, float scale, const float* a, float* y) {
  const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale));
  const __m256 result = _mm256_fmadd_ps(product, _mm256_loadu_ps(a), _mm256_loadu_ps(y));
  _mm256_storeu_ps(y, result);
  return result;
}

AVX2_INLINE __m128 add_4(__m128i sum, __m256d scale, const float* a, double* y) {
  const __m256d product = _mm256_mul_pd(_mm256_cvtepi32_pd(sum), scale);
  const __m256d result = _mm256_fmadd_pd(product, _mm256_cvtps_pd(_mm_loadu_ps(a)), _mm256_loadu_pd(y));
  _mm256_storeu_pd(y, result);
  return _mm256_cvtpd_ps(result);
}

AVX2_INLINE __m256 add_8(__m256i sum, float scale, const float* a, double* y) {
  const __m256d wide = _mm256_set1_pd(static_cast<double>(scale));
  const __m128 low = add_4(_mm256_castsi256_si128(sum), wide, a, y);
  return _mm256_setr_m128(low, add_4(_mm256_extracti128_si256(sum, 1), wide, a + 4, y + 4));
}

// 8 outputs of one row, of which `target` may have fewer.
AVX2_INLINE void store_8(__m256 value, const Target& target, int64_t first, char* y) {
  const int64_t left = target.outputs - first;
  if (left <= 0) return;
  if (target.dtype == Dtype::f32) {
    _mm256_maskstore_ps(reinterpret_cast<float*>(y) + first, lanes(left), value);
    return;
  }
  const __m128i both = avx2::half_of(value, target.dtype);
  uint16_t* place = reinterpret_cast<uint16_t*>(y) + first;
  if (left >= WIDE) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(place), both);
  } else {
    alignas(16) uint16_t eight[WIDE];
    _mm_store_si128(reinterpret_cast<__m128i*>(eight), both);
    std::copy(eight, eight + left, place);
  }
}

// Integer sums of one row to floats: the two digits put together, less what the offset of the panel added.
template <typename T>
AVX2_INLINE void add_row(const Product<T>& product, const int32_t* sums, int64_t row) {
  const Codes& codes = product.codes;
  const int64_t low = codes.layout.low;
  const __m256i excess = _mm256_set1_epi32(product.offset * codes.sum[row]);
  for (int64_t n = 0; n < PANEL_OUTPUTS; n += WIDE) {
    __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + n));
    if (low) {
      const __m256i rest = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + low * PANEL_OUTPUTS + n));
      sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 8), rest);
    }
    T* y = product.y + row * PANEL_OUTPUTS + n;
    const __m256 result = add_8(_mm256_sub_epi32(sum, excess), codes.scale[row], product.a + n, y);
    const Target& target = product.target;
    if (target.y) store_8(result, target, n, target.y + row * target.row_bytes);
  }
}

template <typename T>
TARGET void multiply(const Product<T>& product) {
  alignas(64) int32_t sums[2 * TILE_ROWS * PANEL_OUTPUTS];
  const Codes& codes = product.codes;
  const Layout layout = codes.layout;
  const int64_t group_rows = layout.group_rows(), steps = product.inputs / TILE_INPUTS;
  for (int64_t row = 0, g = 0; row < codes.rows; row += group_rows, ++g) {
    if (!codes.used[g]) continue;
    const int64_t rows = std::min(group_rows, codes.rows - row);
    const int8_t* group = codes.codes + g * product.inputs * layout.tiles * TILE_ROWS;
    const auto run = [&](int64_t first, int64_t count) {
      multiply_run(group, layout.tiles, first, count, product.panel, steps, sums);
    };
    run(0, std::min(rows, TILE_ROWS));
    if (rows > TILE_ROWS) run(TILE_ROWS, rows - TILE_ROWS);
    if (layout.low) run(layout.low, rows);
    for (int64_t r = 0; r < rows; ++r) add_row(product, sums + r * PANEL_OUTPUTS, row + r);
  }
  expand(product.next);
}

}  // namespace

const MatrixUnits avx2_units = {32,
                                INT64_MAX,
                                6,
                                1,
                                scale_inputs,
                                quantize,
                                expand,
                                multiply<float>,
                                multiply<double>,
                                nullptr,
                                nullptr};

}  // namespace hf_onebit
#endif
