// The kernels in plain C++: the reference for the vector ones, and the path of other processors.
#include <array>
#include <bit>
#include <cstring>

#include "kernels.h"

namespace zipmoe {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u64 = std::uint64_t;

constexpr unsigned kGroup = 64;

template <unsigned kBits>
constexpr unsigned kGroupBytes = kBits * kGroup / 8;

// The loops below are written so that a compiler makes vectors of them: constant trip counts, no
// branches, neighbours to neighbours.

// For each mask of eight high bits the word of eight bytes that are 4 where the bit is set.
constexpr std::array<u64, 256> kFours = [] {
  std::array<u64, 256> words{};
  for (unsigned mask = 0; mask < 256; ++mask)
    for (unsigned bit = 0; bit < 8; ++bit) words[mask] |= u64{(mask >> bit) & 1U} << (8 * bit + 2);
  return words;
}();

// All codes of a group, one per byte.
template <unsigned kBits>
void unpack(const u8* group, u8* codes) {
  if constexpr (kBits == 4) {
    for (unsigned i = 0; i < 32; ++i) codes[i] = group[i] & 15U;
    for (unsigned i = 0; i < 32; ++i) codes[32 + i] = group[i] >> 4;
    return;
  }
  for (unsigned shift = 0; shift < 4; ++shift)
    for (unsigned i = 0; i < 16; ++i) codes[16 * shift + i] = (group[i] >> (2 * shift)) & 3U;
  if constexpr (kBits == 3)
    for (unsigned i = 0; i < 8; ++i) {
      u64 eight;
      std::memcpy(&eight, codes + 8 * i, sizeof eight);
      eight |= kFours[group[16 + i]];
      std::memcpy(codes + 8 * i, &eight, sizeof eight);
    }
}

template <unsigned kBits>
void pack(const u8* codes, u8* group) {
  if constexpr (kBits == 4) {
    for (unsigned i = 0; i < 32; ++i) group[i] = static_cast<u8>(codes[i] | (codes[32 + i] << 4));
    return;
  }
  for (unsigned i = 0; i < 16; ++i)
    group[i] = static_cast<u8>((codes[i] & 3U) | ((codes[16 + i] & 3U) << 2) |
                               ((codes[32 + i] & 3U) << 4) | ((codes[48 + i] & 3U) << 6));
  if constexpr (kBits == 3)
    for (unsigned i = 0; i < 8; ++i) {
      unsigned high = 0;
      for (unsigned bit = 0; bit < 8; ++bit) high |= (codes[8 * i + bit] >> 2U) << bit;
      group[16 + i] = static_cast<u8>(high);
    }
}

// 0x80 in the bytes of a word of eight codes that equal `code`. Codes are below 16: nothing
// borrows.
u64 equal_bytes(u64 eight, unsigned code) {
  constexpr u64 kOnes = 0x0101010101010101;
  return (0x80 * kOnes - (eight ^ (code * kOnes))) & (0x80 * kOnes);
}

// Undo one group of n <= 64 codes; returns the escapes consumed.
template <unsigned kBits>
std::size_t unrank_group(const u8* group, unsigned n, const u8* table, const u8* escapes, u8* out) {
  constexpr unsigned kEscape = (1U << kBits) - 1;
  std::array<u8, kGroup> codes;
  unpack<kBits>(group, codes.data());
  for (unsigned i = 0; i < kGroup; ++i) out[i] = table[codes[i]];
  std::size_t used = 0;
  for (unsigned i = 0; i < n; i += 8) {
    u64 eight;
    std::memcpy(&eight, codes.data() + i, sizeof eight);
    u64 escaped = equal_bytes(eight, kEscape);
    if (n - i < 8) escaped &= (u64{1} << (8 * (n - i))) - 1;
    for (; escaped != 0; escaped &= escaped - 1)
      out[i + static_cast<unsigned>(std::countr_zero(escaped)) / 8] = escapes[used++];
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

u16 merged(u8 sign_mantissa, u8 exponent) {
  const unsigned rotated = (static_cast<unsigned>(exponent) << 8) | sign_mantissa;
  return static_cast<u16>((rotated >> 1) | (rotated << 15));
}

// Both planes hold a group in lane order (docs/format.md section 6).
void merge_group(const u8* sign_mantissa, const u8* exponents, u16* out) {
  for (unsigned lane = 0; lane < 4; ++lane)
    for (unsigned half = 0; half < 2; ++half)
      for (unsigned i = 0; i < 8; ++i) {
        const unsigned at = 16 * lane + 8 * half + i;
        out[32 * half + 8 * lane + i] = merged(sign_mantissa[at], exponents[at]);
      }
}

void split_group(const u16* words, u8* sign_mantissa, u8* exponents) {
  for (unsigned lane = 0; lane < 4; ++lane)
    for (unsigned half = 0; half < 2; ++half)
      for (unsigned i = 0; i < 8; ++i) {
        const unsigned at = 16 * lane + 8 * half + i, word = words[32 * half + 8 * lane + i];
        sign_mantissa[at] = static_cast<u8>((word << 1) | (word >> 15));
        exponents[at] = static_cast<u8>(word >> 7);
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
        split_group(from, sign_mantissa, exponents);
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
    std::array<u8, kGroup> group{};
    for (unsigned k = 0; k < left; ++k) {
      group[k] = code_of[values[i + k]];
      escapes[escaped] = values[i + k];
      escaped += group[k] == kEscape;
    }
    pack<kBits>(group.data(), codes);
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
