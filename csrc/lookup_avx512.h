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

template <class Word>
Word load(const u8* from) {
  Word word;
  __builtin_memcpy(&word, from, sizeof word);
  return word;
}

inline __m128i load128(const u8* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// Byte i holds the code of byte i in its lowest bits, whatever is above.
inline __m512i codes2(const u8* group) {
  return _mm512_srlv_epi32(_mm512_broadcast_i32x4(load128(group)), lane_shifts());
}

// Exponents of one group of codes; escapes show the table's last entry.
// vpermb reads six index bits: each table is repeated over the bits above the code, so that what
// the shifts leave there does not matter and need not be masked off. Shifts by lane, not
// vpmultishiftqb: Zen 4 runs that one where the products run.
template <unsigned kBits>
class Lookup;

template <>
class Lookup<2> {
 public:
  explicit Lookup(const u8* table) : table_(_mm512_set1_epi32(load<int>(table))) {}
  __m512i operator()(const u8* group) const {
    return _mm512_permutexvar_epi8(codes2(group), table_);
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
    const __m512i codes = codes2(group);
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

// Walks through the first level of a block, chunk by chunk: a group of each of four rows. Codes are
// looked up a chunk before they are needed, and one chunk beyond the block is read: from its lookup
// to the product a group is on its way for longer than a processor looks ahead by itself.
// kBranch: groups without an escape are not expanded. With 4 bits hardly one has any, and a branch
// is cheaper; with fewer it is not.
template <unsigned kBits, bool kBranch = kBits == 4>
class GroupReader {
 public:
  explicit GroupReader(const CodedBlock& block)
      : look_up_(block.table),
        mark_(escape_mark<kBits>(block.table)),
        codes_(block.codes),
        sign_mantissa_(block.sign_mantissa),
        escapes_(block.escapes),
        next_(block.escapes) {
#pragma GCC unroll 4
    for (unsigned row = 0; row < kChunkRows; ++row) look_ahead(row);
  }

  // The rows of a chunk are to be taken in order.
  [[gnu::always_inline]] Words next(unsigned row) {
    __m512i exponents = ahead_[row];
    const u64 escaped = _cvtmask64_u64(escaped_[row]);
    if (!kBranch || __builtin_expect(escaped != 0, 0)) {
      exponents = _mm512_mask_expand_epi8(exponents, escaped_[row], _mm512_loadu_si512(next_));
      next_ += _mm_popcnt_u64(escaped);
    }
    look_ahead(row);
    const Words words = merge_words(_mm512_loadu_si512(sign_mantissa_), exponents);
    sign_mantissa_ += kGroup;
    return words;
  }
  // Has memory bring a chunk that is needed later into the second cache: the first one has too few
  // places for lines on their way, and the core is busy computing when it should ask for them.
  [[gnu::always_inline]] void fetch_ahead() const {
#pragma GCC unroll 4
    for (std::size_t at = 0; at < kChunkRows * kGroup; at += kLine)
      fetch_line(sign_mantissa_ + kFetchAhead + at);
#pragma GCC unroll 2
    for (std::size_t at = 0; at < kChunkRows * kGroupBytes<kBits>; at += kLine)
      fetch_line(codes_ + kFetchAhead + at);
  }
  // How many escapes were consumed.
  std::size_t used() const { return static_cast<std::size_t>(next_ - escapes_); }

 private:
  static constexpr unsigned kChunkRows = 4;
  static constexpr std::size_t kLine = 64;

  [[gnu::always_inline]] void look_ahead(unsigned row) {
    ahead_[row] = look_up_(codes_);
    escaped_[row] = _mm512_cmpeq_epi8_mask(ahead_[row], mark_);
    codes_ += kGroupBytes<kBits>;
  }
  static void fetch_line(const u8* from) {
    _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1);
  }

  Lookup<kBits> look_up_;
  __m512i mark_;
  const u8* codes_;
  const u8* sign_mantissa_;
  const u8* escapes_;
  const u8* next_;
  __m512i ahead_[kChunkRows];
  __mmask64 escaped_[kChunkRows];
};

}  // namespace
}  // namespace zipmoe
