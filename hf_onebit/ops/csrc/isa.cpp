// Which instruction set to use: asked of the processor, never assumed from the machine that compiled.
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

#ifndef HF_ONEBIT_SOURCES
#define HF_ONEBIT_SOURCES ""
#endif

namespace hf_onebit {
namespace {

std::vector<const Kernels*> find_usable() {
  std::vector<const Kernels*> usable = {&scalar_kernels};
#ifdef HF_ONEBIT_X86
  // These ask the operating system too, which must save the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    usable.push_back(&avx2_kernels);
  }
  if (__builtin_cpu_supports("avx512f")) usable.push_back(&avx512_kernels);
  const bool bytes = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  if (bytes && __builtin_cpu_supports("avx512vnni")) usable.push_back(&avx512vnni_kernels);
  if (bytes && amx_is_usable()) usable.push_back(&amx_kernels);
#endif
#ifdef HF_ONEBIT_NEON
  usable.push_back(&neon_kernels);
#endif
  return usable;
}

const std::vector<const Kernels*>& usable() {
  static const std::vector<const Kernels*> found = find_usable();
  return found;
}

const Kernels*& selected() {
  static const Kernels* best = usable().back();
  return best;
}

bool int8 = false;

}  // namespace

const Kernels& kernels() { return *selected(); }

bool int8_activations() { return int8; }

}  // namespace hf_onebit

const char* hf_onebit_isa() { return hf_onebit::kernels().name; }

const char* hf_onebit_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const hf_onebit::Kernels* each : hf_onebit::usable()) joined += (joined.empty() ? "" : ",") + std::string(each->name);
    return joined;
  }();
  return names.c_str();
}

int hf_onebit_select_isa(const char* name) {
  for (const hf_onebit::Kernels* each : hf_onebit::usable()) {
    if (std::strcmp(each->name, name) == 0) {
      hf_onebit::selected() = each;
      return 0;
    }
  }
  return 1;
}

const char* hf_onebit_activations() { return hf_onebit::int8 ? "int8" : "exact"; }

int hf_onebit_select_activations(const char* name) {
  const bool int8 = std::strcmp(name, "int8") == 0;
  if (!int8 && std::strcmp(name, "exact") != 0) return 1;
  hf_onebit::int8 = int8;
  return 0;
}

const char* hf_onebit_sources() { return HF_ONEBIT_SOURCES; }
