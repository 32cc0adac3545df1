// Which loops a step on packed codes goes through, and its strips shared out among threads.
#include "packed_step.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "workspace.h"

namespace hf_onebit {
namespace {

constexpr int64_t SERIAL = 1 << 15;  // fewer weights are done before a second thread has woken

StripKernel kernel_in_use() {
#ifdef HF_ONEBIT_X86
  const char* name = kernels().name;
  const bool wide = std::strncmp(name, "avx512", 6) == 0 || std::strncmp(name, "amx", 3) == 0;
  __builtin_cpu_init();
  if (wide && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512_packed_strip;
  }
  if (wide || std::strcmp(name, "avx2") == 0) return avx2_packed_strip;
#endif
  return scalar_packed_strip;
}

struct Strips {
  const PackedStep& step;
  StripKernel kernel;
  int64_t floats;
  std::vector<Tally> tallies;
};

void do_strips(int64_t begin, int64_t end, void* context) {
  Strips& strips = *static_cast<Strips*>(context);
  float* memory = workspace().of_size(static_cast<size_t>(strips.floats));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * STRIP, n = std::min(STRIP, strips.step.columns - first);
    strips.kernel(strips.step, first, n, memory, strips.tallies[static_cast<size_t>(i)]);
  }
}

}  // namespace

int64_t packed_step_floats(const PackedStep& step) {
  const int64_t rows = step.by_blocks() ? BLOCK : step.in_features;
  const int64_t copies = step.rounding == PackedStep::inertia && !step.perm.empty() ? 2 : 1;
  return (3 * BLOCK + 2 * step.groups + copies * rows) * STRIP;
}

Tally packed_step(const PackedStep& step, const Pool& pool) {
  const int64_t count = (step.columns + STRIP - 1) / STRIP;
  Strips strips{step, kernel_in_use(), packed_step_floats(step), std::vector<Tally>(static_cast<size_t>(count))};
  if (count > 0) run(pool, step.in_features * step.columns < SERIAL, count, do_strips, &strips);
  Tally total;
  for (const Tally& each : strips.tallies) {
    for (int i = 0; i < 5; ++i) total.sums[i] += each.sums[i];
  }
  return total;
}

}  // namespace hf_onebit
