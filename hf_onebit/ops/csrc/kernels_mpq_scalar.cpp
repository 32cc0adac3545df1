// Group-quantized weights in plain C++, and the choice among the instruction sets.
#include <algorithm>
#include <cstring>

#include "mpq_kernels.h"
#include "mpq_linear.h"

namespace hf_onebit {
namespace {

float look_up(uint32_t word, const float* tables) {
  float s[NIBBLES];
  for (int g = 0; g < NIBBLES; ++g) s[g] = tables[g * TABLE + ((word >> (4 * g)) & 15u)];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

void accumulate(const GroupBlock& block, const float* tables, int64_t rows, double* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r, tables += BLOCK_WORDS * NIBBLES * TABLE, y += y_stride) {
    for (int64_t n = 0; n < block.outputs; ++n) {
      float sum = look_up(static_cast<uint32_t>(block.weight[n]), tables);
      for (int64_t k = 1; k < block.words; ++k) {
        sum += look_up(static_cast<uint32_t>(block.weight[k * block.row_stride + n]), tables + k * NIBBLES * TABLE);
      }
      const float scale = block.scales[n];
      if (block.zeros) {
        y[n] += scale * sum - (block.zeros[n] - scale * block.middle) * block.sums[r];
      } else {
        y[n] += scale * (sum - block.sums[r]);
      }
    }
  }
}

void expand(const int32_t* weight, int64_t row_stride, int64_t bits, int64_t outputs, const float* scales,
            const float* zeros, float zero_point, const int64_t* at, float* W) {
  for (int64_t j = 0; j < WORD; ++j, W += TILE_OUTPUTS) {
    const int64_t begin = at ? at[j] : 0;
    for (int64_t n = 0; n < outputs; ++n) {
      const float q = static_cast<float>(code_of(weight + n, row_stride, bits, j));
      const float scale = scales[begin + n];
      W[n] = zeros ? scale * q - zeros[begin + n] : scale * (q - zero_point);
    }
    std::fill(W + outputs, W + TILE_OUTPUTS, 0.0f);
  }
}

void multiply(const float* x, int64_t x_stride, int64_t rows, const float* W, int64_t inputs, double* y,
              int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r, x += x_stride, y += y_stride) {
    float sums[TILE_OUTPUTS] = {};
    for (int64_t k = 0; k < inputs; ++k) {
      for (int64_t n = 0; n < TILE_OUTPUTS; ++n) sums[n] += x[k] * W[k * TILE_OUTPUTS + n];
    }
    for (int64_t n = 0; n < TILE_OUTPUTS; ++n) y[n] += sums[n];
  }
}

}  // namespace

const MpqKernels scalar_mpq_kernels = {&scalar_kernels, accumulate, expand, multiply};

const MpqKernels& mpq_kernels() {
#ifdef HF_ONEBIT_X86
  const char* name = kernels().name;
  // A machine with matrix units (mpq_tiles.h) has AVX-512 and its byte products, for few rows.
  const bool vnni = std::strncmp(name, "amx", 3) == 0 || std::strcmp(name, "avx512vnni") == 0;
  static const MpqKernels* const with_vnni = vnni_mpq_kernels();
  if (vnni && with_vnni) return *with_vnni;
  if (vnni || std::strncmp(name, "avx512", 6) == 0) return avx512_mpq_kernels;
  if (std::strcmp(name, "avx2") == 0) return avx2_mpq_kernels;
#endif
  return scalar_mpq_kernels;
}

}  // namespace hf_onebit
