// Group-quantized weights with AMX: tiles of 16 rows of x by 32 inputs times panels of codes, both in bfloat16.
#include "kernels.h"
#include "matrix_avx512.h"
#include "mpq_tiles.h"

#if defined(HF_ONEBIT_X86) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>

#define FEATURES "avx512f,avx512bw,avx512bf16,amx-tile,amx-bf16"
#define TARGET __attribute__((target(FEATURES)))
#define TARGET_INLINE __attribute__((target(FEATURES), always_inline)) inline

namespace hf_onebit {
namespace {

constexpr int64_t COLUMNS = TILE_OUTPUTS_2;
constexpr int64_t MOST_PIECES = 4;  // whose sums wait for their scales at once; half as many if they are longer than a step

// Where a register of 32 numbers takes code j of a step from, and so x: neighbours in a tile are codes that one shift
// brings to the low ends of both halves of a word.
constexpr int64_t half_apart(int64_t bits) { return 32 % bits == 0 ? 16 / bits : 0; }

constexpr int64_t input_of(int64_t bits, int64_t slot) {
  const int64_t apart = half_apart(bits);
  if (!apart) return slot;
  const int64_t pair = slot / 2, word = pair / apart, i = pair % apart;
  return word * 2 * apart + i + slot % 2 * apart;
}

// bfloat16 of q - zero_point, for integers q below 2^bits.
uint16_t number_of(int64_t bits, int64_t q) {
  const float value = bits == 1 ? static_cast<float>(q) - 0.5f : static_cast<float>(q - (int64_t{1} << (bits - 1)));
  uint32_t raw;
  __builtin_memcpy(&raw, &value, sizeof raw);
  return static_cast<uint16_t>(raw >> 16);
}

struct alignas(64) Tables {
  uint16_t numbers[7][64];  // by bits, repeated
  uint16_t order[9][32];    // by bits

  Tables() {
    for (int64_t bits = 1; bits <= 6; ++bits) {
      for (int64_t i = 0; i < 64; ++i) numbers[bits][i] = number_of(bits, i & ((1 << bits) - 1));
    }
    for (int64_t bits = 1; bits <= 8; ++bits) {
      for (int64_t i = 0; i < 32; ++i) order[bits][i] = static_cast<uint16_t>(input_of(bits, i));
    }
  }
};

const Tables tables;

TARGET void split(const float* x, int64_t steps, int64_t terms, int64_t bits, uint16_t* target, int64_t step_stride,
                  int64_t term_stride) {
  const __m512i order = _mm512_load_si512(tables.order[bits]);
  for (int64_t s = 0; s < steps; ++s, x += STEP, target += step_stride) {
    __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    for (int64_t t = 0; t < terms; ++t) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      _mm512_store_si512(target + t * term_stride, _mm512_permutexvar_epi16(order, both));
      if (t + 1 == terms) break;
      const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
      const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
      low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
      high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
    }
  }
}

TARGET float measure(const float* x, int64_t n, double* sum) {
  const __m512i magnitude = _mm512_set1_epi32(INT32_MAX);
  __m512i most = _mm512_setzero_si512();  // compared as integers, in which infinity and NaN are the largest
  __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  for (int64_t k = 0; k < n; k += 16) {
    const __m512 value = _mm512_loadu_ps(x + k);
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(value), magnitude));
    sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
    sums[1] = _mm512_add_pd(sums[1],
                            _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1))));
  }
  *sum = _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most))));
}

// Integers of seven and eight bits, in the low ends of both halves of a word, less 2^(bits - 1), to bfloat16.
TARGET_INLINE __m512i by_conversion(__m512i low, __m512i high, int64_t bits) {
  const __m512i zero_point = _mm512_set1_epi32(1 << (bits - 1));
  const __m512i first = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(low, zero_point)));
  const __m512i second = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(high, zero_point)));
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second);
}

// 16 outputs and one step to a tile: line p of it holds slots 2 p and 2 p + 1 of each output.
template <int BITS>
TARGET_INLINE void expand_tile(const int32_t* weight, int64_t row_stride, __mmask16 valid, uint16_t* tile) {
  constexpr int64_t apart = half_apart(BITS);
  const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
  __m512i words[BITS + 1];
  for (int w = 0; w < BITS; ++w) {
    words[w] = _mm512_maskz_loadu_epi32(valid, weight + w * row_stride);
    _mm_prefetch(reinterpret_cast<const char*>(weight + (w + BLOCK_STEPS * BITS) * row_stride), _MM_HINT_T0);
  }
  words[BITS] = _mm512_setzero_si512();
  const __m512i table = _mm512_load_si512(tables.numbers[BITS <= 6 ? BITS : 1]);
  const __m512i upper = _mm512_load_si512(tables.numbers[BITS <= 6 ? BITS : 1] + 32);
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) {
    __m512i numbers;
    if (apart) {
      // A look-up reads five bits of each half, and the table repeats itself.
      const __m512i codes = _mm512_srli_epi32(words[p / (apart ? apart : 1)], p % (apart ? apart : 1) * BITS);
      if (BITS <= 4) {
        numbers = _mm512_permutexvar_epi16(codes, table);
      } else {
        numbers = by_conversion(_mm512_and_si512(codes, mask), _mm512_and_si512(_mm512_srli_epi32(codes, 16), mask), BITS);
      }
    } else {
      __m512i code[2];
      for (int i = 0; i < 2; ++i) {
        const int bit = (2 * p + i) * BITS, shift = bit % 32;
        code[i] = _mm512_srli_epi32(words[bit / 32], shift);
        if (shift + BITS > 32) {
          code[i] = _mm512_or_si512(code[i], _mm512_slli_epi32(words[bit / 32 + 1], (32 - shift) % 32));
        }
      }
      if (BITS <= 6) {
        const __m512i codes = _mm512_mask_blend_epi16(0xaaaaaaaau, code[0], _mm512_slli_epi32(code[1], 16));
        numbers = BITS == 6 ? _mm512_permutex2var_epi16(table, codes, upper) : _mm512_permutexvar_epi16(codes, table);
      } else {
        numbers = by_conversion(_mm512_and_si512(code[0], mask), _mm512_and_si512(code[1], mask), BITS);
      }
    }
    _mm512_store_si512(tile + p * STEP, numbers);
  }
}

template <int BITS>
TARGET void expand_bits(const int32_t* weight, int64_t row_stride, int64_t steps, int64_t outputs, uint16_t* panel) {
  for (int64_t s = 0; s < steps; ++s, weight += BITS * row_stride) {
    for (int64_t half = 0; half < 2; ++half, panel += HALVES) {
      expand_tile<BITS>(weight + 16 * half, row_stride, avx512::lanes(outputs - 16 * half), panel);
    }
  }
}

void expand(const int32_t* weight, int64_t row_stride, int64_t bits, int64_t steps, int64_t outputs,
            uint16_t* panel) {
  switch (bits) {
    case 1: return expand_bits<1>(weight, row_stride, steps, outputs, panel);
    case 2: return expand_bits<2>(weight, row_stride, steps, outputs, panel);
    case 3: return expand_bits<3>(weight, row_stride, steps, outputs, panel);
    case 4: return expand_bits<4>(weight, row_stride, steps, outputs, panel);
    case 5: return expand_bits<5>(weight, row_stride, steps, outputs, panel);
    case 6: return expand_bits<6>(weight, row_stride, steps, outputs, panel);
    case 7: return expand_bits<7>(weight, row_stride, steps, outputs, panel);
    default: return expand_bits<8>(weight, row_stride, steps, outputs, panel);
  }
}

constexpr int64_t PIECE = GROUP_ROWS * COLUMNS;  // sums of one piece: 4 KiB

// What COUNT pieces add to the rows of one group, four at a time: y = from + sum of scale * sums - offset * row sum.
template <int COUNT, bool ZEROS>
TARGET_INLINE void add_pieces(const TileProduct& product, int64_t group, int64_t first, const float* sums) {
  constexpr int ROWS = 4;
  const bool begins = product.bias && !first;  // nothing is in y yet
  float* y = product.y + group * PIECE;
  const float* from = begins ? product.bias : y;
  const int64_t from_stride = begins ? 0 : COLUMNS, rows = product.tiles_of(group) * 16;
  const float* row_sums = product.sums + group * product.sum_stride + first * GROUP_ROWS;
  for (int64_t at = 0; at < COLUMNS; at += 16) {
    __m512 scale[COUNT], offset[COUNT];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) {
      scale[i] = _mm512_load_ps(product.scales + (first + i) * COLUMNS + at);
      if (ZEROS) offset[i] = _mm512_load_ps(product.offsets + (first + i) * COLUMNS + at);
    }
    for (int64_t row = 0; row < rows; row += ROWS) {
      __m512 totals[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const float* sum = sums + (row + r) * COLUMNS + at;
        totals[r] = _mm512_mul_ps(scale[0], _mm512_load_ps(sum));
#pragma GCC unroll 4
        for (int i = 1; i < COUNT; ++i) totals[r] = _mm512_fmadd_ps(scale[i], _mm512_load_ps(sum + i * PIECE), totals[r]);
#pragma GCC unroll 4
        for (int i = 0; ZEROS && i < COUNT; ++i) {
          totals[r] = _mm512_fnmadd_ps(offset[i], _mm512_set1_ps(row_sums[i * GROUP_ROWS + row + r]), totals[r]);
        }
        totals[r] = _mm512_add_ps(totals[r], _mm512_load_ps(from + (row + r) * from_stride + at));
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) _mm512_store_ps(y + (row + r) * COLUMNS + at, totals[r]);
    }
  }
}

template <bool ZEROS>
TARGET_INLINE void add_any(const TileProduct& product, int64_t group, int64_t first, int64_t count, const float* sums) {
  static_assert(MOST_PIECES == 4, "one case for each number of pieces");
  switch (count) {
    case 1: return add_pieces<1, ZEROS>(product, group, first, sums);
    case 2: return add_pieces<2, ZEROS>(product, group, first, sums);
    case 3: return add_pieces<3, ZEROS>(product, group, first, sums);
    default: return add_pieces<4, ZEROS>(product, group, first, sums);
  }
}

// Sums I to memory, where `target` is not null; then they start at 0. A macro, as the intrinsics are that it calls.
#define TURN(I, target)                                                                                          \
  do {                                                                                                           \
    if (target) _tile_stored(I, (target) + (I) / 2 * 16 * COLUMNS + (I) % 2 * 16, COLUMNS * sizeof(float));      \
    _tile_zero(I);                                                                                               \
  } while (false)

// One piece: sums are tiles 0..3, x 4 and 5, the panel 6 and 7. Each sum of the piece before is stored right before its
// tile is needed: to wait for all four of them takes half as long as a piece.
template <int TILES, int TERMS>
TARGET_INLINE void multiply_piece(const uint16_t* x, const uint16_t* panel, int64_t steps, float* before) {
  for (int64_t s = 0; s < steps; ++s, panel += 2 * HALVES) {
#pragma GCC unroll 3
    for (int t = 0; t < TERMS; ++t, x += TILES * HALVES) {
      const bool begins = t == 0 && s == 0;
      _tile_loadd(4, x, 64);
      if (t == 0) _tile_loadd(6, panel, 64);
      if (begins) TURN(0, before);
      _tile_dpbf16ps(0, 4, 6);
      if (t == 0) _tile_loadd(7, panel + HALVES, 64);
      if (begins) TURN(1, before);
      _tile_dpbf16ps(1, 4, 7);
      if (TILES == 2) {
        _tile_loadd(5, x + HALVES, 64);
        if (begins) TURN(2, before);
        _tile_dpbf16ps(2, 5, 6);
        if (begins) TURN(3, before);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
}

// The groups from `begin` on, which have TILES tiles.
template <int TILES, int TERMS>
TARGET void multiply_tiles(const TileProduct& product, int64_t begin, int64_t end) {
  alignas(64) float sums[MOST_PIECES * PIECE];
  for (int64_t g = begin; g < end; ++g) {
    const uint16_t* x = product.x + g * product.x_stride + product.first_step * TERMS * TILES * HALVES;
    const uint16_t* panel = product.panel;
    for (int64_t first = 0; first < product.pieces;) {
      const int64_t count = std::min(product.steps[first] == 1 ? MOST_PIECES : MOST_PIECES / 2, product.pieces - first);
      float* before = nullptr;
      for (int64_t i = 0; i < count; ++i, before = sums + (i - 1) * PIECE) {
        const int64_t steps = product.steps[first + i];
        multiply_piece<TILES, TERMS>(x, panel, steps, before);
        x += steps * TERMS * TILES * HALVES;
        panel += steps * 2 * HALVES;
      }
      TURN(0, before);
      TURN(1, before);
      if (TILES == 2) {
        TURN(2, before);
        TURN(3, before);
      }
      product.offsets ? add_any<true>(product, g, first, count, sums) : add_any<false>(product, g, first, count, sums);
      first += count;
    }
  }
}

template <int TERMS>
void multiply_terms(const TileProduct& product) {
  const int64_t whole = product.rows / GROUP_ROWS + (product.rows % GROUP_ROWS > 16), groups = product.groups();
  if (whole) multiply_tiles<2, TERMS>(product, 0, whole);
  if (whole < groups) multiply_tiles<1, TERMS>(product, whole, groups);
}

void multiply(const TileProduct& product) {
  static_assert(MOST_TERMS == 3, "one case for each number of terms");
  switch (product.terms) {
    case 1: return multiply_terms<1>(product);
    case 2: return multiply_terms<2>(product);
    default: return multiply_terms<3>(product);
  }
}

TARGET void store(const float* y, int64_t rows, int64_t outputs, Dtype dtype, char* target, int64_t row_bytes) {
  const Target where{nullptr, dtype, row_bytes, outputs};
  for (int64_t r = 0; r < rows; ++r, y += COLUMNS, target += row_bytes) {
    avx512::store_row(_mm512_load_ps(y), _mm512_load_ps(y + 16), where, target);
  }
}

const TileKernels amx_tile_kernels = {split, measure, expand, multiply, store};

bool has_bfloat16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !((d >> 22) & 1u)) return false;
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
}

}  // namespace

const TileKernels* tile_kernels() {
  static const bool usable = has_bfloat16();
  return usable && &kernels() == &amx_kernels ? &amx_tile_kernels : nullptr;
}

}  // namespace hf_onebit
#else
namespace hf_onebit {
const TileKernels* tile_kernels() { return nullptr; }
}  // namespace hf_onebit
#endif
