#include "bandwidth.h"

#include <cstring>

#ifdef HF_ONEBIT_X86
#include <immintrin.h>
#endif

namespace {

// One pass of a loop: four lines of 64 bytes, into as many independent registers as they fill.
constexpr int64_t STEP = 256;
// How far ahead lines are asked for. The processor's own prefetchers stop at the end of each 4 KiB page.
constexpr int64_t AHEAD = 1024;

uint64_t read_scalar(const char* data, int64_t bytes) {
  uint64_t sum[4] = {};
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    uint64_t words[4];
    std::memcpy(words, data + i, sizeof words);
    for (int j = 0; j < 4; ++j) sum[j] ^= words[j];
  }
  for (; i < bytes; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + i, bytes - i < 8 ? bytes - i : 8);
    sum[0] ^= word;
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

#ifdef HF_ONEBIT_X86
__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, int64_t bytes) {
  __m256i sum[8];
  for (__m256i& each : sum) each = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + STEP <= bytes; i += STEP) {
    for (int j = 0; j < 4; ++j) _mm_prefetch(data + i + AHEAD + 64 * j, _MM_HINT_T0);
    for (int j = 0; j < 8; ++j) {
      sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j)));
    }
  }
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_xor_si256(sum[0], sum[j]);
  alignas(32) char folded[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(folded), sum[0]);
  return read_scalar(folded, sizeof folded) ^ read_scalar(data + i, bytes - i);
}

__attribute__((target("avx512f"))) uint64_t read_avx512(const char* data, int64_t bytes) {
  __m512i sum[4];
  for (__m512i& each : sum) each = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + STEP <= bytes; i += STEP) {
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(data + i + AHEAD + 64 * j, _MM_HINT_T0);
      sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(data + i + 64 * j));
    }
  }
  for (int j = 1; j < 4; ++j) sum[0] = _mm512_xor_si512(sum[0], sum[j]);
  alignas(64) char folded[64];
  _mm512_store_si512(folded, sum[0]);
  return read_scalar(folded, sizeof folded) ^ read_scalar(data + i, bytes - i);
}
#endif

struct Reader {
  const char* name;
  uint64_t (*read)(const char* data, int64_t bytes);
};

Reader reader(const char* isa) {
#ifdef HF_ONEBIT_X86
  __builtin_cpu_init();
  const auto wanted = [isa](const char* name) { return isa == nullptr || std::strcmp(isa, name) == 0; };
  if (wanted("avx512") && __builtin_cpu_supports("avx512f")) return {"avx512", read_avx512};
  if (wanted("avx2") && __builtin_cpu_supports("avx2")) return {"avx2", read_avx2};
#else
  static_cast<void>(isa);
#endif
  return {"scalar", read_scalar};
}

}  // namespace

uint64_t hf_onebit_read(const void* const* buffers, int64_t count, int64_t bytes, const char* isa) {
  const auto read = reader(isa).read;
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum ^= read(static_cast<const char*>(buffers[i]), bytes);
  return sum;
}

const char* hf_onebit_read_isa() { return reader(nullptr).name; }
