// The products for AVX-512 without BF16: weights and values are widened to FP32, first the even
// ones, then the odd ones.
#include "dot_avx512.h"

namespace zipmoe {

const DotKernels kAvx512Dot = avx512_kernels<WidenedProducts>();

}  // namespace zipmoe
