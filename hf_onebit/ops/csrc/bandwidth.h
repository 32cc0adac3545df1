// How fast memory can be read: the limit that a product from packed bits is compared with. For Python, by ctypes.
#pragma once

#include "kernels.h"

// Reads `bytes` bytes of each of `count` buffers in turn, and nothing else. The result is the exclusive or of all their
// 64-bit little-endian words, a last word short of bytes filled with zeros: no byte can have been left out. `isa` is
// scalar, avx2 or avx512; null for the widest registers of this machine. An `isa` that this machine lacks reads as scalar.
HF_ONEBIT_EXPORT uint64_t hf_onebit_read(const void* const* buffers, int64_t count, int64_t bytes, const char* isa);

// The one that a null `isa` stands for.
HF_ONEBIT_EXPORT const char* hf_onebit_read_isa();
