// Attention for AVX-512 with BF16: two products of a lane at once.
#include "attention_avx512.h"

namespace zipmoe {
namespace {

struct PairProducts {
  [[gnu::always_inline]] static __m512 add(__m512 sums, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(left),
                            reinterpret_cast<__m512bh>(right));
  }
};

}  // namespace

const AttentionKernels kAvx512Bf16Attention = avx512_attention<PairProducts>();

}  // namespace zipmoe
