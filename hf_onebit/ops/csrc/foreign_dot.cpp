#include "foreign_dot.h"

void hf_onebit_foreign_linear(ForeignPrepare prepare, ForeignDot dot, const void* const* weights, int64_t count,
                              int64_t weight_bytes, const float* x, int64_t batch, int64_t in_features, void* prepared,
                              int64_t prepared_bytes, float* y, int64_t out_features, int64_t begin, int64_t end) {
  char* const rows = static_cast<char*>(prepared);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t r = 0; r < batch; ++r) prepare(x + r * in_features, rows + r * prepared_bytes, in_features);
    const char* weight = static_cast<const char*>(weights[i]) + begin * weight_bytes;
    for (int64_t n = begin; n < end; ++n, weight += weight_bytes) {
      for (int64_t r = 0; r < batch; ++r) {
        dot(static_cast<int>(in_features), y + r * out_features + n, 0, weight, 0, rows + r * prepared_bytes, 0, 1);
      }
    }
  }
}
