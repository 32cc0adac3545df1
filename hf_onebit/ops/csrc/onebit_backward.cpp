// The product with S^T is the product with S: only the bits are transposed first, 32 by 32 of them, into a workspace of
// as many bytes as the packed weight. From there the forward's kernels do the work, whichever they are.
//
// Rounding. grad x without gradients of b is one call of the forward, and is held to its bound, 14 roundings: see
// kernels.h. Otherwise d and z are such results with a scale of 1, rounded to float32; their products with b, x and g
// are summed in float64, in which products of two float32 numbers are exact, and are rounded once more. That is 15
// roundings of 2^-24: 8.9e-7 * sum |a b g| for grad x, and with |x| in that sum for grad a and grad b. As in the
// forward, scales in float64 are rounded to float32 first, and what float16 and bfloat16 lose on AMX is AMX's.
#include "onebit_backward.h"

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "workspace.h"

namespace hf_onebit {
namespace {

constexpr int64_t ROWS = 256;           // rows of d or z kept at once
constexpr int64_t COLUMNS = 512;        // columns that one thread sums
constexpr int64_t STRIP = 8;            // rows of transposed words that one thread makes
constexpr int64_t SERIAL = 1 << 15;     // fewer words or sums than this are done before a second thread has woken

int64_t words_of(int64_t n) { return (n + WORD - 1) / WORD; }

const float ONE = 1.0f;
const Vector ONES = {&ONE, Dtype::f32, 0};

const void* row_of(const void* data, int64_t element, Dtype dtype) {
  return static_cast<const char*>(data) + element * size_of(dtype);
}

void* row_of(void* data, int64_t element, Dtype dtype) { return static_cast<char*>(data) + element * size_of(dtype); }

// Of a plane that has to be transposed.
struct Strips {
  const Kernels& isa;
  const Plane& plane;
  int64_t in_features, out_features;
  int32_t* target;  // words_of(out_features) rows of words_of(in_features) * WORD
};

void transpose_strips(int64_t begin, int64_t end, void* context) {
  const Strips& strips = *static_cast<const Strips*>(context);
  const int64_t words = words_of(strips.in_features), first = begin * STRIP * WORD;
  const int64_t last = std::min(end * STRIP * WORD, strips.out_features);
  strips.isa.transpose(strips.plane.weight + first, strips.plane.row_stride, words, last - first,
                       strips.target + begin * STRIP * words * WORD, words * WORD);
}

// sums[i] += the sum over rows of left * right, for one range of columns; left's rows are T, right's of any dtype.
template <typename T>
void add_rows(const Kernels& isa, const T* left, const void* right, int64_t stride, Dtype dtype, int64_t rows,
              int64_t columns, int64_t begin, int64_t end, double* sums) {
  alignas(64) float buffer[COLUMNS];
  for (int64_t r = 0; r < rows; ++r) {
    const void* source = row_of(right, r * stride + begin, dtype);
    const T* row = left + r * columns + begin;
    if constexpr (std::is_same_v<T, double>) {
      const double* factor = static_cast<const double*>(source);
      for (int64_t i = 0; i < end - begin; ++i) sums[begin + i] += row[i] * factor[i];
    } else {
      isa.to_float(source, dtype, end - begin, buffer);
      isa.add_products(row, buffer, end - begin, sums + begin);
    }
  }
}

// Some rows of a call, T the dtype of the sums: float, or double for float64.
template <typename T>
struct Chunk {
  const Backward& backward;
  const Kernels& isa;
  int64_t first_row, rows;
  T* products[2];  // rows x in_features of d for each plane, or of z, rows x out_features, in the first
  int plane;       // whose z
  double* sums_a[2];
  double* sums_b[2];
};

template <typename T>
void sum_z(int64_t begin, int64_t end, void* context) {
  const Chunk<T>& chunk = *static_cast<const Chunk<T>*>(context);
  const Backward& backward = chunk.backward;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * COLUMNS, last = std::min(first + COLUMNS, backward.out_features);
    const void* grad = row_of(backward.grad, chunk.first_row * backward.grad_stride, backward.dtype);
    add_rows(chunk.isa, chunk.products[0], grad, backward.grad_stride, backward.dtype, chunk.rows,
             backward.out_features, first, last, chunk.sums_a[chunk.plane]);
  }
}

template <typename T>
void add_scaled(const Kernels& isa, const T* d, const T* b, int64_t n, double* sums) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < n; ++i) sums[i] += d[i] * b[i];
  } else {
    isa.add_products(d, b, n, sums);
  }
}

// grad x for one range of columns.
template <typename T>
void write_x(const Chunk<T>& chunk, int64_t begin, int64_t end) {
  const Backward& backward = chunk.backward;
  const int64_t n = end - begin;
  alignas(64) T b[2][COLUMNS];
  alignas(64) double sums[COLUMNS];
  for (int p = 0; p < backward.planes; ++p) {
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t i = 0; i < n; ++i) b[p][i] = load(backward.plane[p].b, begin + i);
    } else {
      to_float(chunk.isa, backward.plane[p].b, begin, n, b[p]);
    }
  }
  for (int64_t r = 0; r < chunk.rows; ++r) {
    std::fill_n(sums, n, 0.0);
    for (int p = 0; p < backward.planes; ++p) {
      add_scaled(chunk.isa, chunk.products[p] + r * backward.in_features + begin, b[p], n, sums);
    }
    const int64_t offset = (chunk.first_row + r) * backward.in_features + begin;
    chunk.isa.from_double(sums, n, backward.dtype, row_of(backward.grad_x, offset, backward.dtype));
  }
}

template <typename T>
void sum_d(int64_t begin, int64_t end, void* context) {
  const Chunk<T>& chunk = *static_cast<const Chunk<T>*>(context);
  const Backward& backward = chunk.backward;
  const void* x = row_of(backward.x, chunk.first_row * backward.x_stride, backward.dtype);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * COLUMNS, last = std::min(first + COLUMNS, backward.in_features);
    for (int p = 0; p < backward.planes; ++p) {
      if (!backward.grad_b[p]) continue;
      add_rows(chunk.isa, chunk.products[p], x, backward.x_stride, backward.dtype, chunk.rows, backward.in_features,
               first, last, chunk.sums_b[p]);
    }
    if (backward.grad_x) write_x(chunk, first, last);
  }
}

// The transposed planes and all sums: separate from the forward's workspace, which is in use meanwhile.
Workspace& own_workspace() {
  static thread_local Workspace of_this_thread;
  return of_this_thread;
}

class Conductor {
 public:
  Conductor(const Backward& backward, const Pool& pool)
      : backward_(backward), isa_(kernels()), pool_(pool) {
    for (int p = 0; p < backward.planes; ++p) {
      needs_d_[p] = backward.grad_x || backward.grad_b[p];
      sums_d_ = sums_d_ || backward.grad_b[p];
      sums_z_ = sums_z_ || backward.grad_a[p];
    }
  }

  void run() {
    reserve();
    for (int p = 0; p < backward_.planes; ++p) {
      if (needs_d_[p]) transpose(p);
    }
    if (backward_.grad_x && !sums_d_) whole_x();
    if (sums_d_ || sums_z_) backward_.dtype == Dtype::f64 ? in_chunks<double>() : in_chunks<float>();
  }

 private:
  void reserve() {
    const int64_t in = round_up(backward_.in_features, LANES), out = round_up(backward_.out_features, LANES);
    const int64_t rows = std::min(backward_.rows, ROWS), width = backward_.dtype == Dtype::f64 ? 2 : 1;
    const int64_t words = words_of(backward_.in_features) * words_of(backward_.out_features) * WORD;
    const int64_t d = sums_d_ ? rows * in * width : 0, z = sums_z_ ? rows * out * width : 0;
    int64_t floats = 0;
    const auto take = [&floats](int64_t count) { return std::exchange(floats, floats + round_up(count, LANES)); };
    int64_t transposed[2] = {}, products[2] = {}, sums_a[2] = {}, sums_b[2] = {};
    for (int p = 0; p < backward_.planes; ++p) {
      if (needs_d_[p]) transposed[p] = take(words);
      products[p] = take(std::max(needs_d_[p] ? d : 0, p == 0 ? z : 0));
      if (backward_.grad_a[p]) sums_a[p] = take(2 * out);
      if (backward_.grad_b[p]) sums_b[p] = take(2 * in);
    }
    float* memory = own_workspace().of_size(static_cast<size_t>(floats));
    for (int p = 0; p < backward_.planes; ++p) {
      transposed_[p] = reinterpret_cast<int32_t*>(memory + transposed[p]);
      products_[p] = memory + products[p];
      sums_a_[p] = reinterpret_cast<double*>(memory + sums_a[p]);
      sums_b_[p] = reinterpret_cast<double*>(memory + sums_b[p]);
      if (backward_.grad_a[p]) std::fill_n(sums_a_[p], backward_.out_features, 0.0);
      if (backward_.grad_b[p]) std::fill_n(sums_b_[p], backward_.in_features, 0.0);
    }
  }

  void transpose(int p) {
    const int64_t rows = words_of(backward_.out_features);
    Strips strips{isa_, backward_.plane[p], backward_.in_features, backward_.out_features, transposed_[p]};
    hf_onebit::run(pool_, rows * backward_.in_features < SERIAL, (rows + STRIP - 1) / STRIP, transpose_strips, &strips);
  }

  // A layer with inputs and outputs exchanged.
  Linear transposed_layer(int64_t first_row, int64_t rows) const {
    Linear linear;
    linear.rows = rows;
    linear.in_features = backward_.out_features;
    linear.out_features = backward_.in_features;
    linear.x = row_of(backward_.grad, first_row * backward_.grad_stride, backward_.dtype);
    linear.x_stride = backward_.grad_stride;
    linear.dtype = backward_.dtype;
    linear.exact = true;
    return linear;
  }

  Plane transposed_plane(int p, const Vector& output_scale) const {
    return {transposed_[p], words_of(backward_.in_features) * WORD, output_scale, backward_.plane[p].a};
  }

  void whole_x() const {
    Linear linear = transposed_layer(0, backward_.rows);
    linear.planes = backward_.planes;
    for (int p = 0; p < backward_.planes; ++p) linear.plane[p] = transposed_plane(p, backward_.plane[p].b);
    linear.y = backward_.grad_x;
    onebit_linear(linear, pool_);
  }

  template <typename T>
  void in_chunks() const {
    Chunk<T> chunk{backward_, isa_, 0, 0, {}, 0, {sums_a_[0], sums_a_[1]}, {sums_b_[0], sums_b_[1]}};
    for (int p = 0; p < 2; ++p) chunk.products[p] = static_cast<T*>(products_[p]);
    for (int64_t row = 0; row < backward_.rows; row += ROWS) {
      chunk.first_row = row;
      chunk.rows = std::min(ROWS, backward_.rows - row);
      for (int p = 0; p < backward_.planes; ++p) {
        if (backward_.grad_a[p]) add_z(chunk, p);
      }
      if (sums_d_) add_d(chunk);
    }
    for (int p = 0; p < backward_.planes; ++p) {
      const Plane& plane = backward_.plane[p];
      if (backward_.grad_a[p]) isa_.from_double(sums_a_[p], backward_.out_features, plane.a.dtype, backward_.grad_a[p]);
      if (backward_.grad_b[p]) isa_.from_double(sums_b_[p], backward_.in_features, plane.b.dtype, backward_.grad_b[p]);
    }
  }

  template <typename T>
  void add_z(Chunk<T>& chunk, int p) const {
    Linear linear;
    linear.rows = chunk.rows;
    linear.in_features = backward_.in_features;
    linear.out_features = backward_.out_features;
    linear.x = row_of(backward_.x, chunk.first_row * backward_.x_stride, backward_.dtype);
    linear.x_stride = backward_.x_stride;
    linear.dtype = backward_.dtype;
    linear.exact = true;
    linear.plane[0] = backward_.plane[p];
    linear.plane[0].a = ONES;
    linear.y = chunk.products[0];
    linear.y_float32 = true;
    onebit_linear(linear, pool_);
    chunk.plane = p;
    sum(chunk, backward_.out_features, sum_z<T>);
  }

  template <typename T>
  void add_d(Chunk<T>& chunk) const {
    for (int p = 0; p < backward_.planes; ++p) {
      if (!needs_d_[p]) continue;
      Linear linear = transposed_layer(chunk.first_row, chunk.rows);
      linear.plane[0] = transposed_plane(p, ONES);
      linear.y = chunk.products[p];
      linear.y_float32 = true;
      onebit_linear(linear, pool_);
    }
    sum(chunk, backward_.in_features, sum_d<T>);
  }

  template <typename T>
  void sum(Chunk<T>& chunk, int64_t columns, Body body) const {
    hf_onebit::run(pool_, chunk.rows * columns < SERIAL, (columns + COLUMNS - 1) / COLUMNS, body, &chunk);
  }

  const Backward& backward_;
  const Kernels& isa_;
  const Pool& pool_;
  bool needs_d_[2] = {}, sums_d_ = false, sums_z_ = false;
  int32_t* transposed_[2] = {};
  void* products_[2] = {};
  double* sums_a_[2] = {};
  double* sums_b_[2] = {};
};

}  // namespace

void onebit_linear_backward(const Backward& backward, const Pool& pool) { Conductor(backward, pool).run(); }

}  // namespace hf_onebit
