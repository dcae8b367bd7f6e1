// Attention for AVX-512 with BF16: two products of a lane at once.
#include "attention_avx512.h"

namespace zipmoe {

const AttentionKernels kAvx512Bf16Attention = avx512_attention<PairProducts>();

}  // namespace zipmoe
