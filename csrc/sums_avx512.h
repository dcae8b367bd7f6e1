// The 16 sums of a product in AVX-512: how 32 words are added to them, and how they are added up,
// for sixteen products at once. Internal linkage: each file that includes it has its own flags.
#pragma once
#include <immintrin.h>

namespace zipmoe {
namespace {

// 32 BF16 words of either side are widened to FP32, first the even ones, then the odd ones.
struct WidenedProducts {
  [[gnu::always_inline]] static __m512 add(__m512 sums, __m512i left, __m512i right) {
    sums = _mm512_fmadd_ps(even(left), even(right), sums);
    return _mm512_fmadd_ps(odd(left), odd(right), sums);
  }

 private:
  static __m512 even(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static __m512 odd(__m512i words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
  }
};

#if defined(__AVX512BF16__)
// Two products of a sum at once.
struct PairProducts {
  [[gnu::always_inline]] static __m512 add(__m512 sums, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(left),
                            reinterpret_cast<__m512bh>(right));
  }
};
#endif

// At each step, what is left of two products is brought into one vector.
inline __m512 halve16(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}
inline __m512 halve8(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
inline __m512 halve4(__m512 a, __m512 b) {
  const __m512d left = _mm512_castps_pd(a), right = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
}
inline __m512 halve2(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}

// The sums of n products, 1 to 16, in the low lanes: the steps of those that are not there, in
// whose place the last one stands, are left out.
template <unsigned n>
[[gnu::always_inline]] inline __m512 reduce(const __m512 (&sums)[n]) {
  constexpr unsigned kEight = (n + 1) / 2, kFour = (n + 3) / 4, kTwo = (n + 7) / 8;
  __m512 eight[kEight], four[kFour], two[kTwo];
#pragma GCC unroll 8
  for (unsigned i = 0; i < kEight; ++i)
    eight[i] = halve16(sums[2 * i], sums[2 * i + 1 < n ? 2 * i + 1 : n - 1]);
#pragma GCC unroll 4
  for (unsigned i = 0; i < kFour; ++i)
    four[i] = halve8(eight[2 * i], eight[2 * i + 1 < kEight ? 2 * i + 1 : kEight - 1]);
#pragma GCC unroll 2
  for (unsigned i = 0; i < kTwo; ++i)
    two[i] = halve4(four[2 * i], four[2 * i + 1 < kFour ? 2 * i + 1 : kFour - 1]);
  const __m512 crossed = halve2(two[0], two[kTwo - 1]);
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_ps(order, crossed);
}

}  // namespace
}  // namespace zipmoe
