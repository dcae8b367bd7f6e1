// The products for AVX-512 with BF16: two products of a lane at once.
#include "dot_avx512.h"

namespace zipmoe {
namespace {

struct PairProducts {
  [[gnu::always_inline]] static __m512 add(__m512 sums, __m512i weights, __m512i values) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(weights),
                            reinterpret_cast<__m512bh>(values));
  }
};

}  // namespace

const DotKernels kAvx512Bf16Dot = avx512_kernels<PairProducts>();

}  // namespace zipmoe
