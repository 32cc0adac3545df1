// The loops of packed_step.h over one strip. Included once for each instruction set, by a file that defines TARGET; the
// compiler makes vectors of the loops over columns, all of which have STRIP turns: past a ragged strip's last column they
// compute on zeros, which nobody reads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kernels.h"
#include "packed_step.h"
#include "workspace.h"

#define STRIP_LOOP TARGET __attribute__((always_inline)) inline

namespace hf_onebit {
namespace {

constexpr int64_t WORD_ROWS = PackedStep::WORD_ROWS;
constexpr int64_t AREA = BLOCK * STRIP;
constexpr uint32_t MIX = 0x9E3779B1u;
constexpr float SIGNED_PEAK = 127.0f;
constexpr int32_t OFFSET = 761, MANTISSA_DROPPED = 20;
constexpr float FARTHEST = 256.0f;  // as algorithms/update.py has it

// What a strip works in; all rows of STRIP numbers.
struct Areas {
  uint32_t* random;  // BLOCK rows
  float *first, *second;  // moments of BLOCK rows, before they are rounded
  float* direction;  // rows_held of them
  float *scales, *offsets;  // a row for each group
};

STRIP_LOOP float as_float(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

STRIP_LOOP int32_t as_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

STRIP_LOOP float with_sign_of(float magnitude, float sign) {
  return as_float((as_bits(magnitude) & 0x7fffffff) | (as_bits(sign) & static_cast<int32_t>(0x80000000u)));
}

STRIP_LOOP float magnitude_of(float value) { return as_float(as_bits(value) & 0x7fffffff); }

// Philox 4x32-10 (algorithms/counter_random.py) for a strip of columns: the four words of each, in rows of STRIP. A file
// that has better instructions for it defines OWN_PHILOX and the same function.
#ifndef OWN_PHILOX
STRIP_LOOP void philox(uint32_t quad, uint32_t column, uint32_t count, uint32_t stream, uint64_t seed,
                       uint32_t* words) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int64_t n = 0; n < STRIP; ++n) {
    uint32_t c0 = quad, c1 = column + static_cast<uint32_t>(n), c2 = count, c3 = stream, k0 = key0, k1 = key1;
#if defined(__clang__)
#pragma clang loop unroll(full)
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
      const uint64_t left = static_cast<uint64_t>(c0) * PHILOX_LEFT, right = static_cast<uint64_t>(c2) * PHILOX_RIGHT;
      c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(right);
      c3 = static_cast<uint32_t>(left);
      k0 += PHILOX_KEY0;
      k1 += PHILOX_KEY1;
    }
    words[n] = c0;
    words[STRIP + n] = c1;
    words[2 * STRIP + n] = c2;
    words[3 * STRIP + n] = c3;
  }
}
#endif

// The words of `rows` rows from a multiple of four on; up to three rows more are written.
STRIP_LOOP void draw(const PackedStep& step, int64_t begin, int64_t rows, int64_t column, uint32_t* words) {
  for (int64_t r = 0; r < rows; r += 4) {
    philox(static_cast<uint32_t>((begin + r) / 4), static_cast<uint32_t>(column), step.count, step.stream, step.seed,
           words + r * STRIP);
  }
}

STRIP_LOOP float fraction(uint32_t word) { return static_cast<float>(word) * 0x1p-32f; }

// The state of one row of moments; x is overwritten by β state + (1 - β) x. Of a block in eight bits `magnitudes`, bits
// of floats, become at least those of x.
STRIP_LOOP void advance(const Moment& moment, int64_t row, int64_t first, int64_t n, double beta,
                        const float* peaks, float* x, int32_t* magnitudes) {
  const float keep = static_cast<float>(beta), take = static_cast<float>(1 - beta);
  alignas(64) float state[STRIP];
  if (moment.kind == Moment::none) {
    for (int64_t i = 0; i < STRIP; ++i) x[i] = x[i] * take;
    return;
  }
  if (moment.kind == Moment::factors) {
    const float height = static_cast<const float*>(moment.values)[row];
    for (int64_t i = 0; i < STRIP; ++i) x[i] = height * peaks[i];
    return;
  }
  if (moment.kind == Moment::f32) {
    float* kept = static_cast<float*>(moment.values) + row * moment.stride + first;
    if (n == STRIP) {
      for (int64_t i = 0; i < STRIP; ++i) kept[i] = x[i] = kept[i] * keep + x[i] * take;
    } else {
      for (int64_t i = 0; i < n; ++i) kept[i] = x[i] = kept[i] * keep + x[i] * take;
    }
    return;
  }
  alignas(64) uint8_t copy[STRIP];
  const uint8_t* codes = static_cast<const uint8_t*>(moment.values) + row * moment.stride + first;
  if (n < STRIP) {
    for (int64_t i = 0; i < STRIP; ++i) copy[i] = 0;
    for (int64_t i = 0; i < n; ++i) copy[i] = codes[i];
    codes = copy;
  }
  if (moment.kind == Moment::signed8) {
    for (int64_t i = 0; i < STRIP; ++i) {
      const float c = static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(codes[i])));
      state[i] = c * magnitude_of(c) * static_cast<float>(1.0 / (127 * 127)) * peaks[i];
    }
  } else {
    for (int64_t i = 0; i < STRIP; ++i) {
      const int32_t c = codes[i];
      const float level = as_float((c + OFFSET) << MANTISSA_DROPPED);
      state[i] = (c == 0 ? 0.0f : level) * peaks[i];
    }
  }
  for (int64_t i = 0; i < STRIP; ++i) {
    x[i] = state[i] * keep + x[i] * take;
    const int32_t bits = as_bits(x[i]) & 0x7fffffff;
    magnitudes[i] = bits > magnitudes[i] ? bits : magnitudes[i];  // as floats compare, with NaN above all
  }
}

// Peaks of a block for `advance`, STRIP of them.
STRIP_LOOP void load_peaks(const Moment& moment, int64_t block, int64_t first, int64_t n, float* peaks) {
  for (int64_t i = 0; i < STRIP; ++i) peaks[i] = 0.0f;
  if (!moment.peaks) return;
  for (int64_t i = 0; i < n; ++i) peaks[i] = moment.peaks[block * moment.peaks_stride + first + i];
}

STRIP_LOOP uint32_t lane_bits(uint32_t word, int lane, int count) {
  return lane == 0 ? word & ((1u << count) - 1u) : word * MIX >> (32 - count);
}

template <int LANE>
STRIP_LOOP void round_signed(const float* x, const uint32_t* random, const float* divisors, int8_t* codes) {
  for (int64_t i = 0; i < STRIP; ++i) {
    const float y = magnitude_of(x[i]) / divisors[i] * (SIGNED_PEAK * SIGNED_PEAK);
    const float whole = static_cast<float>(static_cast<int32_t>(__builtin_sqrtf(y)));
    const float low = whole < SIGNED_PEAK ? whole : SIGNED_PEAK;
    const float chance = (y - low * low) / (low * 2.0f + 1.0f);
    const float drawn = static_cast<float>(static_cast<int32_t>(lane_bits(random[i], LANE, 16))) * 0x1p-16f;
    const float next = low + (drawn < chance ? 1.0f : 0.0f);
    const int32_t size = static_cast<int32_t>(next < SIGNED_PEAK ? next : SIGNED_PEAK);
    codes[i] = static_cast<int8_t>(as_bits(x[i]) < 0 ? -size : size);
  }
}

template <int LANE>
STRIP_LOOP void round_unsigned(const float* x, const uint32_t* random, const float* divisors, int8_t* codes) {
  for (int64_t i = 0; i < STRIP; ++i) {
    const float share = magnitude_of(x[i]) / divisors[i];
    const int32_t moved = as_bits(share) + static_cast<int32_t>(lane_bits(random[i], LANE, MANTISSA_DROPPED));
    const int32_t code = (moved >> MANTISSA_DROPPED) - OFFSET;
    const int32_t least = code < 1 ? 1 : code, within = least > 255 ? 255 : least;
    codes[i] = static_cast<int8_t>(share == 0.0f ? 0 : within);
  }
}

// Store `rows` rows from `row`, the first of a block, in eight bits.
STRIP_LOOP void store_rounded(const Moment& moment, int64_t row, int64_t rows, int64_t first, int64_t n,
                              const float* x, const uint32_t* random, const int32_t* magnitudes) {
  if (moment.kind != Moment::signed8 && moment.kind != Moment::unsigned8) return;
  alignas(64) float divisors[STRIP];
  alignas(64) int8_t codes[STRIP];
  for (int64_t i = 0; i < STRIP; ++i) {
    const float peak = as_float(magnitudes[i]);
    divisors[i] = peak > 0.0f ? peak : 1.0f;
  }
  for (int64_t i = 0; i < n; ++i) moment.peaks[row / BLOCK * moment.peaks_stride + first + i] = as_float(magnitudes[i]);
  for (int64_t r = 0; r < rows; ++r, x += STRIP, random += STRIP) {
    int8_t* kept = static_cast<int8_t*>(moment.values) + (row + r) * moment.stride + first;
    int8_t* target = n == STRIP ? kept : codes;
    if (moment.kind == Moment::signed8) {
      moment.lane == 0 ? round_signed<0>(x, random, divisors, target) : round_signed<1>(x, random, divisors, target);
    } else {
      moment.lane == 0 ? round_unsigned<0>(x, random, divisors, target)
                       : round_unsigned<1>(x, random, divisors, target);
    }
    if (n < STRIP) {
      for (int64_t i = 0; i < n; ++i) kept[i] = codes[i];
    }
  }
}

STRIP_LOOP void load_gradient(const PackedStep& step, int64_t row, int64_t first, int64_t n, float* target) {
  const int64_t offset = row * step.gradient_stride + first;
  for (int64_t i = n; i < STRIP; ++i) target[i] = 0.0f;
  if (step.dtype == Dtype::f32) {
    std::memcpy(target, static_cast<const float*>(step.gradient) + offset, static_cast<size_t>(n) * sizeof(float));
  } else {
    kernels().to_float(static_cast<const char*>(step.gradient) + offset * size_of(step.dtype), step.dtype, n, target);
  }
}

// The direction of `rows` rows from `row`, a multiple of BLOCK; with inertia, the first moment. The moments move on, by
// the random words in areas.random.
STRIP_LOOP void find_direction(const PackedStep& step, int64_t row, int64_t rows, int64_t first, int64_t n,
                               const Areas& areas, float* direction) {
  if (step.is_direction) {
    for (int64_t r = 0; r < rows; ++r) load_gradient(step, row + r, first, n, direction + r * STRIP);
    return;
  }
  const bool flips = step.rounding == PackedStep::inertia;
  const float eps = static_cast<float>(step.eps);
  alignas(64) float first_peaks[STRIP], second_peaks[STRIP], g[STRIP];
  alignas(64) int32_t first_tops[STRIP] = {}, second_tops[STRIP] = {};
  load_peaks(step.first, row / BLOCK, first, n, first_peaks);
  if (!flips) load_peaks(step.second, step.second.kind == Moment::factors ? 0 : row / BLOCK, first, n, second_peaks);
  for (int64_t r = 0; r < rows; ++r) {
    float* m = areas.first + r * STRIP;
    float* v = areas.second + r * STRIP;
    float* u = direction + r * STRIP;
    load_gradient(step, row + r, first, n, g);
    for (int64_t i = 0; i < STRIP; ++i) m[i] = g[i];
    advance(step.first, row + r, first, n, step.beta1, first_peaks, m, first_tops);
    if (flips) {
      for (int64_t i = 0; i < STRIP; ++i) u[i] = m[i];
      continue;
    }
    for (int64_t i = 0; i < STRIP; ++i) v[i] = g[i] * g[i];
    advance(step.second, row + r, first, n, step.beta2, second_peaks, v, second_tops);
    for (int64_t i = 0; i < STRIP; ++i) u[i] = m[i] / (__builtin_sqrtf(v[i]) + eps);
  }
  store_rounded(step.first, row, rows, first, n, areas.first, areas.random, first_tops);
  if (!flips) store_rounded(step.second, row, rows, first, n, areas.second, areas.random, second_tops);
}

// At most 32 rows of codes that fill words of their own: unpacked row by row, packed again.
struct Words {
  int32_t* source;
  int64_t stride, held, bits;  // held: word rows that there are
  alignas(64) uint32_t old_words[8 * STRIP];
  alignas(64) uint32_t new_words[8 * STRIP];
};

STRIP_LOOP void open_words(const PackedStep& step, const CodeBlock& block, int64_t unit, int64_t first, int64_t n,
                           Words& words) {
  words.source = step.words + (block.first_word + unit * block.bits) * step.words_stride + first;
  words.stride = step.words_stride;
  words.bits = block.bits;
  words.held = std::min(block.bits, block.held - unit * block.bits);
  for (int64_t i = 0; i < 8 * STRIP; ++i) words.old_words[i] = words.new_words[i] = 0;
  for (int64_t w = 0; w < words.held; ++w) {
    std::memcpy(words.old_words + w * STRIP, words.source + w * words.stride, static_cast<size_t>(n) * 4);
  }
}

STRIP_LOOP void close_words(const Words& words, int64_t n) {
  for (int64_t w = 0; w < words.held; ++w) {
    std::memcpy(words.source + w * words.stride, words.new_words + w * STRIP, static_cast<size_t>(n) * 4);
  }
}

STRIP_LOOP void unpack_row(const Words& words, int64_t j, int32_t* codes) {
  const int64_t bit = j * words.bits, word = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  const uint32_t mask = (1u << words.bits) - 1u;
  const uint32_t* low = words.old_words + word * STRIP;
  if (shift + words.bits > 32) {
    for (int64_t i = 0; i < STRIP; ++i) {
      codes[i] = static_cast<int32_t>((low[i] >> shift | low[STRIP + i] << (32 - shift)) & mask);
    }
  } else {
    for (int64_t i = 0; i < STRIP; ++i) codes[i] = static_cast<int32_t>(low[i] >> shift & mask);
  }
}

STRIP_LOOP void pack_row(Words& words, int64_t j, const int32_t* codes) {
  const int64_t bit = j * words.bits, word = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  uint32_t* low = words.new_words + word * STRIP;
  for (int64_t i = 0; i < STRIP; ++i) low[i] |= static_cast<uint32_t>(codes[i]) << shift;
  if (shift + words.bits > 32) {
    for (int64_t i = 0; i < STRIP; ++i) low[STRIP + i] |= static_cast<uint32_t>(codes[i]) >> (32 - shift);
  }
}

// Scales, and where `offset` is not null offsets, of one packed row: a row of the areas, or `room`.
STRIP_LOOP void affine_row(const PackedStep& step, const Areas& areas, int64_t row, int64_t bits, float* room,
                           const float** scale, const float** offset) {
  const float* by_group = areas.scales + step.group[static_cast<size_t>(row)] * STRIP;
  if (step.input_scales.data) {
    const float b = static_cast<float>(load(step.input_scales, row));
    for (int64_t i = 0; i < STRIP; ++i) {
      room[i] = b * by_group[i];
      room[STRIP + i] = 2.0f * room[i];
    }
    *offset = room;
    *scale = room + STRIP;
    return;
  }
  *scale = by_group;
  if (step.zeros.data) {
    *offset = areas.offsets + step.group[static_cast<size_t>(row)] * STRIP;
    return;
  }
  if (step.weight_decay == 0) return;
  const float middle = bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1));
  for (int64_t i = 0; i < STRIP; ++i) room[i] = by_group[i] * middle;
  *offset = room;
}

struct LaneSums {
  alignas(64) float changed[STRIP], saturated[STRIP], moved[STRIP], squared[STRIP], noise[STRIP];
};

STRIP_LOOP void clear(LaneSums& sums) {
  for (int64_t i = 0; i < STRIP; ++i) {
    sums.changed[i] = sums.saturated[i] = sums.moved[i] = sums.squared[i] = sums.noise[i] = 0.0f;
  }
}

STRIP_LOOP void add_up(const LaneSums& sums, int64_t n, Tally& tally) {
  for (int64_t i = 0; i < n; ++i) {
    tally.sums[0] += sums.changed[i];
    tally.sums[1] += sums.saturated[i];
    tally.sums[2] += sums.moved[i];
    tally.sums[3] += sums.squared[i];
    tally.sums[4] += sums.noise[i];
  }
}

// One row of codes after its step.
STRIP_LOOP void move_row(const PackedStep& step, int64_t bits, const float* u, const float* scale, const float* offset,
                         const uint32_t* random, int32_t* codes, LaneSums& sums) {
  const float eta = static_cast<float>(step.eta), decay = static_cast<float>(step.lr * step.weight_decay);
  const float levels = static_cast<float>((1 << bits) - 1);
  alignas(64) float d[STRIP], moved[STRIP];
  if (step.weight_decay != 0) {
    for (int64_t i = 0; i < STRIP; ++i) {
      d[i] = u[i] * eta + (static_cast<float>(codes[i]) * scale[i] - offset[i]) * decay;
    }
  } else {
    for (int64_t i = 0; i < STRIP; ++i) d[i] = u[i] * eta;
  }
  for (int64_t i = 0; i < STRIP; ++i) {
    const float quotient = -d[i] / scale[i];
    d[i] = scale[i] == 0.0f ? 0.0f : quotient;
  }
  // Loops of their own: with the choice above in front of them the compiler makes branches of it.
  for (int64_t i = 0; i < STRIP; ++i) {
    const float size = magnitude_of(d[i]), rest = size - __builtin_floorf(size);
    sums.moved[i] += size;
    sums.squared[i] += size * size;
    sums.noise[i] += rest * (1.0f - rest);
  }
  for (int64_t i = 0; i < STRIP; ++i) {
    const float known = d[i] == d[i] ? d[i] : 0.0f;
    const float above = known > -FARTHEST ? known : -FARTHEST;
    d[i] = above < FARTHEST ? above : FARTHEST;
  }
  if (step.rounding == PackedStep::nearest) {
    // Adding 1.5 · 2^23 leaves no digits behind the point; halves go to even.
    for (int64_t i = 0; i < STRIP; ++i) moved[i] = (d[i] + 12582912.0f) - 12582912.0f;
  } else {
    for (int64_t i = 0; i < STRIP; ++i) {
      const float size = magnitude_of(d[i]);
      const float whole = static_cast<float>(static_cast<int32_t>(size));
      moved[i] = with_sign_of(whole + (fraction(random[i]) < size - whole ? 1.0f : 0.0f), d[i]);
    }
  }
  for (int64_t i = 0; i < STRIP; ++i) {
    const float q = static_cast<float>(codes[i]), sum = moved[i] + q;
    const float least = sum > 0.0f ? sum : 0.0f, next = least < levels ? least : levels;
    sums.changed[i] += next != q ? 1.0f : 0.0f;
    sums.saturated[i] += (next == 0.0f) | (next == levels) ? 1.0f : 0.0f;
    codes[i] = static_cast<int32_t>(next);
  }
}

// The codes of packed rows begin .. end move; rows of `direction` count from `base`, random words from `begin`.
STRIP_LOOP void move_codes(const PackedStep& step, int64_t begin, int64_t end, int64_t first, int64_t n,
                           const Areas& areas, int64_t base, Tally& tally) {
  alignas(64) float room[2 * STRIP];
  alignas(64) int32_t codes[STRIP];
  Words words;
  LaneSums sums;
  for (const CodeBlock& block : step.blocks) {
    const int64_t block_end = block.first_row + block.rows;
    for (int64_t row = std::max(begin, block.first_row); row < std::min(end, block_end);) {
      const int64_t unit = (row - block.first_row) / WORD_ROWS;
      const int64_t stop = std::min(block.first_row + (unit + 1) * WORD_ROWS, block_end);
      const int64_t origin = block.first_row + unit * WORD_ROWS;
      open_words(step, block, unit, first, n, words);
      clear(sums);
      for (; row < stop; ++row) {
        const int64_t source = step.perm.empty() ? row : step.perm[static_cast<size_t>(row)];
        const float *scale = nullptr, *offset = nullptr;
        affine_row(step, areas, row, block.bits, room, &scale, &offset);
        unpack_row(words, row - origin, codes);
        move_row(step, block.bits, areas.direction + (source - base) * STRIP, scale, offset,
                 areas.random + (row - begin) * STRIP, codes, sums);
        pack_row(words, row - origin, codes);
      }
      close_words(words, n);
      add_up(sums, n, tally);
    }
  }
}

// Signs of packed rows begin .. end, at most BLOCK, a multiple of it from 0, flip; `root` is ε times the root mean square.
STRIP_LOOP void flip_block(const PackedStep& step, int64_t begin, int64_t end, int64_t first, int64_t n,
                           const Areas& areas, const float* root, Tally& tally) {
  const double keep = step.beta2 * (1 - step.lr * step.weight_decay);
  const float lr = static_cast<float>(step.lr), start = static_cast<float>(step.start);
  const float share = static_cast<float>((1 - step.beta2) / (1 - keep));
  alignas(64) float room[2 * STRIP], peaks[STRIP];
  alignas(64) int32_t codes[STRIP], tops[STRIP] = {};
  const CodeBlock& block = step.blocks.front();
  Words words;
  LaneSums sums;
  load_peaks(step.second, begin / BLOCK, first, n, peaks);
  for (int64_t origin = begin; origin < end; origin += WORD_ROWS) {
    open_words(step, block, origin / WORD_ROWS, first, n, words);
    clear(sums);
    for (int64_t row = origin; row < std::min(origin + WORD_ROWS, end); ++row) {
      const float* m = areas.direction + row * STRIP;
      float* state = areas.second + (row - begin) * STRIP;
      const uint32_t* random = areas.random + (row - begin) * STRIP;
      unpack_row(words, row - origin, codes);
      for (int64_t i = 0; i < STRIP; ++i) {
        const float ratio = m[i] / (magnitude_of(m[i]) + root[i]);
        state[i] = (ratio == ratio ? ratio : 0.0f) * lr;
        sums.moved[i] += m[i] * static_cast<float>(1 - 2 * codes[i]) < 0.0f ? 1.0f : 0.0f;
      }
      if (step.second.kind == Moment::none) {
        const float old_part = static_cast<float>(keep), new_part = static_cast<float>(1 - step.beta2);
        for (int64_t i = 0; i < STRIP; ++i) {
          const float n0 = fraction(random[i]) * start * static_cast<float>(1 - 2 * codes[i]);
          state[i] = n0 * old_part + state[i] * new_part;
        }
      } else {
        if (keep < 1) {
          for (int64_t i = 0; i < STRIP; ++i) state[i] = state[i] * share;
        }
        advance(step.second, row, first, n, keep, peaks, state, tops);
      }
      for (int64_t i = 0; i < STRIP; ++i) {
        const int32_t flipped = state[i] > 0.0f ? 0 : state[i] < 0.0f ? 1 : codes[i];
        sums.changed[i] += flipped != codes[i] ? 1.0f : 0.0f;
        sums.saturated[i] += 1.0f;
        codes[i] = flipped;
      }
      pack_row(words, row - origin, codes);
    }
    close_words(words, n);
    add_up(sums, n, tally);
  }
  (void)room;
  store_rounded(step.second, begin, end - begin, first, n, areas.second, areas.random, tops);
}

// `direction` becomes the first moment for the sign, in packed order; then all signs flip.
STRIP_LOOP void flip_signs(const PackedStep& step, int64_t first, int64_t n, const Areas& areas, float* packed,
                           Tally& tally) {
  alignas(64) float room[2 * STRIP], root[STRIP];
  const int64_t rows = step.in_features;
  for (int64_t row = 0; row < rows; ++row) {
    const float* m = areas.direction + (step.perm.empty() ? row : step.perm[static_cast<size_t>(row)]) * STRIP;
    const float *scale = nullptr, *offset = nullptr;
    affine_row(step, areas, row, 1, room, &scale, &offset);
    float* target = packed + row * STRIP;
    for (int64_t i = 0; i < STRIP; ++i) {
      const float sign = scale[i] > 0.0f ? 1.0f : scale[i] < 0.0f ? -1.0f : 0.0f;
      target[i] = m[i] * sign;
    }
  }
  // The sum of algorithms.update.mean_square: blocks one after the other, then halves.
  float* sums = areas.first;
  std::memset(sums, 0, AREA * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) {
    const float* m = packed + row * STRIP;
    float* sum = sums + row % BLOCK * STRIP;
    for (int64_t i = 0; i < STRIP; ++i) sum[i] = sum[i] + m[i] * m[i];
  }
  for (int64_t half = BLOCK / 2; half >= 1; half /= 2) {
    for (int64_t i = 0; i < half * STRIP; ++i) sums[i] = sums[i] + sums[half * STRIP + i];
  }
  const float count = static_cast<float>(rows), eps = static_cast<float>(step.eps);
  for (int64_t i = 0; i < STRIP; ++i) root[i] = __builtin_sqrtf(sums[i] / count) * eps;
  Areas own = areas;
  own.direction = packed;
  for (int64_t begin = 0; begin < rows; begin += BLOCK) {
    const int64_t end = std::min(begin + BLOCK, rows);
    draw(step, begin, end - begin, step.column + first, areas.random);
    flip_block(step, begin, end, first, n, own, root, tally);
  }
}

STRIP_LOOP void load_statistics(const Statistics& statistics, int64_t groups, int64_t first, int64_t n, float* target) {
  for (int64_t g = 0; g < groups; ++g, target += STRIP) {
    for (int64_t i = 0; i < STRIP; ++i) target[i] = 0.0f;
    to_float(kernels(), statistics.row(g, first), 0, n, target);
  }
}

TARGET void strip(const PackedStep& step, int64_t first, int64_t n, float* memory, Tally& tally) {
  const int64_t rows = step.in_features;
  Areas areas;
  areas.random = reinterpret_cast<uint32_t*>(memory);
  areas.first = memory + AREA;
  areas.second = areas.first + AREA;
  areas.scales = areas.second + AREA;
  areas.offsets = areas.scales + step.groups * STRIP;
  areas.direction = areas.offsets + step.groups * STRIP;
  load_statistics(step.scales, step.groups, first, n, areas.scales);
  if (step.zeros.data) load_statistics(step.zeros, step.groups, first, n, areas.offsets);
  const bool by_blocks = step.by_blocks();
  for (int64_t row = 0; row < rows; row += BLOCK) {
    const int64_t end = std::min(row + BLOCK, rows);
    if (step.draws() && (by_blocks || !step.is_direction)) draw(step, row, end - row, step.column + first, areas.random);
    find_direction(step, row, end - row, first, n, areas, areas.direction + (by_blocks ? 0 : row * STRIP));
    if (by_blocks) move_codes(step, row, end, first, n, areas, row, tally);
  }
  if (by_blocks) return;
  if (step.rounding == PackedStep::inertia) {
    flip_signs(step, first, n, areas, step.perm.empty() ? areas.direction : areas.direction + rows * STRIP, tally);
    return;
  }
  // Words may lie across blocks of rows here, or take their direction from anywhere: one after the other.
  for (const CodeBlock& block : step.blocks) {
    for (int64_t origin = block.first_row; origin < block.first_row + block.rows; origin += WORD_ROWS) {
      const int64_t end = std::min(origin + WORD_ROWS, block.first_row + block.rows);
      const int64_t lead = origin % 4;  // random words come by fours
      if (step.draws()) draw(step, origin - lead, end - origin + lead, step.column + first, areas.random);
      Areas own = areas;
      own.random = areas.random + lead * STRIP;
      move_codes(step, origin, end, first, n, own, 0, tally);
    }
  }
}

}  // namespace
}  // namespace hf_onebit

#undef STRIP_LOOP
