// What a backward pass adds to the forward's kernels, in plain C++.
#include <algorithm>

#include "kernels.h"

namespace hf_onebit {
namespace {

// Halves of halves trade places: what a step moves, and the bits that stay in a row with that bit of its number clear.
struct Step {
  int distance;
  uint32_t stays;
};
constexpr Step STEPS[] = {
    {16, 0x0000ffffu}, {8, 0x00ff00ffu}, {4, 0x0f0f0f0fu}, {2, 0x33333333u}, {1, 0x55555555u}};

void transpose_32(uint32_t* word) {
  for (const Step& step : STEPS) {
    for (int i = 0; i < 32; ++i) {
      if (i & step.distance) continue;
      uint32_t &low = word[i], &high = word[i + step.distance];
      const uint32_t moved = ((low >> step.distance) ^ high) & step.stays;
      high ^= moved;
      low ^= moved << step.distance;
    }
  }
}

}  // namespace

void scalar_transpose(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, int32_t* target,
                      int64_t target_stride) {
  uint32_t square[32];
  for (int64_t n = 0; n < outputs; n += WORD, target += target_stride) {
    const int64_t count = std::min(WORD, outputs - n);
    for (int64_t k = 0; k < words; ++k) {
      for (int64_t i = 0; i < count; ++i) square[i] = static_cast<uint32_t>(weight[k * row_stride + n + i]);
      std::fill(square + count, square + WORD, 0u);
      transpose_32(square);
      for (int64_t j = 0; j < WORD; ++j) target[k * WORD + j] = static_cast<int32_t>(square[j]);
    }
  }
}

void scalar_add_products(const float* u, const float* v, int64_t n, double* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(u[i]) * v[i];
}

}  // namespace hf_onebit
