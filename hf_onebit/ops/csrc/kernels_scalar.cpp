// Plain C++: what any machine runs, what the other instruction sets are compared with, and float64.
#include <algorithm>

#include "half.h"
#include "kernels.h"

namespace hf_onebit {
namespace {

void to_float(const void* source, Dtype dtype, int64_t n, float* target) {
  const Vector vector{source, dtype, 1};
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<float>(load(vector, i));
}

void from_double(const double* source, int64_t n, Dtype dtype, void* target) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>(source[i]);
    switch (dtype) {
      case Dtype::f16: static_cast<uint16_t*>(target)[i] = f16_of_float(value); break;
      case Dtype::bf16: static_cast<uint16_t*>(target)[i] = bf16_of_float(value); break;
      case Dtype::f32: static_cast<float*>(target)[i] = value; break;
      case Dtype::f64: static_cast<double*>(target)[i] = source[i]; break;
    }
  }
}

// Entry m of a table is the sum with +u[i] where bit i of m is set, -u[i] elsewhere.
template <typename T>
void build(const T* u, int64_t words, T* tables) {
  for (int64_t nibble = 0; nibble < words * NIBBLES; ++nibble, u += 4, tables += TABLE) {
    const T low[4] = {-u[0] - u[1], u[0] - u[1], u[1] - u[0], u[0] + u[1]};
    const T high[4] = {-u[2] - u[3], u[2] - u[3], u[3] - u[2], u[2] + u[3]};
    for (int m = 0; m < TABLE; ++m) tables[m] = low[m & 3] + high[m >> 2];
  }
}

template <typename T>
T look_up(uint32_t word, const T* tables) {
  T s[NIBBLES];
  for (int g = 0; g < NIBBLES; ++g) s[g] = tables[g * TABLE + ((word >> (4 * g)) & 15u)];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

void accumulate(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, const float* tables,
                int64_t rows, double* totals, int64_t totals_stride) {
  for (int64_t r = 0; r < rows; ++r, tables += BLOCK_WORDS * NIBBLES * TABLE, totals += totals_stride) {
    for (int64_t n = 0; n < outputs; ++n) {
      float sum = look_up(static_cast<uint32_t>(weight[n]), tables);
      for (int64_t k = 1; k < words; ++k) {
        sum += look_up(static_cast<uint32_t>(weight[k * row_stride + n]), tables + k * NIBBLES * TABLE);
      }
      totals[n] += sum;
    }
  }
}

}  // namespace

double load(const Vector& vector, int64_t i) {
  i *= vector.stride;
  switch (vector.dtype) {
    case Dtype::f16: return float_of_f16(static_cast<const uint16_t*>(vector.data)[i]);
    case Dtype::bf16: return float_of_bf16(static_cast<const uint16_t*>(vector.data)[i]);
    case Dtype::f32: return static_cast<const float*>(vector.data)[i];
    case Dtype::f64: break;
  }
  return static_cast<const double*>(vector.data)[i];
}

void onebit_linear_f64(const Linear& linear, int64_t begin, int64_t end) {
  alignas(64) double tables[NIBBLES * TABLE];
  double* y = static_cast<double*>(linear.y);
  for (int64_t r = 0; r < linear.rows; ++r, y += linear.out_features) {
    const double* x = static_cast<const double*>(linear.x) + r * linear.x_stride;
    for (int64_t n = begin; n < end; ++n) y[n] = linear.bias.data ? load(linear.bias, n) : 0.0;
    for (int p = 0; p < linear.planes; ++p) {
      const Plane& plane = linear.plane[p];
      for (int64_t k = 0; k < linear.in_features; k += WORD) {
        double u[WORD] = {};  // inputs past the end count 0, whatever their bits
        for (int64_t j = 0; j < std::min(WORD, linear.in_features - k); ++j) u[j] = x[k + j] * load(plane.b, k + j);
        build(u, 1, tables);
        const int32_t* words = plane.weight + k / WORD * plane.row_stride;
        for (int64_t n = begin; n < end; ++n) {
          y[n] += load(plane.a, n) * look_up(static_cast<uint32_t>(words[n]), tables);
        }
      }
    }
  }
}

const Kernels scalar_kernels = {"scalar", to_float, from_double, build<float>, accumulate};

}  // namespace hf_onebit
