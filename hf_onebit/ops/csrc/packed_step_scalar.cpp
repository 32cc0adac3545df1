// The loops of packed_step_strip.h for whatever processor the compiler takes for granted.
#define TARGET
#include "packed_step_strip.h"

namespace hf_onebit {

void scalar_packed_strip(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally) {
  strip(step, first, n, memory, tally);
}

}  // namespace hf_onebit
