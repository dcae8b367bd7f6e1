// The softmax and the last rounding: loops over 16 lanes that a compiler can vectorise.
#pragma once
#include "attention_kernels.h"
#include "scalar.h"

namespace zipmoe {
namespace {

constexpr float kLowest = -__builtin_huge_valf();

// Scaled, capped and biased in place; returns the largest, NaN left out.
inline float shape_scores(float* scores, std::size_t n, const Softmax& how) {
  float most[kScoreSums];
  for (std::size_t i = 0; i < kScoreSums; ++i) most[i] = kLowest;
  const float softcap = how.softcap;
  for (std::size_t j = 0; j < n; j += kScoreSums) {
    float* at = scores + j;
    for (std::size_t i = 0; i < kScoreSums; ++i) at[i] *= how.scaling;
    if (softcap != 0.0F)
      for (std::size_t i = 0; i < kScoreSums; ++i) at[i] = softcap * tanh_of(at[i] / softcap);
    if (how.bias != nullptr)
      for (std::size_t i = 0; i < kScoreSums; ++i) at[i] += how.bias[j + i];
    for (std::size_t i = 0; i < kScoreSums; ++i) most[i] = at[i] > most[i] ? at[i] : most[i];
  }
  float largest = most[0];
  for (std::size_t i = 1; i < kScoreSums; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

float softmax_values(float* scores, std::size_t n, const Softmax& how) {
  // Beyond the last score stand copies of it, which leave the largest as it is, then nothing.
  for (std::size_t j = n; j % kScoreSums != 0; ++j) scores[j] = scores[n - 1];
  float largest = shape_scores(scores, n, how);
  for (std::size_t j = n; j % kScoreSums != 0; ++j) scores[j] = kLowest;
  if (how.sink != nullptr) largest = *how.sink > largest ? *how.sink : largest;
  float sums[kScoreSums] = {};
  for (std::size_t j = 0; j < n; j += kScoreSums)
    for (std::size_t i = 0; i < kScoreSums; ++i) {
      const float weight = exp_of(scores[j + i] - largest);
      scores[j + i] = weight;
      sums[i] += weight;
    }
  for (std::size_t half = kScoreSums / 2; half != 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  if (how.sink != nullptr) sums[0] += exp_of(*how.sink - largest);
  return 1.0F / sums[0];
}

void finish_values(const float* totals, float factor, std::uint32_t width, std::uint16_t* out) {
  std::uint16_t words[kWordGroup];
  for (std::uint32_t k = 0; k < width; k += kWordGroup) {
    for (std::uint32_t i = 0; i < kWordGroup / 2; ++i) {
      // Adding 0 leaves no -0, so that none depends on whether a product was left out or was 0.
      words[2 * i] = to_bf16(totals[k + i] * factor + 0.0F);
      words[2 * i + 1] = to_bf16(totals[k + kWordGroup / 2 + i] * factor + 0.0F);
    }
    const std::uint32_t here = width - k < kWordGroup ? width - k : kWordGroup;
    __builtin_memcpy(out + k, words, here * sizeof *out);
  }
}

}  // namespace
}  // namespace zipmoe
