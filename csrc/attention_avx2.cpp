// Attention for AVX2 with FMA: the 16 sums of a score are two vectors.
#include "attention_pointwise.h"
#include "sums_avx2.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;

// A row's words from `at` on: where the row ends within them, a copy with 0 after its end.
class Tail {
 public:
  const u16* words(const u16* at, std::uint32_t left) {
    if (left >= kWordGroup) return at;
    __builtin_memset(words_, 0, sizeof words_);
    __builtin_memcpy(words_, at, left * sizeof(u16));
    return words_;
  }

 private:
  alignas(32) u16 words_[kWordGroup];
};

void scores(const u16* query, const HeadRows& keys, float* out) {
  Tail tail;
  for (std::uint32_t j = 0; j < keys.n; ++j) {
    const u16* key = keys.data + j * keys.stride;
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
    for (std::uint32_t k = 0; k < keys.width; k += kWordGroup) {
      const Widened left(query + k), right(tail.words(key + k, keys.width - k));
      low = _mm256_fmadd_ps(left.low_even, right.low_even, low);
      low = _mm256_fmadd_ps(left.low_odd, right.low_odd, low);
      high = _mm256_fmadd_ps(left.high_even, right.high_even, high);
      high = _mm256_fmadd_ps(left.high_odd, right.high_odd, high);
    }
    out[j] = sum_of(low, high);
  }
}

// One group of words of kRows rows.
template <unsigned kRows>
void add_group(const float* const* weights, const HeadRows& values, std::uint32_t k, float* totals,
               std::ptrdiff_t stride) {
  Tail tail;
  __m256 sums[kRows][4];
  for (unsigned r = 0; r < kRows; ++r)
    for (unsigned i = 0; i < 4; ++i) sums[r][i] = _mm256_loadu_ps(totals + r * stride + 8 * i);
  for (std::uint32_t j = 0; j < values.n; ++j) {
    const Widened words(tail.words(values.data + j * values.stride + k, values.width - k));
#pragma GCC unroll 2
    for (unsigned r = 0; r < kRows; ++r) {
      const __m256 weight = _mm256_set1_ps(weights[r][j]);
      sums[r][0] = _mm256_fmadd_ps(weight, words.low_even, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(weight, words.high_even, sums[r][1]);
      sums[r][2] = _mm256_fmadd_ps(weight, words.low_odd, sums[r][2]);
      sums[r][3] = _mm256_fmadd_ps(weight, words.high_odd, sums[r][3]);
    }
  }
  for (unsigned r = 0; r < kRows; ++r)
    for (unsigned i = 0; i < 4; ++i) _mm256_storeu_ps(totals + r * stride + 8 * i, sums[r][i]);
}

void add(const float* const* weights, std::uint32_t rows, const HeadRows& values, float* totals,
         std::ptrdiff_t stride) {
  std::uint32_t r = 0;
  for (; r + 2 <= rows; r += 2)
    for (std::uint32_t k = 0; k < values.width; k += kWordGroup)
      add_group<2>(weights + r, values, k, totals + r * stride + k, stride);
  if (r < rows)
    for (std::uint32_t k = 0; k < values.width; k += kWordGroup)
      add_group<1>(weights + r, values, k, totals + r * stride + k, stride);
}

}  // namespace

const AttentionKernels kAvx2Attention{
    .scores = scores,
    .turn = nullptr,
    .turned_scores = nullptr,
    .softmax = softmax_values,
    .add = add,
    .finish = finish_values,
};

}  // namespace zipmoe
