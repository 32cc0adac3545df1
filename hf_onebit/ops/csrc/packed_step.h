// One optimizer step on packed codes; the rule, operation by operation, is that of hf_onebit/nn/packed_update.py and
// what it calls. Every result is the float32 one of those operations in their order, so codes and moments are equal to
// the bit whichever of both computes them, with any instruction set and number of threads.
//
// A matrix (in_features, columns) of codes lies in words as mpq_linear.h says, in one or several row blocks of a width
// each. Its rows may have an order of their own: packed row r is row perm[r] of the gradient and of the moments.
//
// A strip of STRIP columns is a unit of work. In a strip the rows go through three loops, BLOCK of them at a time: the
// moments move on and give the direction; they are rounded, once the largest of a block is known; the codes move.
#pragma once

#include <cstdint>
#include <vector>

#include "mpq_linear.h"

namespace hf_onebit {

constexpr int64_t STRIP = 64;   // columns: a cache line of moments in eight bits
constexpr int64_t BLOCK = 128;  // rows that share a peak

constexpr int PHILOX_ROUNDS = 10;
constexpr uint32_t PHILOX_LEFT = 0xD2511F53u, PHILOX_RIGHT = 0xCD9E8D57u;
constexpr uint32_t PHILOX_KEY0 = 0x9E3779B9u, PHILOX_KEY1 = 0xBB67AE85u;

// β state + (1 - β) value.
struct Moment {
  enum Kind { none, f32, signed8, unsigned8, factors };
  Kind kind = none;
  void* values = nullptr;         // (rows, columns); of factors, one number a row
  int64_t stride = 0;             // from row to row
  float* peaks = nullptr;         // of eight bits, (blocks, columns); of factors, one number a column
  int64_t peaks_stride = 0;
  int lane = 0;                   // which random bits of a word round it
};

struct CodeBlock {
  int64_t bits, rows, held;             // held: word rows, all that `rows` need or without the padding of the last
  int64_t first_row = 0, first_word = 0;
};

struct PackedStep {
  enum Rounding { nearest, stochastic, inertia };

  int64_t in_features = 0, columns = 0;
  int32_t* words = nullptr;
  int64_t words_stride = 0;
  std::vector<CodeBlock> blocks;

  const void* gradient = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t gradient_stride = 0;
  bool is_direction = false;  // what a gradient would have led to is given in its place

  Moment first;   // exp_avg_l
  Moment second;  // exp_avg_s; with inertia its state n, rows in packed order

  Statistics scales;
  Statistics zeros;     // data is null where code 2^(bits - 1) means 0
  Vector input_scales;  // of signs: scale = 2 b a; then `scales` has one group, a
  int64_t groups = 0;
  std::vector<int32_t> group;  // of each packed row
  std::vector<int64_t> perm;   // empty where rows are in their own order

  Rounding rounding = stochastic;
  double lr = 0, eta = 0, weight_decay = 0, beta1 = 0, beta2 = 0, eps = 0, start = 0;  // start: ι
  uint64_t seed = 0;
  uint32_t stream = 0, count = 0;  // count: number of the step
  int64_t column = 0;              // number of the first one, in the random words' matrix

  // Whether every loop may go through a block of rows before the next: words end where blocks do.
  bool by_blocks() const {
    if (!perm.empty() || rounding == inertia) return false;
    for (const CodeBlock& block : blocks) {
      if (block.first_row % WORD_ROWS) return false;
    }
    return true;
  }

  // Whether anything is random.
  bool draws() const {
    const auto rounds = [](const Moment& m) { return m.kind == Moment::signed8 || m.kind == Moment::unsigned8; };
    return rounding != nearest || rounds(first) || rounds(second);
  }

  static constexpr int64_t WORD_ROWS = 32;
};

// Sums over a strip: codes that changed, codes at the ends of their levels, |d|, d², and the variance of rounding d; of
// signs the third counts votes against the sign.
struct Tally {
  double sums[5] = {};
};

// What the strips of one thread work in.
int64_t packed_step_floats(const PackedStep& step);

// Columns first .. first + n, n <= STRIP.
using StripKernel = void (*)(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally);
void scalar_packed_strip(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally);
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
void avx2_packed_strip(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally);
void avx512_packed_strip(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally);
#endif

Tally packed_step(const PackedStep& step, const Pool& pool);

}  // namespace hf_onebit
