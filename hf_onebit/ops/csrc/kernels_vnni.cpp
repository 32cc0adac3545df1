// AVX-512-VNNI: codes times panels of unsigned bytes, four inputs of 16 outputs an instruction. Few rows are left to the tables.
#include "kernels.h"
#include "matrix_avx512.h"

#ifdef HF_ONEBIT_X86
#include <immintrin.h>

#include <algorithm>

#define TARGET __attribute__((target("avx512f,avx512vnni")))
#define TARGET_INLINE __attribute__((target("avx512f,avx512vnni"), always_inline)) inline

namespace hf_onebit {
namespace {

constexpr uint8_t MINUS = 0, PLUS = 2;  // the signs plus 1
constexpr int LINES = 8;  // tile rows at once: 16 sums stay in registers, enough to hide how long each takes

// The sums of COUNT tile rows, whose places in a group are lines[i].
template <int COUNT>
TARGET_INLINE void multiply_lines(const int8_t* codes, const int64_t* lines, int64_t tiles, const uint8_t* panel,
                                  int64_t steps, int32_t* sums) {
  const int8_t* line[COUNT];
  __m512i left[COUNT], right[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    line[i] = codes + lines[i] * TILE_INPUTS;
    left[i] = right[i] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < steps; ++k, panel += 2 * TILE) {
    for (int64_t j = 0; j < TILE_INPUTS; j += 4) {
      const __m512i sixteen = _mm512_load_si512(panel + j * 16), next = _mm512_load_si512(panel + TILE + j * 16);
      for (int i = 0; i < COUNT; ++i) {
        const __m512i four = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(line[i] + k * tiles * TILE + j));
        left[i] = _mm512_dpbusd_epi32(left[i], sixteen, four);
        right[i] = _mm512_dpbusd_epi32(right[i], next, four);
      }
    }
  }
  for (int i = 0; i < COUNT; ++i) {
    _mm512_store_si512(sums + lines[i] * PANEL_OUTPUTS, left[i]);
    _mm512_store_si512(sums + lines[i] * PANEL_OUTPUTS + 16, right[i]);
  }
}

TARGET void multiply_group(const int8_t* codes, Layout layout, int64_t rows, const uint8_t* panel, int64_t steps,
                           int32_t* sums) {
  int64_t lines[2 * TILE_ROWS], count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    lines[count++] = r;
    if (layout.low) lines[count++] = r + layout.low;
  }
  int64_t i = 0;
  for (; i + LINES <= count; i += LINES) multiply_lines<LINES>(codes, lines + i, layout.tiles, panel, steps, sums);
  switch (count - i) {
    case 0: return;
    case 1: return multiply_lines<1>(codes, lines + i, layout.tiles, panel, steps, sums);
    case 2: return multiply_lines<2>(codes, lines + i, layout.tiles, panel, steps, sums);
    case 3: return multiply_lines<3>(codes, lines + i, layout.tiles, panel, steps, sums);
    case 4: return multiply_lines<4>(codes, lines + i, layout.tiles, panel, steps, sums);
    case 5: return multiply_lines<5>(codes, lines + i, layout.tiles, panel, steps, sums);
    case 6: return multiply_lines<6>(codes, lines + i, layout.tiles, panel, steps, sums);
    default: return multiply_lines<7>(codes, lines + i, layout.tiles, panel, steps, sums);
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

const MatrixUnits units = {8,
                           8,
                           2,
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
                                    &units};

}  // namespace hf_onebit
#endif
