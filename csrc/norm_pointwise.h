// The norm of one row, in loops over 16 lanes that a compiler can vectorise: the same source for
// every instruction set.
#pragma once
#include "norm_kernels.h"
#include "scalar.h"

namespace zipmoe {
namespace {

constexpr std::uint32_t kLanes = 16;

inline float inverse_rms(const std::uint16_t* x, std::uint32_t width, float eps) {
  float sums[kLanes] = {};
  std::uint32_t k = 0;
  for (; k + kLanes <= width; k += kLanes)
    for (std::uint32_t i = 0; i < kLanes; ++i) {
      const float value = from_bf16(x[k + i]);
      sums[i] += value * value;
    }
  for (std::uint32_t i = 0; k + i < width; ++i) {
    const float value = from_bf16(x[k + i]);
    sums[i] += value * value;
  }
  for (std::uint32_t half = kLanes / 2; half != 0; half /= 2)
    for (std::uint32_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return 1.0F / __builtin_sqrtf(sums[0] / static_cast<float>(width) + eps);
}

template <NormKind kKind, class Weight>
void scale_row(const std::uint16_t* x, std::uint32_t width, float factor, const Weight& weight,
               std::uint16_t* out) {
  for (std::uint32_t k = 0; k < width; ++k) {
    const float value = from_bf16(x[k]) * factor;
    if constexpr (kKind == NormKind::plain)
      out[k] = to_bf16(value);
    else if constexpr (kKind == NormKind::rounded)
      out[k] = to_bf16(weight(k) * from_bf16(to_bf16(value)));
    else if constexpr (kKind == NormKind::wide)
      out[k] = to_bf16(weight(k) * value);
    else
      out[k] = to_bf16((1.0F + weight(k)) * value);
  }
}

template <class Weight>
void weigh_row(const std::uint16_t* x, const NormRule& rule, float factor, const Weight& weight,
               std::uint16_t* out) {
  switch (rule.kind) {
    case NormKind::plain:
      return scale_row<NormKind::plain>(x, rule.width, factor, weight, out);
    case NormKind::rounded:
      return scale_row<NormKind::rounded>(x, rule.width, factor, weight, out);
    case NormKind::wide:
      return scale_row<NormKind::wide>(x, rule.width, factor, weight, out);
    case NormKind::wide_plus1:
      return scale_row<NormKind::wide_plus1>(x, rule.width, factor, weight, out);
  }
}

void norm_values(const std::uint16_t* x, const NormRule& rule, std::uint16_t* out) {
  const float factor = inverse_rms(x, rule.width, rule.eps);
  if (rule.wide_weight != nullptr)
    weigh_row(x, rule, factor, [&](std::uint32_t k) { return rule.wide_weight[k]; }, out);
  else
    weigh_row(x, rule, factor, [&](std::uint32_t k) { return from_bf16(rule.weight[k]); }, out);
}

}  // namespace
}  // namespace zipmoe
