// The products for AVX-512, with and without vdpbf16ps. Internal linkage: each file that includes
// it has its own flags.
#pragma once
#include "dot_integers_avx512.h"
#include "dot_pointwise.h"
#include "dot_tile_avx512.h"
#include "lookup_avx512.h"
#include "sums_avx512.h"

namespace zipmoe {
namespace {

// Where decoded rows go as they are multiplied.
struct Nowhere {
  static constexpr bool kIsKept = false;
  void put(std::uint32_t, std::uint32_t, const Words&) const {}
};
struct Rows {
  static constexpr bool kIsKept = true;
  u16* data;
  std::ptrdiff_t stride;
  [[gnu::always_inline]] void put(std::uint32_t row, std::uint32_t column,
                                  const Words& words) const {
    u16* to = data + row * stride + column;
    _mm512_storeu_si512(to, words.first);
    _mm512_storeu_si512(to + 32, words.second);
  }
};

template <class Multiply, unsigned kBits, unsigned kColumns, class Kept = Nowhere>
std::size_t coded_block(const CodedBlock& block, std::uint32_t height, std::uint32_t width,
                        const Columns& x, const Sums& sums, const Kept& kept = {}) {
  // A branch between stores costs more than it saves.
  GroupReader<kBits, kBits == 4 && !Kept::kIsKept> groups(block);
  // One column of 4-bit codes leaves a core idle: processors fetch by themselves then, and better.
  constexpr bool kFetch = kBits < 4 || kColumns > 1;
  for (std::uint32_t row = 0; row < height; row += 4) {
    Tile<Multiply, kColumns> tile(sums, row);
    for (std::uint32_t column = 0; column < width; column += kGroup) {
      if constexpr (kFetch) groups.fetch_ahead();
      __m512i first[4], second[4];
#pragma GCC unroll 4
      for (unsigned k = 0; k < 4; ++k) {
        const Words words = groups.next(k);
        first[k] = words.first;
        second[k] = words.second;
        kept.put(row + k, column, words);
      }
      tile.add(first, x.data + column, x.stride);
      tile.add(second, x.data + column + 32, x.stride);
    }
    tile.store();
  }
  return groups.used();
}

template <class Multiply, unsigned kBits>
std::size_t coded(const CodedBlock& block, std::uint32_t height, std::uint32_t width,
                  const Columns& x, const Sums& sums) {
  switch (x.count) {
    case 1:
      return coded_block<Multiply, kBits, 1>(block, height, width, x, sums);
    case 2:
      return coded_block<Multiply, kBits, 2>(block, height, width, x, sums);
    case 3:
      return coded_block<Multiply, kBits, 3>(block, height, width, x, sums);
    default:
      return coded_block<Multiply, kBits, 4>(block, height, width, x, sums);
  }
}

template <class Multiply, unsigned kBits>
std::size_t keep(const CodedBlock& block, const BlockTarget& kept, const Columns& x,
                 const Sums& sums) {
  return coded_block<Multiply, kBits, kCodedColumns, Rows>(block, kept.height, kept.width, x, sums,
                                                           {kept.out, kept.stride});
}

template <class Multiply, unsigned kColumns>
void panel_of(const u16* rows, std::ptrdiff_t stride, std::uint32_t width, const Columns& x,
              const Sums& sums, const Ahead& ahead) {
  Tile<Multiply, kColumns> tile(sums, 0);
  const u16* from[4] = {rows, rows + stride, rows + 2 * stride, rows + 3 * stride};
  std::uint32_t column = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    __m512i weights[4];
#pragma GCC unroll 4
    for (unsigned r = 0; r < 4; ++r) weights[r] = _mm512_loadu_si512(from[r] + column);
    tile.add(weights, x.data + column, x.stride);
    column += 32;
  };
  for (; column / 32 < ahead.lines; step())
#pragma GCC unroll 4
    for (const u8* stretch : ahead.stretches)
      _mm_prefetch(reinterpret_cast<const char*>(stretch + 2 * column), _MM_HINT_T1);
  while (column < width) step();
  tile.store();
}

// Four columns are enough to do that memory has to be asked in time; fewer wait for it at any rate.
template <class Multiply, unsigned kColumns>
void rows_of(const u16* rows, std::ptrdiff_t stride, std::uint32_t width, const Columns& x,
             const Sums& sums) {
  constexpr bool kFetch = kColumns == kCodedColumns;
  const auto rows_ahead = static_cast<std::ptrdiff_t>(1 + kFetchAhead / (sizeof *rows * width));
  for (unsigned r = 0; r < 4; ++r) {
    Tile<Multiply, kColumns, 1> tile(sums, r);
    for (std::uint32_t column = 0; column < width; column += 32) {
      const u16* from = rows + r * stride + column;
      if constexpr (kFetch)
        _mm_prefetch(reinterpret_cast<const char*>(from + rows_ahead * stride), _MM_HINT_T1);
      const __m512i weights[1] = {_mm512_loadu_si512(from)};
      tile.add(weights, x.data + column, x.stride);
    }
    tile.store();
  }
}

template <class Multiply>
void rows(const u16* from, std::ptrdiff_t stride, std::uint32_t width, const Columns& x,
          const Sums& sums) {
  static constexpr decltype(&rows<Multiply>) kByColumns[] = {
      rows_of<Multiply, 1>, rows_of<Multiply, 2>, rows_of<Multiply, 3>, rows_of<Multiply, 4>};
  kByColumns[x.count - 1](from, stride, width, x, sums);
}

template <class Multiply>
void panel(const u16* rows, std::ptrdiff_t stride, std::uint32_t width, const Columns& x,
           const Sums& sums, const Ahead& ahead) {
  static constexpr decltype(&panel<Multiply>) kByColumns[] = {
      panel_of<Multiply, 1>, panel_of<Multiply, 2>, panel_of<Multiply, 3>,
      panel_of<Multiply, 4>, panel_of<Multiply, 5>, panel_of<Multiply, 6>,
  };
  kByColumns[x.count - 1](rows, stride, width, x, sums, ahead);
}

template <class Multiply>
constexpr DotKernels avx512_kernels() {
  return {
      .coded_columns = kCodedColumns,
      .many_columns = kCodedColumns + 1,
      .coded2 = coded<Multiply, 2>,
      .coded3 = coded<Multiply, 3>,
      .coded4 = coded<Multiply, 4>,
      .keep2 = keep<Multiply, 2>,
      .keep3 = keep<Multiply, 3>,
      .keep4 = keep<Multiply, 4>,
      .int8 = integers<Multiply, 8>,
      .int4 = integers<Multiply, 4>,
      .int2 = integers<Multiply, 2>,
      .panel_weights = 16384,
      .panel = panel<Multiply>,
      .rows = rows<Multiply>,
      .round = round_values,
      .gate = gate_values,
      .weigh = weigh_values,
      .add = add_values,
      .rotate = rotate_values,
  };
}

}  // namespace
}  // namespace zipmoe
