// The 16 sums of a product in AVX2: two vectors. Internal linkage: each file that includes it has
// its own flags.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace zipmoe {
namespace {

// 32 BF16 words, widened: sums 0 to 7 take the low ones, sums 8 to 15 the high ones.
struct Widened {
  __m256 low_even, low_odd, high_even, high_odd;
  [[gnu::always_inline]] explicit Widened(const std::uint16_t* from) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 16));
    const __m256i mask = _mm256_set1_epi32(-65536);
    low_even = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
    low_odd = _mm256_castsi256_ps(_mm256_and_si256(low, mask));
    high_even = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    high_odd = _mm256_castsi256_ps(_mm256_and_si256(high, mask));
  }
};

inline float sum_of(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace
}  // namespace zipmoe
