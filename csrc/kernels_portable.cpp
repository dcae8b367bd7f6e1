// The kernels in plain C++: the reference for the vector ones, and the path of other processors.
#include <array>
#include <cstring>

#include "kernels.h"

namespace zipmoe {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;

constexpr unsigned kGroup = 64;

// Byte of weight w of a group in both planes (docs/format.md section 6).
constexpr unsigned lane_position(unsigned w) {
  return 16 * ((w >> 3) & 3) + 8 * (w >> 5) + (w & 7);
}

template <unsigned kBits>
constexpr unsigned kGroupBytes = kBits * kGroup / 8;

template <unsigned kBits>
unsigned code_at(const u8* group, unsigned i) {
  if constexpr (kBits == 4) return (group[i % 32] >> (4 * (i / 32))) & 15U;
  const unsigned low = (group[i % 16] >> (2 * (i / 16))) & 3U;
  if constexpr (kBits == 2) return low;
  return low | (((group[16 + i / 8] >> (i % 8)) & 1U) << 2);
}

template <unsigned kBits>
void put_code(u8* group, unsigned i, unsigned code) {
  if constexpr (kBits == 4) {
    group[i % 32] = static_cast<u8>(group[i % 32] | (code << (4 * (i / 32))));
    return;
  }
  group[i % 16] = static_cast<u8>(group[i % 16] | ((code & 3U) << (2 * (i / 16))));
  if constexpr (kBits == 3)
    group[16 + i / 8] = static_cast<u8>(group[16 + i / 8] | ((code >> 2) << (i % 8)));
}

// Undo one group of n <= 64 codes; returns the escapes consumed.
template <unsigned kBits>
std::size_t unrank_group(const u8* group, unsigned n, const u8* table, const u8* escapes, u8* out) {
  constexpr unsigned kEscape = (1U << kBits) - 1;
  std::size_t used = 0;
  for (unsigned i = 0; i < n; ++i) {
    const unsigned code = code_at<kBits>(group, i);
    out[i] = code == kEscape ? escapes[used++] : table[code];
  }
  return used;
}

template <unsigned kBits>
std::size_t unrank(const u8* codes, std::size_t n, const u8* table, const u8* escapes, u8* out) {
  std::size_t used = 0;
  for (std::size_t i = 0; i < n; i += kGroup, codes += kGroupBytes<kBits>) {
    const unsigned left = n - i < kGroup ? static_cast<unsigned>(n - i) : kGroup;
    used += unrank_group<kBits>(codes, left, table, escapes + used, out + i);
  }
  return used;
}

void merge_group(const u8* sign_mantissa, const u8* exponents, u16* out) {
  for (unsigned w = 0; w < kGroup; ++w) {
    const unsigned at = lane_position(w);
    const unsigned rotated = (static_cast<unsigned>(exponents[at]) << 8) | sign_mantissa[at];
    out[w] = static_cast<u16>((rotated >> 1) | (rotated << 15));
  }
}

// Calls body(group number, first weight of the group) in the order of the format.
template <class Body>
void each_group(const BlockTarget& target, const Body& body) {
  std::size_t group = 0;
  for (std::uint32_t panel = 0; panel < target.height; panel += 4)
    for (std::uint32_t column = 0; column < target.width; column += kGroup)
      for (std::uint32_t row = panel; row < panel + 4; ++row)
        body(group++, target.out + static_cast<std::ptrdiff_t>(row) * target.stride + column);
}

template <unsigned kBits>
std::size_t merge(const CodedBlock& block, const BlockTarget& target) {
  std::size_t used = 0;
  each_group(target, [&](std::size_t group, u16* out) {
    std::array<u8, kGroup> exponents;
    used += unrank_group<kBits>(block.codes + group * kGroupBytes<kBits>, kGroup, block.table,
                                block.escapes + used, exponents.data());
    merge_group(block.sign_mantissa + group * kGroup, exponents.data(), out);
  });
  return used;
}

void merge8(const u8* sign_mantissa, const u8* exponents, const BlockTarget& target) {
  each_group(target, [&](std::size_t group, u16* out) {
    merge_group(sign_mantissa + group * kGroup, exponents + group * kGroup, out);
  });
}

void fence() {}

void split(const u16* words, std::ptrdiff_t stride, std::uint32_t height, std::uint32_t width,
           u8* sign_mantissa, u8* exponents) {
  for (std::uint32_t panel = 0; panel < height; panel += 4)
    for (std::uint32_t column = 0; column < width; column += kGroup)
      for (std::uint32_t row = panel; row < panel + 4; ++row) {
        const u16* from = words + static_cast<std::ptrdiff_t>(row) * stride + column;
        for (unsigned w = 0; w < kGroup; ++w) {
          const unsigned at = lane_position(w), word = from[w];
          sign_mantissa[at] = static_cast<u8>((word << 1) | (word >> 15));
          exponents[at] = static_cast<u8>(word >> 7);
        }
        sign_mantissa += kGroup;
        exponents += kGroup;
      }
}

template <unsigned kBits>
std::size_t rank(const u8* values, std::size_t n, const u8* table, u8* codes, u8* escapes) {
  constexpr unsigned kEscape = (1U << kBits) - 1;
  std::array<u8, 256> code_of;
  code_of.fill(kEscape);
  for (unsigned code = 0; code < kEscape; ++code) code_of[table[code]] = static_cast<u8>(code);
  std::size_t escaped = 0;
  for (std::size_t i = 0; i < n; i += kGroup, codes += kGroupBytes<kBits>) {
    const unsigned left = n - i < kGroup ? static_cast<unsigned>(n - i) : kGroup;
    std::memset(codes, 0, kGroupBytes<kBits>);
    for (unsigned k = 0; k < left; ++k) {
      const unsigned code = code_of[values[i + k]];
      put_code<kBits>(codes, k, code);
      escapes[escaped] = values[i + k];
      escaped += code == kEscape;
    }
  }
  return escaped;
}

}  // namespace

void histogram(const u8* values, std::size_t n, std::uint32_t* counts) {
  // Four tables: equal neighbours would otherwise wait for each other's store.
  std::array<std::array<std::uint32_t, 256>, 4> part{};
  for (std::size_t i = 0; i < n; i += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, values + i, 8);
    for (unsigned k = 0; k < 8; ++k) ++part[k % 4][(eight >> (8 * k)) & 255];
  }
  for (unsigned v = 0; v < 256; ++v) counts[v] = part[0][v] + part[1][v] + part[2][v] + part[3][v];
}

const Kernels kPortableKernels{
    .unrank2 = unrank<2>,
    .unrank3 = unrank<3>,
    .merge2 = merge<2>,
    .merge3 = merge<3>,
    .merge4 = merge<4>,
    .merge8 = merge8,
    .fence = fence,
    .split = split,
    .histogram = histogram,
    .rank2 = rank<2>,
    .rank3 = rank<3>,
    .rank4 = rank<4>,
};

}  // namespace zipmoe
