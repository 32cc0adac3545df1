// AMX: tiles of 16 rows of codes by 64 inputs times panels of signs as int8. Few rows are left to AVX-512.
#include "kernels.h"
#include "matrix_avx512.h"

#if defined(HF_ONEBIT_X86) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#define TARGET __attribute__((target("avx512f,amx-tile,amx-int8")))
#define TARGET_INLINE __attribute__((target("avx512f,amx-tile,amx-int8"), always_inline)) inline

namespace hf_onebit {
namespace {

// The signs plus 1, which draws less power than -1 and +1: the units slow down with every bit that changes.
constexpr uint8_t MINUS = 0, PLUS = 2;
constexpr int64_t PACE = 4;  // groups over which the expansion of the next panel is spread

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == sizeof(SavedState), "the size the instructions know");

// In memory for good: gcc believes that the instruction reads eight bytes, and leaves out what else a local would hold.
const Configuration ours;

// Other libraries configure tiles too and may rely on finding theirs.
TARGET void enter(SavedState* saved) {
  _tile_storeconfig(saved);
  _tile_loadconfig(&ours);
}

TARGET void leave(const SavedState* saved) {
  if (saved->bytes[0]) {
    _tile_loadconfig(saved);
  } else {
    _tile_release();
  }
}

// One group by one panel: sums are tiles 0..3, codes 4 and 5, signs 6 and 7. The units take 16 cycles for a product and
// few instructions, so `meanwhile` costs nothing.
template <int TILES, typename Meanwhile>
TARGET_INLINE void multiply_group(const int8_t* codes, const uint8_t* panel, int64_t steps, int32_t* sums,
                                  const Meanwhile& meanwhile) {
  constexpr int64_t LINE = PANEL_OUTPUTS * sizeof(int32_t);
  _tile_zero(0);
  _tile_zero(1);
  if (TILES == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, codes += TILES * TILE, panel += 2 * TILE) {
    _tile_loadd(4, codes, 64);
    _tile_loadd(6, panel, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, panel + TILE, 64);
    _tile_dpbsud(1, 4, 7);
    if (TILES == 2) {
      _tile_loadd(5, codes + TILE, 64);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    meanwhile();
  }
  _tile_stored(0, sums, LINE);
  _tile_stored(1, sums + 16, LINE);
  if (TILES == 2) {
    _tile_stored(2, sums + TILE_ROWS * PANEL_OUTPUTS, LINE);
    _tile_stored(3, sums + TILE_ROWS * PANEL_OUTPUTS + 16, LINE);
  }
}

template <int TILES, typename T>
TARGET_INLINE void multiply(const Product<T>& product) {
  alignas(64) int32_t sums[2][TILES * TILE_ROWS * PANEL_OUTPUTS];
  const Codes& codes = product.codes;
  const int64_t group_rows = codes.layout.group_rows(), steps = product.inputs / TILE_INPUTS;
  avx512::Expander expander(product.next, MINUS, PLUS);
  avx512::Adder<T> adder(product);
  const int64_t groups = (codes.rows + group_rows - 1) / group_rows;
  const int64_t pace = std::min(PACE, groups) * steps;
  const int64_t units = (expander.units() + pace - 1) / pace, rows_a_step = (group_rows + steps - 1) / steps;
  int buffer = 0;
  for (int64_t row = 0, g = 0; row < codes.rows; row += group_rows, ++g) {
    if (!codes.used[g]) continue;
    const auto meanwhile = [&]() __attribute__((target("avx512f,amx-tile,amx-int8"), always_inline)) {
      for (int64_t i = 0; i < units; ++i) expander.step();
      for (int64_t i = 0; i < rows_a_step; ++i) adder.step();
    };
    multiply_group<TILES>(codes.codes + g * steps * TILES * TILE, product.panel, steps, sums[buffer], meanwhile);
    adder.finish();
    adder.start(sums[buffer], row, std::min(group_rows, codes.rows - row));
    buffer ^= 1;
  }
  expander.finish();
  adder.finish();
}

template <typename T>
TARGET_INLINE void multiply_any(const Product<T>& product) {
  product.codes.layout.tiles == 2 ? multiply<2>(product) : multiply<1>(product);
}

TARGET void multiply_f32(const Product<float>& product) { multiply_any(product); }

TARGET void multiply_f64(const Product<double>& product) { multiply_any(product); }

TARGET void expand(const Expansion& signs) { avx512::Expander(signs, MINUS, PLUS).finish(); }

const MatrixUnits units = {6,
                           12,
                           6,
                           1,
                           avx512::scale_inputs,
                           avx512::quantize,
                           expand,
                           multiply_f32,
                           multiply_f64,
                           enter,
                           leave};

}  // namespace

bool amx_is_usable() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = (d >> 24) & 1u, int8 = (d >> 25) & 1u;
  if (!tile || !int8) return false;
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
                             &units};

}  // namespace hf_onebit
#elif defined(HF_ONEBIT_X86)
namespace hf_onebit {
bool amx_is_usable() { return false; }
const Kernels amx_kernels = {};
}  // namespace hf_onebit
#endif
