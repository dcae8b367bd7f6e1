// Attention for any processor, in loops that a compiler can vectorise.
#include "attention_pointwise.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;

// The next kWordGroup words of a row, 0 where it ends before.
struct Words {
  float at[kWordGroup];
  Words(const u16* row, std::uint32_t left) {
    for (std::uint32_t i = 0; i < kWordGroup; ++i) at[i] = i < left ? from_bf16(row[i]) : 0.0F;
  }
};

void scores(const u16* query, const HeadRows& keys, float* out) {
  for (std::uint32_t j = 0; j < keys.n; ++j) {
    const u16* key = keys.data + j * keys.stride;
    float sums[kScoreSums] = {};
    for (std::uint32_t k = 0; k < keys.width; k += kWordGroup) {
      const Words left(query + k, kWordGroup), right(key + k, keys.width - k);
      for (std::uint32_t odd = 0; odd < 2; ++odd)
        for (std::uint32_t i = 0; i < kScoreSums; ++i)
          sums[i] += left.at[2 * i + odd] * right.at[2 * i + odd];
    }
    for (std::uint32_t half = kScoreSums / 2; half != 0; half /= 2)
      for (std::uint32_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    out[j] = sums[0];
  }
}

void add(const float* const* weights, std::uint32_t rows, const HeadRows& values, float* totals,
         std::ptrdiff_t stride) {
  for (std::uint32_t j = 0; j < values.n; ++j)
    for (std::uint32_t k = 0; k < values.width; k += kWordGroup) {
      const Words words(values.data + j * values.stride + k, values.width - k);
      for (std::uint32_t r = 0; r < rows; ++r) {
        float* total = totals + r * stride + k;
        for (std::uint32_t odd = 0; odd < 2; ++odd)
          for (std::uint32_t i = 0; i < kWordGroup / 2; ++i) {
            float& sum = total[odd * kWordGroup / 2 + i];
            sum = __builtin_fmaf(weights[r][j], words.at[2 * i + odd], sum);
          }
      }
    }
}

}  // namespace

const AttentionKernels kPortableAttention{
    .scores = scores,
    .turn = nullptr,
    .turned_scores = nullptr,
    .softmax = softmax_values,
    .add = add,
    .finish = finish_values,
};

}  // namespace zipmoe
