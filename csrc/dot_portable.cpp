// The products for any processor, in loops over the 16 sums that a compiler can vectorise.
#include "dot_pointwise.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;

void row_column(const u16* row, std::uint32_t width, const u16* x, float* sums, bool begin) {
  float total[kSums];
  for (std::size_t i = 0; i < kSums; ++i) total[i] = begin ? 0.0F : sums[i];
  for (std::uint32_t column = 0; column < width; column += 2 * kSums)
    for (std::size_t odd = 0; odd < 2; ++odd)
      for (std::size_t i = 0; i < kSums; ++i)
        total[i] += from_bf16(row[column + 2 * i + odd]) * from_bf16(x[column + 2 * i + odd]);
  for (std::size_t i = 0; i < kSums; ++i) sums[i] = total[i];
}

void panel(const u16* rows, std::ptrdiff_t stride, std::uint32_t width, const Columns& x,
           const Sums& sums, const Ahead&) {
  for (std::uint32_t c = 0; c < x.count; ++c)
    for (unsigned r = 0; r < 4; ++r)
      row_column(rows + r * stride, width, x.data + c * x.stride,
                 sums.data + (static_cast<std::ptrdiff_t>(c) * sums.stride + r) *
                                 static_cast<std::ptrdiff_t>(kSums),
                 sums.begin);
}

void reduce(const float* sums, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i, sums += kSums) {
    float half[kSums / 2];
    for (std::size_t k = 0; k < 8; ++k) half[k] = sums[k] + sums[k + 8];
    for (std::size_t k = 0; k < 4; ++k) half[k] += half[k + 4];
    for (std::size_t k = 0; k < 2; ++k) half[k] += half[k + 2];
    out[i] = half[0] + half[1];
  }
}

}  // namespace

const DotKernels kPortableDot{
    .coded_columns = 0,
    .coded2 = nullptr,
    .coded3 = nullptr,
    .coded4 = nullptr,
    .panel = panel,
    .reduce = reduce,
    .round = round_values,
    .gate = gate_values,
    .weigh = weigh_values,
    .add = add_values,
    .rotate = rotate_values,
};

}  // namespace zipmoe
