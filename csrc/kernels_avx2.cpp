// The kernels for AVX2 with BMI2: a group of 64 weights is two vectors.
#include "lookup_avx2.h"

namespace zipmoe {
namespace {

// Exponents that are read before they are merged: four rows of 512, in the first cache.
constexpr u32 kStripColumns = 512;

ZIPMOE_INLINE __m128i load64(const u8* from) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
}

// Shuffles of 8 bytes, by a mask of the bytes concerned: those are moved together.
struct Shuffles {
  alignas(64) u8 compress[256][8];
};

constexpr Shuffles make_shuffles() {
  Shuffles shuffles{};
  for (unsigned mask = 0; mask < 256; ++mask) {
    unsigned set = 0;
    for (unsigned bit = 0; bit < 8; ++bit)
      if (((mask >> bit) & 1U) != 0) shuffles.compress[mask][set++] = static_cast<u8>(bit);
    for (; set < 8; ++set) shuffles.compress[mask][set] = 0x80;
  }
  return shuffles;
}

constexpr Shuffles kShuffles = make_shuffles();

template <unsigned kBits>
std::size_t unrank(const u8* codes, std::size_t n, const u8* table, const u8* escapes, u8* out) {
  ExponentReader<kBits> exponents(codes, table, escapes);
  for (std::size_t i = 0; i < n; i += kGroup)
    exponents.one(out + i, static_cast<unsigned>(n - i < kGroup ? n - i : kGroup));
  return exponents.used();
}

template <bool kStream>
ZIPMOE_INLINE void store_rotated(__m256i interleaved, u16* out) {
  const __m256i words =
      _mm256_or_si256(_mm256_srli_epi16(interleaved, 1), _mm256_slli_epi16(interleaved, 15));
  if constexpr (kStream)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), words);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
}

// BF16 words of a group. Interleaved, a weight reads EEEEEEEE MMMMMMM S: one rotation is missing.
template <bool kStream>
ZIPMOE_INLINE void store_merged(const u8* sign_mantissa, const u8* exponents, u16* out) {
  const __m256i low = load256(sign_mantissa), high = load256(sign_mantissa + 32);
  const __m256i low_exponents = load256(exponents), high_exponents = load256(exponents + 32);
  store_rotated<kStream>(_mm256_unpacklo_epi8(low, low_exponents), out);
  store_rotated<kStream>(_mm256_unpacklo_epi8(high, high_exponents), out + 16);
  store_rotated<kStream>(_mm256_unpackhi_epi8(low, low_exponents), out + 32);
  store_rotated<kStream>(_mm256_unpackhi_epi8(high, high_exponents), out + 48);
}

// The groups of some columns of four rows, in the order of the format.
template <bool kStream>
ZIPMOE_INLINE void merge_columns(const u8* sign_mantissa, const u8* exponents, u32 columns,
                                 u16* out, std::ptrdiff_t stride) {
  for (u32 column = 0; column < columns; column += kGroup)
    for (unsigned k = 0; k < 4; ++k, sign_mantissa += kGroup, exponents += kGroup)
      store_merged<kStream>(sign_mantissa, exponents, out + k * stride + column);
}

template <unsigned kBits, bool kStream>
std::size_t merge_block(const CodedBlock& block, const BlockTarget& target) {
  alignas(64) u8 strip[4 * kStripColumns + kVectorSlack];
  ExponentReader<kBits> exponents(block.codes, block.table, block.escapes);
  const u8* sign_mantissa = block.sign_mantissa;
  u16* panel = target.out;
  for (u32 row = 0; row < target.height; row += 4, panel += 4 * target.stride)
    for (u32 column = 0; column < target.width; column += kStripColumns) {
      const u32 rest = target.width - column;
      const u32 columns = rest < kStripColumns ? rest : kStripColumns;
      for (u32 i = 0; i < columns; i += kGroup) exponents.four(strip + 4 * i);
      merge_columns<kStream>(sign_mantissa, strip, columns, panel + column, target.stride);
      sign_mantissa += 4 * columns;
    }
  return exponents.used();
}

template <unsigned kBits>
std::size_t merge(const CodedBlock& block, const BlockTarget& target) {
  return target.stream ? merge_block<kBits, true>(block, target)
                       : merge_block<kBits, false>(block, target);
}

template <bool kStream>
void merge8_block(const u8* sign_mantissa, const u8* exponents, const BlockTarget& target) {
  u16* panel = target.out;
  for (u32 row = 0; row < target.height; row += 4, panel += 4 * target.stride) {
    merge_columns<kStream>(sign_mantissa, exponents, target.width, panel, target.stride);
    sign_mantissa += 4 * std::size_t{target.width};
    exponents += 4 * std::size_t{target.width};
  }
}

void merge8(const u8* sign_mantissa, const u8* exponents, const BlockTarget& target) {
  if (target.stream)
    merge8_block<true>(sign_mantissa, exponents, target);
  else
    merge8_block<false>(sign_mantissa, exponents, target);
}

void fence() { _mm_sfence(); }

ZIPMOE_INLINE __m256i load_rotated(const u16* from) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_or_si256(_mm256_slli_epi16(words, 1), _mm256_srli_epi16(words, 15));
}

// Both planes of 32 weights: words 0..15 and 32..47 of a group, or 16..31 and 48..63.
ZIPMOE_INLINE void split_half(__m256i first, __m256i second, u8* sign_mantissa, u8* exponents) {
  const __m256i low_byte = _mm256_set1_epi16(0xFF);
  store256(sign_mantissa, _mm256_packus_epi16(_mm256_and_si256(first, low_byte),
                                              _mm256_and_si256(second, low_byte)));
  store256(exponents,
           _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8)));
}

void split(const u16* words, std::ptrdiff_t stride, u32 height, u32 width, u8* sign_mantissa,
           u8* exponents) {
  for (u32 panel = 0; panel < height; panel += 4, words += 4 * stride)
    for (u32 column = 0; column < width; column += kGroup) {
      const u16* from = words + column;
      for (unsigned k = 0; k < 4; ++k, from += stride) {
        split_half(load_rotated(from), load_rotated(from + 32), sign_mantissa, exponents);
        split_half(load_rotated(from + 16), load_rotated(from + 48), sign_mantissa + 32,
                   exponents + 32);
        sign_mantissa += kGroup;
        exponents += kGroup;
      }
    }
}

// Codes below 4 into a 2-bit group.
ZIPMOE_INLINE void pack2(Pair codes, u8* out) {
  const __m256i low = _mm256_sllv_epi32(codes.low, _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0));
  const __m256i high = _mm256_sllv_epi32(codes.high, _mm256_set_epi32(6, 6, 6, 6, 4, 4, 4, 4));
  const __m256i both = _mm256_or_si256(low, high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_or_si128(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
}

template <unsigned kBits>
ZIPMOE_INLINE void pack(Pair codes, u8* out) {
  if constexpr (kBits == 2) {
    pack2(codes, out);
  } else if constexpr (kBits == 3) {
    const __m256i three = _mm256_set1_epi8(3);
    pack2({_mm256_and_si256(codes.low, three), _mm256_and_si256(codes.high, three)}, out);
    const u64 high = mask_of(_mm256_slli_epi16(codes.low, 5), _mm256_slli_epi16(codes.high, 5));
    __builtin_memcpy(out + 16, &high, sizeof high);
  } else {
    store256(out, _mm256_or_si256(codes.low, _mm256_slli_epi16(codes.high, 4)));
  }
}

// 0xFF for the first n < 64 bytes of a group, else 0.
Pair first_bytes(std::size_t n) {
  alignas(64) static constexpr struct {
    u64 ones[8] = {~u64{0}, ~u64{0}, ~u64{0}, ~u64{0}, ~u64{0}, ~u64{0}, ~u64{0}, ~u64{0}};
    u64 zeros[8] = {};
  } kEdge;
  const u8* from = reinterpret_cast<const u8*>(&kEdge) + kGroup - n;
  return {load256(from), load256(from + 32)};
}

// Escape minus the code of each value: 0 where it has none. A few compares beat a 256-byte lookup.
template <unsigned kBits>
ZIPMOE_INLINE __m256i distance_to_escape(__m256i values, const u8* table) {
  constexpr int kEscape = (1 << kBits) - 1;
  __m256i distance = _mm256_setzero_si256();
#pragma GCC unroll 16
  for (int code = 0; code < kEscape; ++code) {
    const __m256i entry = _mm256_set1_epi8(static_cast<char>(table[code]));
    const __m256i step = _mm256_set1_epi8(static_cast<char>(kEscape - code));
    distance = _mm256_or_si256(distance, _mm256_and_si256(_mm256_cmpeq_epi8(values, entry), step));
  }
  return distance;
}

// Moves the masked bytes of a group to `out`; returns their number.
ZIPMOE_INLINE std::size_t compress(const u8* values, u64 mask, u8* out) {
#pragma GCC unroll 8
  for (unsigned k = 0; k < kGroup; k += 8) {
    const __m128i moved =
        _mm_shuffle_epi8(load64(values + k), load64(kShuffles.compress[(mask >> k) & 255]));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + bits_below(mask, k)), moved);
  }
  return static_cast<std::size_t>(_mm_popcnt_u64(mask));
}

template <unsigned kBits>
std::size_t rank(const u8* values, std::size_t n, const u8* table, u8* codes, u8* escapes) {
  const __m256i escape = _mm256_set1_epi8((1 << kBits) - 1), zero = _mm256_setzero_si256();
  std::size_t escaped = 0;
  for (std::size_t i = 0; i < n; i += kGroup, codes += kGroupBytes<kBits>) {
    const Pair distance{distance_to_escape<kBits>(load256(values + i), table),
                        distance_to_escape<kBits>(load256(values + i + 32), table)};
    Pair coded{_mm256_sub_epi8(escape, distance.low), _mm256_sub_epi8(escape, distance.high)};
    u64 is_escape =
        mask_of(_mm256_cmpeq_epi8(distance.low, zero), _mm256_cmpeq_epi8(distance.high, zero));
    if (n - i < kGroup) {
      const Pair used = first_bytes(n - i);
      coded = {_mm256_and_si256(coded.low, used.low), _mm256_and_si256(coded.high, used.high)};
      is_escape = _bzhi_u64(is_escape, static_cast<unsigned>(n - i));
    }
    pack<kBits>(coded, codes);
    if (kBits == 4 && __builtin_expect(is_escape == 0, 1)) continue;
    escaped += compress(values + i, is_escape, escapes + escaped);
  }
  return escaped;
}

}  // namespace

const Kernels kAvx2Kernels{
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
