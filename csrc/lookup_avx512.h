// Exponents of one group of codes, for kernels with AVX-512 VBMI and VBMI2. Internal linkage: each
// file that includes it is compiled with its own flags.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace zipmoe {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u64 = std::uint64_t;

constexpr std::size_t kGroup = 64;

template <unsigned kBits>
constexpr std::size_t kGroupBytes = kBits * kGroup / 8;

template <unsigned kBits>
constexpr std::size_t kTableBytes = std::size_t{1} << kBits;

// Shift of each 16-byte lane by 0, 2, 4, 6 bits: where a 2-bit group holds the lane's codes.
inline __m512i lane_shifts() {
  return _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
}

// The same as bits from which each byte is to be taken.
inline __m512i lane_bits() {
  constexpr long long kBytes = 0x3830282018100800, kTwo = 0x0202020202020202;
  return _mm512_set_epi64(kBytes + 3 * kTwo, kBytes + 3 * kTwo, kBytes + 2 * kTwo,
                          kBytes + 2 * kTwo, kBytes + kTwo, kBytes + kTwo, kBytes, kBytes);
}

template <class Word>
Word load(const u8* from) {
  Word word;
  __builtin_memcpy(&word, from, sizeof word);
  return word;
}

inline __m128i load128(const u8* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// Exponents of one group of codes; escapes show the table's last entry.
// vpermb reads six index bits: each table is repeated over the bits above the code, so that what
// the shifts leave there does not matter and need not be masked off.
template <unsigned kBits>
class Lookup;

template <>
class Lookup<2> {
 public:
  explicit Lookup(const u8* table) : table_(_mm512_set1_epi32(load<int>(table))) {}
  __m512i operator()(const u8* group) const {
    const __m512i codes =
        _mm512_multishift_epi64_epi8(lane_bits(), _mm512_broadcast_i32x4(load128(group)));
    return _mm512_permutexvar_epi8(codes, table_);
  }

 private:
  __m512i table_;
};

template <>
class Lookup<3> {
 public:
  explicit Lookup(const u8* table)
      : low_(_mm512_set1_epi32(load<int>(table))), high_(_mm512_set1_epi32(load<int>(table + 4))) {}
  __m512i operator()(const u8* group) const {
    const __m512i codes =
        _mm512_multishift_epi64_epi8(lane_bits(), _mm512_broadcast_i32x4(load128(group)));
    const __mmask64 is_high = _cvtu64_mask64(load<u64>(group + 16));
    return _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(codes, low_), is_high, codes,
                                        high_);
  }

 private:
  __m512i low_, high_;
};

template <>
class Lookup<4> {
 public:
  explicit Lookup(const u8* table) : table_(_mm512_broadcast_i32x4(load128(table))) {}
  __m512i operator()(const u8* group) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group));
    const __m512i codes =
        _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
    return _mm512_permutexvar_epi8(codes, table_);
  }

 private:
  __m512i table_;
};

template <unsigned kBits>
__m512i escape_mark(const u8* table) {
  return _mm512_set1_epi8(static_cast<char>(table[kTableBytes<kBits> - 1]));
}

// BF16 words of a group. Interleaved, a weight reads EEEEEEEE MMMMMMM S: one rotation is missing.
struct Words {
  __m512i first, second;
};

inline Words merge_words(__m512i sign_mantissa, __m512i exponents) {
  const __m512i low = _mm512_unpacklo_epi8(sign_mantissa, exponents);
  const __m512i high = _mm512_unpackhi_epi8(sign_mantissa, exponents);
  return {_mm512_shrdi_epi16(low, low, 1), _mm512_shrdi_epi16(high, high, 1)};
}

// Walks through the first level of a block, group by group.
template <unsigned kBits>
class GroupReader {
 public:
  explicit GroupReader(const CodedBlock& block)
      : look_up_(block.table),
        mark_(escape_mark<kBits>(block.table)),
        codes_(block.codes),
        sign_mantissa_(block.sign_mantissa),
        escapes_(block.escapes),
        next_(block.escapes) {}

  [[gnu::always_inline]] Words next() {
    __m512i exponents = look_up_(codes_);
    codes_ += kGroupBytes<kBits>;
    const __mmask64 escaped = _mm512_cmpeq_epi8_mask(exponents, mark_);
    // With 4 bits hardly a group has an escape: a branch is cheaper than the expansion.
    if (kBits < 4 || __builtin_expect(_cvtmask64_u64(escaped) != 0, 0)) {
      exponents = _mm512_mask_expand_epi8(exponents, escaped, _mm512_loadu_si512(next_));
      next_ += _mm_popcnt_u64(_cvtmask64_u64(escaped));
    }
    const Words words = merge_words(_mm512_loadu_si512(sign_mantissa_), exponents);
    sign_mantissa_ += kGroup;
    return words;
  }
  // How many escapes were consumed.
  std::size_t used() const { return static_cast<std::size_t>(next_ - escapes_); }

 private:
  Lookup<kBits> look_up_;
  __m512i mark_;
  const u8* codes_;
  const u8* sign_mantissa_;
  const u8* escapes_;
  const u8* next_;
};

}  // namespace
}  // namespace zipmoe
