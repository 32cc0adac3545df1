// What one instruction set has to provide, and the choice among those this machine has.
//
// The algorithm is a nibble table. Four inputs u0..u3 have 16 signed sums +-u0 +-u1 +-u2 +-u3; four neighbouring
// bits of a word choose one. So 32 weights cost eight look-ups and eight additions, shared by no multiplication,
// and a table is as wide as an AVX-512 register: one permutation looks up for 16 outputs. All sums are float32.
//
// Rounding of float32 sums, which the tests hold to 1e-6 * sum |a b x|: every input passes 1 rounding in b x, 2 in its table, 3 in
// the tree over a word's eight nibbles, at most 7 in the sum over the BLOCK_WORDS words of a block; blocks, a and
// bias meet in float64, which is rounded once. 14 roundings of 2^-24 are 8.4e-7 in the worst case.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "onebit_linear.h"

namespace hf_onebit {

constexpr int64_t WORD = 32;        // inputs in a word
constexpr int64_t NIBBLES = 8;      // tables of a word
constexpr int64_t TABLE = 16;       // room for one table, in floats
constexpr int64_t BLOCK_WORDS = 8;  // word rows summed in float32: their tables, 4 KiB a row of x, stay in L1
constexpr int64_t MAX_ROWS = 4;     // rows of x that share one reading of the words
constexpr int64_t LANES = 16;       // `totals` are padded to a multiple of this

// Each processor can run these; see transpose and add_products below.
void scalar_transpose(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, int32_t* target,
                      int64_t target_stride);
void scalar_add_products(const float* u, const float* v, int64_t n, double* sums);

struct Kernels {
  const char* name;

  // n contiguous elements to float32.
  void (*to_float)(const void* source, Dtype dtype, int64_t n, float* target);

  // n float64 numbers to contiguous elements, rounded to nearest, ties to even.
  void (*from_double)(const double* source, int64_t n, Dtype dtype, void* target);

  // The tables of `words` words: NIBBLES * TABLE floats for every WORD floats of u. Tables are aligned to 64 bytes.
  void (*build_tables)(const float* u, int64_t words, float* tables);

  // totals[r][n] += what `words` <= BLOCK_WORDS word rows give output n and row r, for `rows` <= MAX_ROWS.
  // Row r's tables start at tables + r * BLOCK_WORDS * NIBBLES * TABLE. Totals past `outputs`, up to the next
  // multiple of LANES, may be written; words past `outputs` are not read.
  void (*accumulate)(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, const float* tables,
                     int64_t rows, double* totals, int64_t totals_stride);

  // target[i * target_stride + 32 k + j], bit n: what bit j of weight[k * row_stride + 32 i + n] was; for all
  // k < words and all 32 i + n < outputs. Bits past `outputs` become 0. The layout of S becomes that of its transpose.
  void (*transpose)(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, int32_t* target,
                    int64_t target_stride) = scalar_transpose;

  // sums[i] += u[i] * v[i] for i < n, in float64.
  void (*add_products)(const float* u, const float* v, int64_t n, double* sums) = scalar_add_products;

  // Units that multiply 8-bit numbers, for many rows; null where there are none.
  const MatrixUnits* matrix = nullptr;
};

extern const Kernels scalar_kernels;
// y in float64 arithmetic throughout, for float64 x: one range of outputs of all rows. Right, not fast.
void onebit_linear_f64(const Linear& linear, int64_t begin, int64_t end);
double load(const Vector& vector, int64_t i);

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define HF_ONEBIT_X86 1
void avx2_transpose(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, int32_t* target,
                    int64_t target_stride);
void avx2_add_products(const float* u, const float* v, int64_t n, double* sums);
void avx512_transpose(const int32_t* weight, int64_t row_stride, int64_t words, int64_t outputs, int32_t* target,
                      int64_t target_stride);
void avx512_add_products(const float* u, const float* v, int64_t n, double* sums);
extern const MatrixUnits avx2_units;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512vnni_kernels;
extern const Kernels amx_kernels;
bool amx_is_usable();
#endif

// Every 64-bit Arm processor has it; the byte planes of its tables are those of a little end first.
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define HF_ONEBIT_NEON 1
extern const Kernels neon_kernels;
#endif

// The kernels in use.
const Kernels& kernels();

// Whether one digit of each input is enough: only where somebody asked for it.
bool int8_activations();

}  // namespace hf_onebit

// For Python, by ctypes. Selecting is for tests and benchmarks: it must not race with a running kernel.
#define HF_ONEBIT_EXPORT extern "C" __attribute__((visibility("default")))
HF_ONEBIT_EXPORT const char* hf_onebit_isa();                  // the one in use
HF_ONEBIT_EXPORT const char* hf_onebit_isas();                 // all this machine can run, best last, by commas
HF_ONEBIT_EXPORT int hf_onebit_select_isa(const char* name);   // 0, or 1 if this machine cannot run it
HF_ONEBIT_EXPORT const char* hf_onebit_sources();              // "hf_onebit sources " and their hash; cpu.py looks for it
HF_ONEBIT_EXPORT const char* hf_onebit_activations();               // "exact" or "int8"
HF_ONEBIT_EXPORT int hf_onebit_select_activations(const char* name);  // 0, or 1 if there is no such mode
HF_ONEBIT_EXPORT int64_t hf_onebit_tile_rows();                       // what was selected; 0 for the usual choice
HF_ONEBIT_EXPORT void hf_onebit_select_tile_rows(int64_t rows);       // fewest rows of codes that go by tiles
