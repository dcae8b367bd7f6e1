// The norms' inner loops. As in kernels.h: files that implement them include nothing but this.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zipmoe {

enum class Isa;

// What becomes of x, a row divided by its root mean square.
enum class NormKind : std::uint8_t {
  plain,       // round(x): no weight
  rounded,     // round(weight * round(x))
  wide,        // round(weight * x)
  wide_plus1,  // round((1 + weight) * x)
};

struct NormRule {
  NormKind kind;
  float eps;
  std::uint32_t width;
  const std::uint16_t* weight;  // BF16, or null
  const float* wide_weight;     // FP32, if `weight` is null
};

using NormRow = void (*)(const std::uint16_t* x, const NormRule& rule, std::uint16_t* out);

// That of an instruction set that this machine has.
NormRow norm_row(Isa isa);

extern const NormRow kPortableNorm;
#if defined(__x86_64__)
extern const NormRow kAvx2Norm;
extern const NormRow kAvx512Norm;
#endif

}  // namespace zipmoe
