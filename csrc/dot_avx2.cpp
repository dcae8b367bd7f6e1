// The products for AVX2 with FMA: the 16 sums of an output are two vectors.
#include <immintrin.h>

#include "dot_pointwise.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;

// 32 BF16 words, widened: sums 0 to 7 take the low ones, sums 8 to 15 the high ones.
struct Widened {
  __m256 low_even, low_odd, high_even, high_odd;
  [[gnu::always_inline]] explicit Widened(const u16* from) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16));
    const __m256i mask = _mm256_set1_epi32(-65536);
    low_even = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
    low_odd = _mm256_castsi256_ps(_mm256_and_si256(low, mask));
    high_even = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    high_odd = _mm256_castsi256_ps(_mm256_and_si256(high, mask));
  }
};

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
  for (std::size_t i = 0; i < n; ++i, sums += kSums) {
    const __m256 eight = _mm256_add_ps(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    out[i] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
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
};

}  // namespace zipmoe
