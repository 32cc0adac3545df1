// The torch-free core without Python: tests/ops/test_neon.py compiles it for other processors, run in an emulator.
//
//   kernels_driver list
//   kernels_driver ISA SEED CASES BOUND CODES_BOUND
//
// Draws CASES products of ragged shapes, dtypes and strides and computes each with ISA. Held against float64:
// |y - y64| <= BOUND * sum |a b x|, and the rounding of a 16-bit result; CODES_BOUND where 16 bits go through the codes
// of matrix units. y and the memory around it are poisoned before; nothing may be read past the end of an input;
// results of 1, 2 and 8 threads must be equal. Prints one line, which also counts the cases that went through codes and
// those whose bits differ from those of `scalar`; the status is 0 if all held.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "onebit_matrix.h"

namespace {

using namespace hf_onebit;

constexpr double EPSILON[] = {0x1p-10, 0x1p-7, 0x1p-23, 0x1p-52};   // by Dtype
constexpr double SMALLEST[] = {0x1p-14, 0x1p-126, 0x1p-126, 0};    // normal numbers
constexpr char POISON = '\xff';                                    // a NaN in every dtype

template <int THREADS>
void run_threads(int64_t count, Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < THREADS; ++i) {
    const int64_t begin = count * i / THREADS, end = count * (i + 1) / THREADS;
    if (begin < end) threads.emplace_back([=] { body(begin, end, context); });
  }
  for (std::thread& thread : threads) thread.join();
}

constexpr Pool POOLS[] = {{1, run_threads<1>}, {2, run_threads<2>}, {8, run_threads<8>}};

// Poisoned memory that ends where an unreadable page begins: reading past it is a fault.
class Memory {
 public:
  explicit Memory(size_t size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t readable = (size + page - 1) / page * page;
    void* mapped = mmap(nullptr, readable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || mprotect(static_cast<char*>(mapped) + readable, page, PROT_NONE)) std::abort();
    pages_ = {static_cast<char*>(mapped), Free{readable + page}};
    data_ = pages_.get() + (readable - size);
    std::memset(data_, POISON, size);
  }

  char* data() const { return data_; }

 private:
  struct Free {
    size_t size;
    void operator()(char* pages) const { munmap(pages, size); }
  };
  std::unique_ptr<char, Free> pages_{nullptr, Free{0}};
  char* data_ = nullptr;
};

struct Buffer {
  Dtype dtype;
  Memory bytes;

  Buffer(Dtype dtype, int64_t n) : dtype(dtype), bytes(static_cast<size_t>(n * size_of(dtype))) {}

  void set(int64_t i, double value) {
    char* target = bytes.data() + i * size_of(dtype);
    const float narrow = static_cast<float>(value);
    const uint16_t half = dtype == Dtype::f16 ? f16_of_float(narrow) : bf16_of_float(narrow);
    if (dtype == Dtype::f64) std::memcpy(target, &value, 8);
    if (dtype == Dtype::f32) std::memcpy(target, &narrow, 4);
    if (size_of(dtype) == 2) std::memcpy(target, &half, 2);
  }

  double get(int64_t i) const { return load({bytes.data(), dtype, 1}, i); }
};

struct Failure {
  std::string what;
};

[[noreturn]] void fail(const std::string& what) { throw Failure{what}; }

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  int64_t one_of(std::initializer_list<int64_t> numbers) {
    return numbers.begin()[below(static_cast<int64_t>(numbers.size()))];
  }
  Dtype dtype() { return static_cast<Dtype>(below(4)); }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }
  // Signed and of many magnitudes; a third of the draws is positive, a third all the same, so that roundings add up.
  double number(int kind) {
    if (kind == 2) return 0.1;
    const double value = std::ldexp(static_cast<double>(bits()) / 0x1p31 - 1, static_cast<int>(below(5)));
    return kind == 1 ? std::fabs(value) : value;
  }

 private:
  std::mt19937_64 engine_;
};

struct Case {
  int64_t in_features, out_features, rows, x_stride, row_stride;
  int planes;
  bool has_bias;
  Dtype dtype;
  int kind;
  Buffer x, bias;
  std::vector<Buffer> a, b;
  std::vector<Memory> words;

  explicit Case(Random& random)
      : in_features(random.below(3) ? random.below(140) : random.one_of({255, 256, 257, 511, 513, 1023})),
        out_features(random.below(5) ? random.below(75) : random.one_of({127, 1023, 1025, 1300})),
        // Not everything large at once: an emulator takes its time.
        rows(in_features * out_features > 50000 ? random.below(3)
                                                : random.one_of({0, 1, 1, 2, 3, 4, 5, 7, 15, 16, 17, 65})),
        x_stride(in_features + random.below(3)),
        row_stride(out_features + random.below(3)),
        planes(1 + static_cast<int>(random.below(2))),
        has_bias(random.below(2)),
        dtype(random.dtype()),
        kind(static_cast<int>(random.below(3))),
        x(dtype, rows ? (rows - 1) * x_stride + in_features : 0),
        bias(random.dtype(), out_features) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < in_features; ++k) x.set(r * x_stride + k, random.number(kind));
    }
    for (int64_t n = 0; n < out_features; ++n) bias.set(n, random.number(kind));
    const int64_t word_rows = (in_features + WORD - 1) / WORD;
    for (int p = 0; p < planes; ++p) {
      a.emplace_back(random.dtype(), out_features);
      b.emplace_back(random.dtype(), in_features);
      for (int64_t n = 0; n < out_features; ++n) a[p].set(n, random.number(kind));
      for (int64_t k = 0; k < in_features; ++k) b[p].set(k, random.number(kind));
      const int64_t count = word_rows && out_features ? (word_rows - 1) * row_stride + out_features : 0;
      words.emplace_back(static_cast<size_t>(count) * sizeof(int32_t));
      for (int64_t i = 0; i < count; ++i) words_of(p)[i] = static_cast<int32_t>(kind == 2 ? ~0u : random.bits());
    }
  }

  int32_t* words_of(int p) const { return reinterpret_cast<int32_t*>(words[p].data()); }

  double sign(int p, int64_t n, int64_t k) const {
    const uint32_t word = static_cast<uint32_t>(words_of(p)[k / WORD * row_stride + n]);
    return (word >> (k % WORD)) & 1u ? 1.0 : -1.0;
  }

  Linear product(char* y) const {
    Linear linear;
    linear.rows = rows;
    linear.in_features = in_features;
    linear.out_features = out_features;
    linear.x = x.bytes.data();
    linear.x_stride = x_stride;
    linear.dtype = dtype;
    linear.planes = planes;
    for (int p = 0; p < planes; ++p) {
      linear.plane[p].weight = words_of(p);
      linear.plane[p].row_stride = row_stride;
      linear.plane[p].a = {a[p].bytes.data(), a[p].dtype, 1};
      linear.plane[p].b = {b[p].bytes.data(), b[p].dtype, 1};
    }
    if (has_bias) linear.bias = {bias.bytes.data(), bias.dtype, 1};
    linear.y = y;
    return linear;
  }

  // Whether these inputs become codes of so few digits that the result tells.
  bool by_codes() const { return size_of(dtype) == 2 && matrix_units_pay(product(nullptr), kernels(), false); }

  std::vector<char> compute(const Pool& pool) const {
    constexpr size_t FENCE = 64;
    const size_t size = static_cast<size_t>(rows * out_features * size_of(dtype));
    std::vector<char> y(size + 2 * FENCE, POISON);
    onebit_linear(product(y.data() + FENCE), pool);
    const auto untouched = [](char byte) { return byte == POISON; };
    if (!std::all_of(y.begin(), y.begin() + FENCE, untouched) || !std::all_of(y.end() - FENCE, y.end(), untouched)) {
      fail("wrote outside of y");
    }
    return {y.begin() + FENCE, y.end() - FENCE};
  }

  // The largest |y - y64| / sum |a b x|, once the rounding of a 16-bit y is taken off.
  double check(double bound) const {
    const std::vector<char> y = compute(POOLS[0]);
    for (const Pool& pool : POOLS) {
      if (compute(pool) != y) fail(std::to_string(pool.threads) + " threads give other bits than one");
    }
    const int index = static_cast<int>(dtype);
    double worst = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < out_features; ++n) {
        double exact = has_bias ? bias.get(n) : 0, sum = std::fabs(exact);
        for (int p = 0; p < planes; ++p) {
          for (int64_t k = 0; k < in_features; ++k) {
            const double term = a[p].get(n) * b[p].get(k) * x.get(r * x_stride + k);
            exact += term * sign(p, n, k);
            sum += std::fabs(term);
          }
        }
        const double got = load({y.data(), dtype, 1}, r * out_features + n);
        if (std::isinf(got) && dtype == Dtype::f16 && std::fabs(exact) >= 65519) continue;
        const double rounding = size_of(dtype) == 2 ? 0.501 * EPSILON[index] * std::fabs(exact) + SMALLEST[index] : 0;
        const double error = std::max(std::fabs(got - exact) - rounding, 0.0);
        if (!(error <= (dtype == Dtype::f64 ? 1e-13 : bound) * sum)) {
          fail("output " + std::to_string(n) + " of row " + std::to_string(r) + " is " + std::to_string(got) +
               ", expected " + std::to_string(exact));
        }
        if (sum > 0) worst = std::max(worst, error / sum);
      }
    }
    return worst;
  }

  std::string name() const {
    return "rows " + std::to_string(rows) + ", in " + std::to_string(in_features) + ", out " +
           std::to_string(out_features) + ", planes " + std::to_string(planes) + ", dtype " +
           std::to_string(static_cast<int>(dtype)) + ", kind " + std::to_string(kind);
  }
};

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// All 65536 halves in; those, the ties between them, and what lies just beside the ties out. In odd numbers, so that
// the remainder of a vector is converted too.
void check_conversions() {
  constexpr int64_t N = 65536 - 3;
  const Kernels& isa = kernels();
  for (const Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    std::vector<uint16_t> halves(N);
    for (int64_t i = 0; i < N; ++i) halves[i] = static_cast<uint16_t>(i + 3);
    std::vector<float> got(N), want(N);
    isa.to_float(halves.data(), dtype, N, got.data());
    scalar_kernels.to_float(halves.data(), dtype, N, want.data());
    for (int64_t i = 0; i < N; ++i) {
      if (!same(got[i], want[i])) fail("to_float of half " + std::to_string(halves[i]));
    }
    std::vector<double> numbers;
    for (int64_t i = 0; i + 1 < N; ++i) {
      const double tie = (static_cast<double>(want[i]) + want[i + 1]) / 2;
      numbers.insert(numbers.end(), {static_cast<double>(want[i]), tie, tie * (1 + 0x1p-20), tie * (1 - 0x1p-20)});
    }
    const int64_t count = static_cast<int64_t>(numbers.size());
    for (const Dtype target : {Dtype::f16, Dtype::bf16, Dtype::f32, Dtype::f64}) {
      Buffer fast(target, count), slow(target, count);
      isa.from_double(numbers.data(), count, target, fast.bytes.data());
      scalar_kernels.from_double(numbers.data(), count, target, slow.bytes.data());
      for (int64_t i = 0; i < count; ++i) {
        if (!same(fast.get(i), slow.get(i))) fail("from_double of " + std::to_string(numbers[i]));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "list")) return std::puts(hf_onebit_isas()) < 0;
  if (argc != 6) return std::fputs("usage: kernels_driver list | ISA SEED CASES BOUND CODES_BOUND\n", stderr), 2;
  const std::string isa = argv[1];
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  const int64_t cases = std::strtoll(argv[3], nullptr, 10);
  const double bound = std::strtod(argv[4], nullptr), codes_bound = std::strtod(argv[5], nullptr);
  if (hf_onebit_select_isa(isa.c_str())) return std::fprintf(stderr, "this machine runs %s\n", hf_onebit_isas()), 2;
  std::string where = "conversions";
  try {
    check_conversions();
    double worst = 0, worst_codes = 0;
    int64_t codes = 0, differ = 0;
    for (int64_t i = 0; i < cases; ++i) {
      Random random(seed + static_cast<uint64_t>(i));
      const Case one(random);
      where = "case " + std::to_string(i) + " (" + one.name() + ")";
      const bool by_codes = one.by_codes();
      double& worst_of_kind = by_codes ? worst_codes : worst;
      worst_of_kind = std::max(worst_of_kind, one.check(by_codes ? codes_bound : bound));
      codes += by_codes;
      const std::vector<char> y = one.compute(POOLS[0]);
      hf_onebit_select_isa("scalar");
      differ += one.compute(POOLS[0]) != y;
      hf_onebit_select_isa(isa.c_str());
    }
    std::printf("%s: %lld cases, worst error %.2e, %lld by codes, worst error %.2e, %lld with other bits than scalar\n",
                isa.c_str(), static_cast<long long>(cases), worst, static_cast<long long>(codes), worst_codes,
                static_cast<long long>(differ));
  } catch (const Failure& failure) {
    std::fprintf(stderr, "%s: %s: %s\n", isa.c_str(), where.c_str(), failure.what.c_str());
    return 1;
  }
  return 0;
}
