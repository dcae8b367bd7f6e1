// RMS norms of BF16 rows, each row alone, in one order and with the same bits on every instruction
// set: word k's square (exact in FP32) goes to sum k mod 16, in ascending order; the 16 sums are
// added in halves; then x / sqrt(sum / width + eps), one correctly rounded operation after the
// other.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "norm_kernels.h"
#include "pool.h"

namespace zipmoe {

// Normalises rows that lie one after the other, in the threads of a pool. `out` may be `x`.
void rms_norm(const std::uint16_t* x, std::uint64_t rows, const NormRule& rule, std::uint16_t* out,
              Isa isa, WorkerPool& pool);

}  // namespace zipmoe
