#include <stdexcept>

#include "attention_kernels.h"
#include "dot.h"
#include "isa.h"
#include "kernels.h"
#include "norm_kernels.h"

namespace zipmoe {

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512bf16:
    case Isa::avx512:
      return kAvx512Kernels;
    case Isa::avx2:
      return kAvx2Kernels;
#else
    case Isa::avx512bf16:
    case Isa::avx512:
    case Isa::avx2:
      throw std::invalid_argument("instruction set of another processor");
#endif
    case Isa::portable:
      return kPortableKernels;
  }
  throw std::invalid_argument("unknown instruction set");
}

const DotKernels& dot_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512bf16:
      return kAvx512Bf16Dot;
    case Isa::avx512:
      return kAvx512Dot;
    case Isa::avx2:
      return kAvx2Dot;
#else
    case Isa::avx512bf16:
    case Isa::avx512:
    case Isa::avx2:
      throw std::invalid_argument("instruction set of another processor");
#endif
    case Isa::portable:
      return kPortableDot;
  }
  throw std::invalid_argument("unknown instruction set");
}

const AttentionKernels& attention_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512bf16:
      return kAvx512Bf16Attention;
    case Isa::avx512:
      return kAvx512Attention;
    case Isa::avx2:
      return kAvx2Attention;
#else
    case Isa::avx512bf16:
    case Isa::avx512:
    case Isa::avx2:
      throw std::invalid_argument("instruction set of another processor");
#endif
    case Isa::portable:
      return kPortableAttention;
  }
  throw std::invalid_argument("unknown instruction set");
}

NormRow norm_row(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512bf16:
    case Isa::avx512:
      return kAvx512Norm;
    case Isa::avx2:
      return kAvx2Norm;
#else
    case Isa::avx512bf16:
    case Isa::avx512:
    case Isa::avx2:
      throw std::invalid_argument("instruction set of another processor");
#endif
    case Isa::portable:
      return kPortableNorm;
  }
  throw std::invalid_argument("unknown instruction set");
}

}  // namespace zipmoe
