// The products for any processor, in loops over the 16 sums that a compiler can vectorise.
#include "dot_pointwise.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;

float sum_of(const float* sums) {
  float half[kSums / 2];
  for (std::size_t k = 0; k < 8; ++k) half[k] = sums[k] + sums[k + 8];
  for (std::size_t k = 0; k < 4; ++k) half[k] += half[k + 4];
  for (std::size_t k = 0; k < 2; ++k) half[k] += half[k + 2];
  return half[0] + half[1];
}

void row_column(const u16* row, std::uint32_t width, const u16* x, float* sums, bool begin) {
  float total[kSums];
  for (std::size_t i = 0; i < kSums; ++i) total[i] = begin ? 0.0F : sums[i];
  for (std::uint32_t column = 0; column < width; column += 2 * kSums)
    for (std::size_t odd = 0; odd < 2; ++odd)
      for (std::size_t i = 0; i < kSums; ++i)
        total[i] += from_bf16(row[column + 2 * i + odd]) * from_bf16(x[column + 2 * i + odd]);
  for (std::size_t i = 0; i < kSums; ++i) sums[i] = total[i];
}

// One group: its integers, their sums, and what becomes of those.
void group_column(const std::int8_t (&integers)[kChunkColumns], const u16* scale, const u16* x,
                  float* sums) {
  float part[kSums];
  for (std::size_t i = 0; i < kSums; ++i) part[i] = scale == nullptr ? sums[i] : 0.0F;
  for (std::size_t k = 0; k < kChunkColumns; k += 2 * kSums)
    for (std::size_t odd = 0; odd < 2; ++odd)
      for (std::size_t i = 0; i < kSums; ++i)
        part[i] += static_cast<float>(integers[k + 2 * i + odd]) * from_bf16(x[k + 2 * i + odd]);
  for (std::size_t i = 0; i < kSums; ++i)
    sums[i] = scale == nullptr ? part[i] : __builtin_fmaf(from_bf16(*scale), part[i], sums[i]);
}

template <unsigned kBits>
void integers(const IntegerBlock& block, std::uint32_t height, std::uint32_t width,
              const Columns& x, const Sums& sums) {
  const std::uint8_t* chunk = block.codes;
  std::size_t group = 0;
  std::int8_t read[kChunkColumns];
  for (std::uint32_t row = 0; row < height; row += kChunkRows)
    for (std::uint32_t column = 0; column < width; column += kChunkColumns) {
      for (unsigned r = 0; r < kChunkRows; ++r, ++group) {
        read_integers<kBits>(chunk, r, read);
        const u16* scale = block.scales == nullptr ? nullptr : block.scales + group;
        for (std::uint32_t c = 0; c < x.count; ++c) {
          float* out = sums.data + (static_cast<std::ptrdiff_t>(c) * sums.stride + row + r) *
                                       static_cast<std::ptrdiff_t>(kSums);
          if (sums.begin && column == 0)
            for (std::size_t i = 0; i < kSums; ++i) out[i] = 0.0F;
          group_column(read, scale, x.data + c * x.stride + column, out);
        }
      }
      chunk += kChunkBytes<kBits>;
    }
  finish<sum_of>(sums, height, x.count);
}

void panel(const u16* rows, std::ptrdiff_t stride, std::uint32_t width, const Columns& x,
           const Sums& sums, const Ahead&) {
  for (std::uint32_t c = 0; c < x.count; ++c)
    for (unsigned r = 0; r < 4; ++r)
      row_column(rows + r * stride, width, x.data + c * x.stride,
                 sums.data + (static_cast<std::ptrdiff_t>(c) * sums.stride + r) *
                                 static_cast<std::ptrdiff_t>(kSums),
                 sums.begin);
  finish<sum_of>(sums, 4, x.count);
}

}  // namespace

const DotKernels kPortableDot{
    .coded_columns = 0,
    .many_columns = 24,
    .coded2 = nullptr,
    .coded3 = nullptr,
    .coded4 = nullptr,
    .int8 = integers<8>,
    .int4 = integers<4>,
    .int2 = integers<2>,
    .panel_weights = 2048,
    .panel = panel,
    .round = round_values,
    .gate = gate_values,
    .weigh = weigh_values,
    .add = add_values,
    .rotate = rotate_values,
};

}  // namespace zipmoe
