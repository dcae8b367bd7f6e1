// Attention for AVX-512 without BF16: words are widened to FP32, first the even ones, then the odd
// ones.
#include "attention_avx512.h"

namespace zipmoe {

const AttentionKernels kAvx512Attention = avx512_attention<WidenedProducts>();

}  // namespace zipmoe
