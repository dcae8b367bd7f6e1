// What is done to each value and each output by itself: the same source for every instruction set,
// left to the compiler to vectorise, without contraction of a multiplication and an addition into
// one operation (the build says -ffp-contract=off for these files). So its results are the same
// everywhere. Internal linkage: each file that includes it is compiled with its own flags.
#pragma once
#include "dot.h"
#include "scalar.h"

namespace zipmoe {
namespace {

// For kernels that leave sums in memory: outputs, where no products follow.
template <float (*kSumOf)(const float*)>
void finish(const Sums& sums, std::uint32_t height, std::uint32_t columns) {
  if (sums.out == nullptr) return;
  for (std::uint32_t c = 0; c < columns; ++c)
    for (std::uint32_t row = 0; row < height; ++row) {
      const std::ptrdiff_t at = c * sums.stride + row;
      sums.out[at] = kSumOf(sums.data + at * static_cast<std::ptrdiff_t>(kSums));
    }
}

inline float silu(float x) { return x / (1.0F + exp_of(-x)); }

// x (1 + tanh y) / 2 = x / (1 + e to the -2y): nothing cancels.
inline float gelu_tanh(float x) {
  const float y = 0.7978845608F * (x + 0.044715F * x * x * x);
  return x / (1.0F + exp_of(-2.0F * y));
}

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
inline float gelu_erf(float x) {
  const float z = x * 0.70710678F;
  const float magnitude = z < 0.0F ? -z : z;
  const float t = 1.0F / (1.0F + 0.3275911F * magnitude);
  float p = 1.061405429F;
  p = p * t - 1.453152027F;
  p = p * t + 1.421413741F;
  p = p * t - 0.284496736F;
  p = p * t + 0.254829592F;
  const float tail = p * t * exp_of(-magnitude * magnitude);  // 1 - erf(|z|)
  return 0.5F * x * (x < 0.0F ? tail : 2.0F - tail);
}

inline float relu(float x) { return x < 0.0F ? 0.0F : x; }  // NaN stays NaN
inline float relu2(float x) { return relu(x) * relu(x); }

template <float (*kActivation)(float)>
void gate_with(const float* gate, const float* up, std::size_t n, std::uint16_t* out) {
  if (up == nullptr)
    for (std::size_t i = 0; i < n; ++i) out[i] = to_bf16(kActivation(gate[i]));
  else
    for (std::size_t i = 0; i < n; ++i) out[i] = to_bf16(kActivation(gate[i]) * up[i]);
}

void gate_values(Gate kind, const float* gate, const float* up, std::size_t n, std::uint16_t* out) {
  switch (kind) {
    case Gate::silu:
      return gate_with<silu>(gate, up, n, out);
    case Gate::gelu:
      return gate_with<gelu_erf>(gate, up, n, out);
    case Gate::gelu_tanh:
      return gate_with<gelu_tanh>(gate, up, n, out);
    case Gate::relu:
      return gate_with<relu>(gate, up, n, out);
    case Gate::relu2:
      return gate_with<relu2>(gate, up, n, out);
  }
}

void round_values(const float* values, std::size_t n, const std::uint16_t* bias,
                  std::uint16_t* out) {
  if (bias == nullptr)
    for (std::size_t i = 0; i < n; ++i) out[i] = to_bf16(values[i]);
  else
    for (std::size_t i = 0; i < n; ++i) out[i] = to_bf16(values[i] + from_bf16(bias[i]));
}

void add_values(const std::uint16_t* x, const std::uint16_t* more, std::size_t n,
                std::uint16_t* out) {
  for (std::size_t i = 0; i < n; ++i) out[i] = to_bf16(from_bf16(x[i]) + from_bf16(more[i]));
}

inline float round_to_bf16(float value) { return from_bf16(to_bf16(value)); }

void rotate_values(std::uint16_t* words, const std::uint16_t* cos, const std::uint16_t* sin,
                   std::size_t half) {
  for (std::size_t i = 0; i < half; ++i) {
    const float first = from_bf16(words[i]), second = from_bf16(words[i + half]);
    words[i] = to_bf16(round_to_bf16(first * from_bf16(cos[i])) +
                       round_to_bf16(-second * from_bf16(sin[i])));
    words[i + half] = to_bf16(round_to_bf16(second * from_bf16(cos[i + half])) +
                              round_to_bf16(first * from_bf16(sin[i + half])));
  }
}

void weigh_values(const float* values, std::size_t n, float weight, float* total) {
  for (std::size_t i = 0; i < n; ++i) total[i] += weight * values[i];
}

}  // namespace
}  // namespace zipmoe
