// Exponents of groups of codes, for kernels with AVX2 and BMI. Internal linkage: each file that
// includes it is compiled with its own flags.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace zipmoe {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr std::size_t kGroup = 64;

// The compiler's own threshold leaves the inner loop's parts as calls: half the speed.
#define ZIPMOE_INLINE [[gnu::always_inline]] inline

template <unsigned kBits>
constexpr std::size_t kGroupBytes = kBits * kGroup / 8;

// A group's 64 bytes.
struct Pair {
  __m256i low, high;
};

ZIPMOE_INLINE __m128i load128(const u8* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
ZIPMOE_INLINE __m256i load256(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
ZIPMOE_INLINE void store256(u8* to, __m256i bytes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
}

ZIPMOE_INLINE void store_pair(u8* to, Pair bytes) {
  store256(to, bytes.low);
  store256(to + 32, bytes.high);
}

ZIPMOE_INLINE u64 mask_of(__m256i low, __m256i high) {
  return static_cast<u32>(_mm256_movemask_epi8(low)) |
         (static_cast<u64>(static_cast<u32>(_mm256_movemask_epi8(high))) << 32);
}

ZIPMOE_INLINE unsigned bits_below(u64 mask, unsigned bit) {
  return static_cast<unsigned>(_mm_popcnt_u64(_bzhi_u64(mask, bit)));
}

// Exponents of one group of codes; escapes show the table's last entry, which no other code has.
template <unsigned kBits>
class Lookup;

// vpshufb reads four index bits: with two codes in them, each half of the table is repeated over
// the code that it does not mean. So one shift and one mask serve all four codes of a byte.
template <>
class Lookup<2> {
 public:
  explicit Lookup(const u8* table) {
    alignas(32) u8 entries[32];
    for (unsigned i = 0; i < 16; ++i) {
      entries[i] = table[i & 3];
      entries[16 + i] = table[i >> 2];
    }
    table_ = load256(entries);
  }
  ZIPMOE_INLINE Pair operator()(const u8* group) const {
    const __m256i bytes = _mm256_broadcastsi128_si256(load128(group));
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_shuffle_epi8(table_, _mm256_and_si256(bytes, mask)),
            _mm256_shuffle_epi8(table_, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask))};
  }

 private:
  __m256i table_;
};

// An index is the low two bits of a code, moved up by two, and 1, 2 or 3 where the high one is set.
template <>
class Lookup<3> {
 public:
  explicit Lookup(const u8* table) {
    alignas(16) u8 entries[16];
    for (unsigned i = 0; i < 16; ++i) entries[i] = table[(i >> 2) + ((i & 3) != 0 ? 4 : 0)];
    table_ = _mm256_broadcastsi128_si256(load128(entries));
  }
  ZIPMOE_INLINE Pair operator()(const u8* group) const {
    const __m256i mask = _mm256_set1_epi8(12);
    const __m256i low = _mm256_sllv_epi32(_mm256_broadcastsi128_si256(load128(group)),
                                          _mm256_set_epi32(0, 0, 0, 0, 2, 2, 2, 2));
    long long bits;
    __builtin_memcpy(&bits, group + 16, sizeof bits);
    const __m256i high = _mm256_set1_epi64x(bits);
    return {_mm256_shuffle_epi8(table_,
                                _mm256_or_si256(_mm256_and_si256(low, mask), up_to_three<0>(high))),
            _mm256_shuffle_epi8(table_,
                                _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 4), mask),
                                                up_to_three<4>(high)))};
  }

 private:
  // Not 0 where the bit is set, from byte kFirst of every eight on.
  template <char kFirst>
  ZIPMOE_INLINE static __m256i up_to_three(__m256i bits) {
    constexpr long long kEach = 0x0101010101010101;
    const __m256i spread = _mm256_set_epi64x((kFirst + 3) * kEach, (kFirst + 2) * kEach,
                                             (kFirst + 1) * kEach, kFirst * kEach);
    const __m256i single = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
    const __m256i set = _mm256_and_si256(_mm256_shuffle_epi8(bits, spread), single);
    return _mm256_min_epu8(set, _mm256_set1_epi8(3));
  }
  __m256i table_;
};

template <>
class Lookup<4> {
 public:
  explicit Lookup(const u8* table) : table_(_mm256_broadcastsi128_si256(load128(table))) {}
  ZIPMOE_INLINE static Pair codes(const u8* group) {
    const __m256i bytes = load256(group), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask)};
  }
  ZIPMOE_INLINE Pair operator()(Pair codes) const {
    return {_mm256_shuffle_epi8(table_, codes.low), _mm256_shuffle_epi8(table_, codes.high)};
  }

 private:
  __m256i table_;
};

// In each 16 bytes: how many bytes before this one, and itself, are 0xFF, less one.
ZIPMOE_INLINE __m256i places(__m256i marked) {
  __m256i sums = _mm256_add_epi8(marked, _mm256_slli_si256(marked, 1));
  sums = _mm256_add_epi8(sums, _mm256_slli_si256(sums, 2));
  sums = _mm256_add_epi8(sums, _mm256_slli_si256(sums, 4));
  sums = _mm256_add_epi8(sums, _mm256_slli_si256(sums, 8));
  return _mm256_xor_si256(sums, _mm256_set1_epi8(-1));
}

ZIPMOE_INLINE __m256i load_both(const u8* low, const u8* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(low)), load128(high), 1);
}

// Reads the exponents of a block, or of a level of codes. AVX2 has no expand, and pdep is very slow
// on the older processors that have nothing better than AVX2: escapes are counted within 16 bytes
// and shuffled there, or, where they are few, stored one by one.
template <unsigned kBits>
class ExponentReader {
 public:
  ExponentReader(const u8* codes, const u8* table, const u8* escapes)
      : look_up_(table),
        mark_(_mm256_set1_epi8(static_cast<char>(table[(1U << kBits) - 1]))),
        codes_(codes),
        escapes_(escapes),
        next_(escapes) {}

  // The next group, escapes only among its first `used` codes; one byte behind it may be touched.
  ZIPMOE_INLINE void one(u8* out, unsigned used = kGroup) {
    const Pair found = look_up_(codes_);
    codes_ += kGroupBytes<kBits>;
    const Pair marked{_mm256_cmpeq_epi8(found.low, mark_), _mm256_cmpeq_epi8(found.high, mark_)};
    const u64 mask = mask_of(marked.low, marked.high);
    if constexpr (kBits == 2) {
      store_pair(out, insert_many(found, marked, mask));
      next_ += bits_below(mask, used);
    } else {
      store_pair(out, found);
      insert_few(_bzhi_u64(mask, used), out);
    }
  }
  // The next four groups.
  ZIPMOE_INLINE void four(u8* out) {
#pragma GCC unroll 4
    for (unsigned k = 0; k < 4; ++k) one(out + k * kGroup);
  }
  // How many escapes were consumed.
  std::size_t used() const { return static_cast<std::size_t>(next_ - escapes_); }

 private:
  ZIPMOE_INLINE Pair insert_many(Pair found, Pair marked, u64 mask) const {
    const __m256i low = load_both(next_, next_ + bits_below(mask, 16));
    const __m256i high = load_both(next_ + bits_below(mask, 32), next_ + bits_below(mask, 48));
    return {_mm256_blendv_epi8(found.low, _mm256_shuffle_epi8(low, places(marked.low)), marked.low),
            _mm256_blendv_epi8(found.high, _mm256_shuffle_epi8(high, places(marked.high)),
                               marked.high)};
  }
  // The first four without a branch: where there are fewer, the rest goes behind the group.
  ZIPMOE_INLINE void insert_few(u64 mask, u8* out) {
    constexpr unsigned kFew = 4;
    const u8* more = next_ + kFew;
    next_ += _mm_popcnt_u64(mask);
#pragma GCC unroll 4
    for (unsigned i = 0; i < kFew; ++i, mask = _blsr_u64(mask))
      out[_tzcnt_u64(mask)] = (more - kFew)[i];
    for (; __builtin_expect(mask != 0, 0); mask = _blsr_u64(mask)) out[_tzcnt_u64(mask)] = *more++;
  }

  Lookup<kBits> look_up_;
  __m256i mark_;
  const u8* codes_;
  const u8* escapes_;
  const u8* next_;
};

// With 4 bits hardly four groups have an escape: one branch for all of them.
template <>
class ExponentReader<4> {
 public:
  ExponentReader(const u8* codes, const u8* table, const u8* escapes)
      : look_up_(table), codes_(codes), escapes_(escapes), next_(escapes) {}
  ZIPMOE_INLINE void four(u8* out) {
    const __m256i escape = _mm256_set1_epi8(15);
    __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (unsigned k = 0; k < 4; ++k) {
      const Pair codes = look_up_.codes(codes_ + k * kGroupBytes<4>);
      store_pair(out + k * kGroup, look_up_(codes));
      largest = _mm256_max_epu8(largest, _mm256_max_epu8(codes.low, codes.high));
    }
    if (__builtin_expect(_mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, escape)) != 0, 0))
      for (unsigned k = 0; k < 4; ++k) {
        const Pair codes = look_up_.codes(codes_ + k * kGroupBytes<4>);
        u64 mask =
            mask_of(_mm256_cmpeq_epi8(codes.low, escape), _mm256_cmpeq_epi8(codes.high, escape));
        for (; mask != 0; mask = _blsr_u64(mask)) out[k * kGroup + _tzcnt_u64(mask)] = *next_++;
      }
    codes_ += 4 * kGroupBytes<4>;
  }
  std::size_t used() const { return static_cast<std::size_t>(next_ - escapes_); }

 private:
  Lookup<4> look_up_;
  const u8* codes_;
  const u8* escapes_;
  const u8* next_;
};

}  // namespace
}  // namespace zipmoe
