// Attention for AVX-512 without BF16: words are widened to FP32, first the even ones, then the odd
// ones.
#include "attention_avx512.h"

namespace zipmoe {
namespace {

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

}  // namespace

const AttentionKernels kAvx512Attention = avx512_attention<WidenedProducts>();

}  // namespace zipmoe
