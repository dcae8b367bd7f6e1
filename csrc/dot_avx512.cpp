// The products for AVX-512 without BF16: weights and values are widened to FP32, first the even
// ones, then the odd ones.
#include "dot_avx512.h"

namespace zipmoe {
namespace {

struct WidenedProducts {
  [[gnu::always_inline]] static __m512 add(__m512 sums, __m512i weights, __m512i values) {
    sums = _mm512_fmadd_ps(even(weights), even(values), sums);
    return _mm512_fmadd_ps(odd(weights), odd(values), sums);
  }

 private:
  static __m512 even(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static __m512 odd(__m512i words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
  }
};

}  // namespace

const DotKernels kAvx512Dot = avx512_kernels<WidenedProducts>();

}  // namespace zipmoe
