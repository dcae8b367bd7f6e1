// How the integer codecs lay out their codes: docs/format.md section 7.4. Kernels include it, so it
// includes no standard header that emits code; internal linkage, for each file has its own flags.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zipmoe {

// A block of integer codes. `scales`: one BF16 per group of 64 weights, in the block's order; null
// where a row has one scale, which is for the finished sum.
struct IntegerBlock {
  const std::uint8_t* codes;
  const std::uint16_t* scales;
};

namespace {

// A chunk is 64 columns of a panel of four rows.
constexpr unsigned kChunkRows = 4;
constexpr unsigned kChunkColumns = 64;
template <unsigned kBits>
constexpr std::size_t kChunkBytes = kChunkRows * kChunkColumns * kBits / 8;

// Where a code lies in its chunk.
struct CodePlace {
  std::size_t byte;
  unsigned shift;
};

template <unsigned kBits>
constexpr CodePlace code_place(unsigned row, unsigned weight) {
  if constexpr (kBits == 8) {
    return {row * 64 + 16 * ((weight >> 3) & 3) + 8 * (weight >> 5) + (weight & 7), 0};
  } else {
    // Units of 64 bytes are 32 words, and a word has a code of each of the halves of some rows.
    constexpr unsigned kWordCodes = 16 / kBits;
    const unsigned number = 2 * row + weight / 32, bit = number % kWordCodes * kBits;
    return {number / kWordCodes * 64 + weight % 32 * 2 + bit / 8, bit % 8};
  }
}

// The integers of one row of a chunk. Codes of 2 bits stand for odd integers.
template <unsigned kBits>
void read_integers(const std::uint8_t* chunk, unsigned row, std::int8_t (&out)[kChunkColumns]) {
  for (unsigned w = 0; w < kChunkColumns; ++w) {
    const CodePlace place = code_place<kBits>(row, w);
    const auto high = static_cast<std::int8_t>(chunk[place.byte] << (8 - kBits - place.shift));
    const int code = high >> (8 - kBits);
    out[w] = static_cast<std::int8_t>(kBits == 2 ? 2 * code + 1 : code);
  }
}

}  // namespace
}  // namespace zipmoe
