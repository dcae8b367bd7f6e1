// Products of integer codes for AVX-512: codes become BF16 words in registers. Internal linkage:
// each file that includes it has its own flags.
#pragma once
#include "dot_tile_avx512.h"
#include "integer_codes.h"

namespace zipmoe {
namespace {

// The BF16 word of an integer of at most eight bits: exact.
constexpr std::uint16_t word_of(int integer) {
  return static_cast<std::uint16_t>(
      __builtin_bit_cast(std::uint32_t, static_cast<float>(integer)) >> 16);
}

// Words of a chunk: of each of four rows the first 32 weights and the others.
struct ChunkWords {
  __m512i first[kChunkRows], second[kChunkRows];
};

// vpermw reads five index bits: the table is repeated over the bits above the code, so that what
// the shifts leave there does not matter.
template <unsigned kBits>
class IntegerLookup {
 public:
  IntegerLookup() {
    alignas(64) u16 words[32];
    constexpr int kCodes = 1 << kBits;
    for (int i = 0; i < 32; ++i) {
      const int code = i % kCodes, integer = code < kCodes / 2 ? code : code - kCodes;
      words[i] = word_of(kBits == 2 ? 2 * integer + 1 : integer);
    }
    table_ = _mm512_load_si512(words);
  }
  [[gnu::always_inline]] ChunkWords operator()(const u8* chunk) const {
    constexpr unsigned kUnits = kBits * 4 / 8, kRows = kChunkRows / kUnits;
    ChunkWords words;
#pragma GCC unroll 2
    for (unsigned unit = 0; unit < kUnits; ++unit) {
      const __m512i codes = _mm512_loadu_si512(chunk + 64 * unit);
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r) {
        words.first[unit * kRows + r] = look_up(codes, 2 * r * kBits);
        words.second[unit * kRows + r] = look_up(codes, (2 * r + 1) * kBits);
      }
    }
    return words;
  }

 private:
  [[gnu::always_inline]] __m512i look_up(__m512i codes, unsigned shift) const {
    return _mm512_permutexvar_epi16(shift == 0 ? codes : _mm512_srli_epi16(codes, shift), table_);
  }
  __m512i table_;
};

// The magnitude's word, byte by byte from tables of 128, and the sign.
template <>
class IntegerLookup<8> {
 public:
  IntegerLookup() {
    alignas(64) u8 low[128], high[128];
    for (int i = 0; i < 128; ++i) {
      low[i] = static_cast<u8>(word_of(i));
      high[i] = static_cast<u8>(word_of(i) >> 8);
    }
    low_[0] = _mm512_load_si512(low);
    low_[1] = _mm512_load_si512(low + 64);
    high_[0] = _mm512_load_si512(high);
    high_[1] = _mm512_load_si512(high + 64);
  }
  [[gnu::always_inline]] ChunkWords operator()(const u8* chunk) const {
    ChunkWords words;
#pragma GCC unroll 4
    for (unsigned r = 0; r < kChunkRows; ++r) {
      const __m512i codes = _mm512_loadu_si512(chunk + 64 * r);
      const __m512i magnitude = _mm512_abs_epi8(codes);
      const __m512i low = _mm512_permutex2var_epi8(low_[0], magnitude, low_[1]);
      const __m512i unsigned_high = _mm512_permutex2var_epi8(high_[0], magnitude, high_[1]);
      constexpr int kOrOfAnd = 0xF8;  // a | (b & c)
      const __m512i high =
          _mm512_ternarylogic_epi32(unsigned_high, codes, _mm512_set1_epi8(-128), kOrOfAnd);
      words.first[r] = _mm512_unpacklo_epi8(low, high);
      words.second[r] = _mm512_unpackhi_epi8(low, high);
    }
    return words;
  }

 private:
  __m512i low_[2], high_[2];
};

// Four BF16 scales, each in all lanes.
[[gnu::always_inline]] inline void broadcast_scales(const u16* from, __m512 (&scales)[kChunkRows]) {
#pragma GCC unroll 2
  for (unsigned pair = 0; pair < 2; ++pair) {
    int both;
    __builtin_memcpy(&both, from + 2 * pair, sizeof both);
    const __m512i words = _mm512_set1_epi32(both);
    scales[2 * pair] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    scales[2 * pair + 1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
  }
}

template <class Multiply, unsigned kBits, unsigned kColumns, bool kScaled>
void integer_block(const IntegerBlock& block, std::uint32_t height, std::uint32_t width,
                   const Columns& x, const Sums& sums) {
  const IntegerLookup<kBits> look_up;
  const u8* chunk = block.codes;
  const u16* scales = block.scales;
  for (std::uint32_t row = 0; row < height; row += kChunkRows) {
    Tile<Multiply, kColumns> tile(sums, row);
    for (std::uint32_t column = 0; column < width; column += kChunkColumns) {
#pragma GCC unroll 4
      for (std::size_t at = 0; at < kChunkBytes<kBits>; at += 64)
        _mm_prefetch(reinterpret_cast<const char*>(chunk + kFetchAhead + at), _MM_HINT_T1);
      const ChunkWords words = look_up(chunk);
      chunk += kChunkBytes<kBits>;
      const u16* values = x.data + column;
      if constexpr (kScaled) {
        __m512 by_row[kChunkRows];
        broadcast_scales(scales, by_row);
        scales += kChunkRows;
        tile.add_scaled(words.first, words.second, by_row, values, x.stride);
      } else {
        tile.add(words.first, values, x.stride);
        tile.add(words.second, values + 32, x.stride);
      }
    }
    tile.store();
  }
}

template <class Multiply, unsigned kBits>
void integers(const IntegerBlock& block, std::uint32_t height, std::uint32_t width,
              const Columns& x, const Sums& sums) {
  using Run = decltype(&integers<Multiply, kBits>);
  static constexpr Run kPlain[kCodedColumns] = {
      integer_block<Multiply, kBits, 1, false>, integer_block<Multiply, kBits, 2, false>,
      integer_block<Multiply, kBits, 3, false>, integer_block<Multiply, kBits, 4, false>};
  static constexpr Run kScaled[kCodedColumns] = {
      integer_block<Multiply, kBits, 1, true>, integer_block<Multiply, kBits, 2, true>,
      integer_block<Multiply, kBits, 3, true>, integer_block<Multiply, kBits, 4, true>};
  (block.scales == nullptr ? kPlain : kScaled)[x.count - 1](block, height, width, x, sums);
}

}  // namespace
}  // namespace zipmoe
