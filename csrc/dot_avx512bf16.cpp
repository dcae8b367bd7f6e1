// The products for AVX-512 with BF16: two products of a lane at once.
#include "dot_avx512.h"

namespace zipmoe {

const DotKernels kAvx512Bf16Dot = avx512_kernels<PairProducts>();

}  // namespace zipmoe
