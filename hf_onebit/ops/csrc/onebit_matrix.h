// The two conductors of onebit_linear. Both give float16, bfloat16 and float32; the tables are right for any
// numbers, and the matrix units leave rows to them whose numbers are not.
#pragma once

#include "kernels.h"

namespace hf_onebit {

// Whether the kernels in use have units that are faster for this many rows.
bool matrix_units_pay(const Linear& linear, const Kernels& isa, bool int8);
void onebit_linear_matrix(const Linear& linear, const Pool& pool, bool int8);
void onebit_linear_tables(const Linear& linear, const Pool& pool);

}  // namespace hf_onebit
