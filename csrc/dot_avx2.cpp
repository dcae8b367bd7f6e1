// The products for AVX2 with FMA: the 16 sums of an output are two vectors.
#include "dot_pointwise.h"
#include "sums_avx2.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;

// Four rows times one column: eight vectors of sums, which leaves room for the operands.
void panel_column(const u16* rows, std::ptrdiff_t stride, std::uint32_t width, const u16* x,
                  float* sums, bool begin) {
  __m256 low[4], high[4];
  for (unsigned r = 0; r < 4; ++r) {
    low[r] = begin ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + kSums * r);
    high[r] = begin ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + kSums * r + 8);
  }
  for (std::uint32_t column = 0; column < width; column += 32) {
    const Widened values(x + column);
#pragma GCC unroll 4
    for (unsigned r = 0; r < 4; ++r) {
      const Widened weights(rows + r * stride + column);
      low[r] = _mm256_fmadd_ps(weights.low_even, values.low_even, low[r]);
      low[r] = _mm256_fmadd_ps(weights.low_odd, values.low_odd, low[r]);
      high[r] = _mm256_fmadd_ps(weights.high_even, values.high_even, high[r]);
      high[r] = _mm256_fmadd_ps(weights.high_odd, values.high_odd, high[r]);
    }
  }
  for (unsigned r = 0; r < 4; ++r) {
    _mm256_storeu_ps(sums + kSums * r, low[r]);
    _mm256_storeu_ps(sums + kSums * r + 8, high[r]);
  }
}

void panel(const u16* rows, std::ptrdiff_t stride, std::uint32_t width, const Columns& x,
           const Sums& sums, const Ahead&) {
  for (std::uint32_t c = 0; c < x.count; ++c)
    panel_column(rows, stride, width, x.data + c * x.stride,
                 sums.data + static_cast<std::ptrdiff_t>(c) * sums.stride * std::ptrdiff_t{kSums},
                 sums.begin);
}

void reduce(const float* sums, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i, sums += kSums)
    out[i] = sum_of(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8));
}

}  // namespace

const DotKernels kAvx2Dot{
    .coded2 = nullptr,
    .coded3 = nullptr,
    .coded4 = nullptr,
    .panel = panel,
    .reduce = reduce,
    .round = round_values,
    .gate = gate_values,
    .weigh = weigh_values,
    .add = add_values,
    .rotate = rotate_values,
};

}  // namespace zipmoe
