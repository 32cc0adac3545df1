// AVX-512-VNNI: codes times panels of unsigned bytes, four inputs of 16 outputs an instruction.
// Few rows are left to the tables.
#include "kernels.h"
#include "matrix_avx512.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#define TARGET __attribute__((target("avx512f,avx512vnni")))
#define TARGET_INLINE __attribute__((target("avx512f,avx512vnni"), always_inline)) inline

namespace hf_onebit {
namespace {

constexpr uint8_t MINUS = 0, PLUS = 2;  // the signs plus 1
// Tile rows in each of two runs: 16 sums stay in registers, enough to hide how long each takes.
constexpr int LINES = 4;

// The sums of two runs of COUNT tile rows, which begin at lines `first` and `second` of a group.
template <int COUNT>
TARGET_INLINE void multiply_lines(const int8_t* codes, int64_t first, int64_t second, int64_t tiles,
                                  const uint8_t* panel, int64_t steps, int32_t* sums) {
  const int64_t lines[2] = {first, second};
  __m512i sum[2][COUNT][2];
  for (int run = 0; run < 2; ++run) {
    for (int i = 0; i < COUNT; ++i) sum[run][i][0] = sum[run][i][1] = _mm512_setzero_si512();
  }
  const int8_t* line[2] = {codes + first * TILE_INPUTS, codes + second * TILE_INPUTS};
  for (int64_t k = 0; k < steps; ++k, line[0] += tiles * TILE, line[1] += tiles * TILE, panel += 2 * TILE) {
    for (int64_t j = 0; j < TILE_INPUTS; j += 4) {
      const __m512i left = _mm512_load_si512(panel + j * 16), right = _mm512_load_si512(panel + TILE + j * 16);
      for (int run = 0; run < 2; ++run) {
        for (int i = 0; i < COUNT; ++i) {
          int32_t four;
          std::memcpy(&four, line[run] + i * TILE_INPUTS + j, sizeof four);
          sum[run][i][0] = _mm512_dpbusd_epi32(sum[run][i][0], left, _mm512_set1_epi32(four));
          sum[run][i][1] = _mm512_dpbusd_epi32(sum[run][i][1], right, _mm512_set1_epi32(four));
        }
      }
    }
  }
  for (int run = 0; run < 2; ++run) {
    for (int i = 0; i < COUNT; ++i) {
      _mm512_store_si512(sums + (lines[run] + i) * PANEL_OUTPUTS, sum[run][i][0]);
      _mm512_store_si512(sums + (lines[run] + i) * PANEL_OUTPUTS + 16, sum[run][i][1]);
    }
  }
}

// High and low digits are a pair of runs; single digits are, by halves, one of them twice
// where they are odd in number.
TARGET void multiply_group(const int8_t* codes, Layout layout, int64_t rows, const uint8_t* panel, int64_t steps,
                           int32_t* sums) {
  const int64_t pairs = layout.low ? rows : (rows + 1) / 2;
  const int64_t second = layout.low ? layout.low : rows - pairs;
  int64_t i = 0;
  const auto next = [&](auto count) __attribute__((target("avx512f,avx512vnni"), always_inline)) {
    multiply_lines<decltype(count)::value>(codes, i, i + second, layout.tiles, panel, steps, sums);
  };
  for (; i + LINES <= pairs; i += LINES) next(std::integral_constant<int, LINES>());
  switch (pairs - i) {
    case 3: return next(std::integral_constant<int, 3>());
    case 2: return next(std::integral_constant<int, 2>());
    case 1: return next(std::integral_constant<int, 1>());
    default: return;
  }
}

template <typename T>
TARGET_INLINE void multiply(const Product<T>& product) {
  alignas(64) int32_t sums[2 * TILE_ROWS * PANEL_OUTPUTS];
  const Codes& codes = product.codes;
  const int64_t group_rows = codes.layout.group_rows();
  avx512::Adder<T> adder(product);
  for (int64_t row = 0, g = 0; row < codes.rows; row += group_rows, ++g) {
    if (!codes.used[g]) continue;
    const int64_t rows = std::min(group_rows, codes.rows - row);
    multiply_group(codes.codes + g * product.inputs * codes.layout.tiles * TILE_ROWS, codes.layout, rows,
                   product.panel, product.inputs / TILE_INPUTS, sums);
    adder.start(sums, row, rows);
    adder.finish();
  }
  avx512::Expander(product.next, MINUS, PLUS).finish();
}

TARGET void multiply_f32(const Product<float>& product) { multiply(product); }

TARGET void multiply_f64(const Product<double>& product) { multiply(product); }

TARGET void expand(const Expansion& signs) { avx512::Expander(signs, MINUS, PLUS).finish(); }

const MatrixUnits units = {128,
                           INT64_MAX,  // two terms are slower than the tables
                           8,
                           1,
                           avx512::scale_inputs,
                           avx512::quantize,
                           expand,
                           multiply_f32,
                           multiply_f64,
                           nullptr,
                           nullptr};

}  // namespace

const Kernels avx512vnni_kernels = {"avx512vnni",
                                    avx512_kernels.to_float,
                                    avx512_kernels.from_double,
                                    avx512_kernels.build_tables,
                                    avx512_kernels.accumulate,
                                    avx512_transpose,
                                    avx512_add_products,
                                    &units};

}  // namespace hf_onebit
#endif
