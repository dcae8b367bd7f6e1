// The 16 sums of a product in AVX2: two vectors. Internal linkage: each file that includes it has
// its own flags.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace zipmoe {
namespace {

// Of 16 BF16 words, those with even and those with odd numbers, widened.
struct Halves {
  __m256 even, odd;
  [[gnu::always_inline]] explicit Halves(__m256i words)
      : even(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))),
        odd(_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)))) {}
  [[gnu::always_inline]] explicit Halves(const std::uint16_t* from)
      : Halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))) {}
};

// 32 words: sums 0 to 7 take the low ones, sums 8 to 15 the high ones.
struct Widened {
  __m256 low_even, low_odd, high_even, high_odd;
  [[gnu::always_inline]] explicit Widened(const std::uint16_t* from) {
    const Halves low(from), high(from + 16);
    low_even = low.even;
    low_odd = low.odd;
    high_even = high.even;
    high_odd = high.odd;
  }
};

inline float sum_of(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float sum_of(const float* sums) {
  return sum_of(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8));
}

}  // namespace
}  // namespace zipmoe
