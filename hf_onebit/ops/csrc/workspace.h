// What every operator's conductor uses: its memory between calls, vectors of any dtype as float32, and the choice between
// the pool and the calling thread.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "kernels.h"

namespace hf_onebit {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The one workspace of a calling thread, grown to the largest need it has met and kept.
class Workspace {
 public:
  float* of_size(size_t floats) {
    if (floats > size_) {
      memory_.reset();  // before the new one: the peak is one workspace, not two
      size_ = 0;
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64))));
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};

// The calling thread's, shared by all operators.
inline Workspace& workspace() {
  static thread_local Workspace of_this_thread;
  return of_this_thread;
}

inline void to_float(const Kernels& isa, const Vector& vector, int64_t begin, int64_t n, float* target) {
  if (vector.stride == 1) {
    isa.to_float(static_cast<const char*>(vector.data) + begin * size_of(vector.dtype), vector.dtype, n, target);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = static_cast<float>(load(vector, begin + i));
  }
}

inline void run(const Pool& pool, bool serial, int64_t count, Body body, void* context) {
  if (serial || pool.threads == 1 || count == 1) {
    body(0, count, context);
  } else {
    pool.run(count, body, context);
  }
}

}  // namespace hf_onebit
