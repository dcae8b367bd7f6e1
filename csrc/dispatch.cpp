#include <stdexcept>

#include "attention_kernels.h"
#include "dot.h"
#include "isa.h"
#include "kernels.h"
#include "norm_kernels.h"

namespace zipmoe {
namespace {

// What an instruction set has of one kind of kernel. Throws std::invalid_argument for one of
// another processor.
template <class T>
struct Choice {
  const T* avx512bf16;
  const T* avx512;
  const T* avx2;
  const T* portable;

  const T& operator()(Isa isa) const {
    const T* chosen = portable;
    if (isa == Isa::avx512bf16) chosen = avx512bf16;
    if (isa == Isa::avx512) chosen = avx512;
    if (isa == Isa::avx2) chosen = avx2;
    if (chosen == nullptr) throw std::invalid_argument("instruction set of another processor");
    return *chosen;
  }
};

#if defined(__x86_64__)
constexpr Choice<Kernels> kKernels{&kAvx512Kernels, &kAvx512Kernels, &kAvx2Kernels,
                                   &kPortableKernels};
constexpr Choice<DotKernels> kDot{&kAvx512Bf16Dot, &kAvx512Dot, &kAvx2Dot, &kPortableDot};
constexpr Choice<AttentionKernels> kAttention{&kAvx512Bf16Attention, &kAvx512Attention,
                                              &kAvx2Attention, &kPortableAttention};
constexpr Choice<NormRow> kNorm{&kAvx512Norm, &kAvx512Norm, &kAvx2Norm, &kPortableNorm};
#else
constexpr Choice<Kernels> kKernels{nullptr, nullptr, nullptr, &kPortableKernels};
constexpr Choice<DotKernels> kDot{nullptr, nullptr, nullptr, &kPortableDot};
constexpr Choice<AttentionKernels> kAttention{nullptr, nullptr, nullptr, &kPortableAttention};
constexpr Choice<NormRow> kNorm{nullptr, nullptr, nullptr, &kPortableNorm};
#endif

}  // namespace

const Kernels& kernels(Isa isa) { return kKernels(isa); }
const DotKernels& dot_kernels(Isa isa) { return kDot(isa); }
const AttentionKernels& attention_kernels(Isa isa) { return kAttention(isa); }
NormRow norm_row(Isa isa) { return kNorm(isa); }

}  // namespace zipmoe
