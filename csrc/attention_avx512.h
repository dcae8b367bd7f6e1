// Attention for AVX-512, with and without vdpbf16ps: `Multiply` says how 32 words of a query and 32
// of keys go into 16 sums. Internal linkage: each file that includes it has its own flags.
#pragma once
#include <immintrin.h>

#include "attention_pointwise.h"
#include "sums_avx512.h"

namespace zipmoe {
namespace {

using u16 = std::uint16_t;
using u32 = std::uint32_t;

// Of the words from k on, those that a row of `width` has.
inline __mmask32 words_mask(u32 width, u32 k) {
  const u32 left = width - k;
  return left >= kWordGroup ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
}

template <class Multiply>
void scores(const u16* query, const HeadRows& keys, float* out) {
  for (u32 j = 0; j < keys.n; j += 16) {
    const u32 here = keys.n - j < 16 ? keys.n - j : 16;
    __m512 sums[16];
#pragma GCC unroll 16
    for (u32 i = 0; i < 16; ++i) {
      sums[i] = _mm512_setzero_ps();
      if (i >= here) continue;
      const u16* key = keys.data + (j + i) * keys.stride;
      for (u32 k = 0; k < keys.width; k += kWordGroup)
        sums[i] = Multiply::add(sums[i], _mm512_loadu_si512(query + k),
                                _mm512_maskz_loadu_epi16(words_mask(keys.width, k), key + k));
    }
    const auto mask = static_cast<__mmask16>((1U << here) - 1);
    _mm512_mask_storeu_ps(out + j, mask, reduce(sums));
  }
}

inline void turn16(const __m512i (&in)[16], u32* out) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (unsigned i = 0; i < 8; ++i) {  // pairs of keys: dwords
    a[2 * i] = _mm512_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (unsigned i = 0; i < 4; ++i) {  // fours of keys: columns c, c + 4, c + 8, c + 12 in a vector
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (unsigned c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);      // columns c, c + 8
    const __m512i low_odd = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xDD);  // c + 4, c + 12
    const __m512i high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xDD);
    _mm512_storeu_si512(out + c * kKeyBlock, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + (c + 8) * kKeyBlock, _mm512_shuffle_i32x4(low, high, 0xDD));
    _mm512_storeu_si512(out + (c + 4) * kKeyBlock, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(out + (c + 12) * kKeyBlock, _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
  }
}

// turned[(pair of words) * kKeyBlock + key]; keys beyond the last are 0.
void turn(const HeadRows& keys, u32* turned) {
  for (u32 k = 0; k < keys.width; k += kWordGroup) {
    const __mmask32 mask = words_mask(keys.width, k);
    for (u32 j = 0; j < kKeyBlock; j += 16) {
      __m512i words[16];
      for (u32 i = 0; i < 16; ++i)
        words[i] = j + i < keys.n
                       ? _mm512_maskz_loadu_epi16(mask, keys.data + (j + i) * keys.stride + k)
                       : _mm512_setzero_si512();
      turn16(words, turned + k / 2 * kKeyBlock + j);
    }
  }
}

// The scores of kRows queries and 2 * 16 turned keys, lanes being keys.
template <class Multiply, unsigned kRows>
class TurnedTile {
 public:
  struct Values {
    __m512 at[kRows][2];
  };
  TurnedTile(const u16* queries, std::ptrdiff_t stride, const u32* turned, u32 width)
      : queries_(queries), stride_(stride), turned_(turned), width_(width) {}

  // The sums kFirst, kFirst + kStep, ... added in halves.
  template <u32 kFirst, u32 kStep>
  [[gnu::always_inline]] Values total() const {
    if constexpr (kStep == kScoreSums) {
      return sum(kFirst);
    } else {
      Values left = total<kFirst, 2 * kStep>();
      const Values right = total<kFirst + kStep, 2 * kStep>();
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (unsigned v = 0; v < 2; ++v)
          left.at[r][v] = _mm512_add_ps(left.at[r][v], right.at[r][v]);
      return left;
    }
  }

 private:
  [[gnu::noinline]] Values sum(u32 i) const {
    Values sums;
#pragma GCC unroll 8
    for (unsigned r = 0; r < kRows; ++r) sums.at[r][0] = sums.at[r][1] = _mm512_setzero_ps();
    for (u32 k = 0; k < width_; k += kWordGroup) {
      const u32* pair = turned_ + (k / 2 + i) * kKeyBlock;
      const __m512i first = _mm512_loadu_si512(pair), second = _mm512_loadu_si512(pair + 16);
#pragma GCC unroll 8
      for (unsigned r = 0; r < kRows; ++r) {
        int words;
        __builtin_memcpy(&words, queries_ + r * stride_ + k + 2 * i, sizeof words);
        const __m512i query = _mm512_set1_epi32(words);
        sums.at[r][0] = Multiply::add(sums.at[r][0], query, first);
        sums.at[r][1] = Multiply::add(sums.at[r][1], query, second);
      }
    }
    return sums;
  }
  const u16* queries_;
  std::ptrdiff_t stride_;
  const u32* turned_;
  u32 width_;
};

template <class Multiply, unsigned kRows>
void turned_rows(const u16* queries, std::ptrdiff_t stride, const u32* turned, u32 width,
                 float* out) {
  for (u32 j = 0; j < kKeyBlock; j += 32) {
    const TurnedTile<Multiply, kRows> tile(queries, stride, turned + j, width);
    const auto sums = tile.template total<0, 1>();
    for (unsigned r = 0; r < kRows; ++r)
      for (unsigned v = 0; v < 2; ++v)
        _mm512_storeu_ps(out + r * kKeyBlock + j + 16 * v, sums.at[r][v]);
  }
}

template <class Multiply>
void turned_scores(const u16* queries, std::ptrdiff_t stride, u32 count, const u32* turned,
                   u32 width, float* out) {
  static constexpr decltype(&turned_rows<Multiply, 1>) kByRows[] = {
      turned_rows<Multiply, 1>, turned_rows<Multiply, 2>, turned_rows<Multiply, 3>,
      turned_rows<Multiply, 4>};
  for (u32 r = 0; r < count; r += 4) {
    const u32 rows = count - r < 4 ? count - r : 4;
    kByRows[rows - 1](queries + r * stride, stride, turned, width, out + r * kKeyBlock);
  }
}

// kGroups groups of words of kRows rows, whose sums are in registers.
template <unsigned kRows, unsigned kGroups>
void add_groups(const float* const* weights, const HeadRows& values, u32 k, float* totals,
                std::ptrdiff_t stride) {
  __m512 sums[kRows][kGroups][2];
  __mmask32 mask[kGroups];
#pragma GCC unroll 4
  for (unsigned g = 0; g < kGroups; ++g) mask[g] = words_mask(values.width, k + g * kWordGroup);
#pragma GCC unroll 4
  for (unsigned r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (unsigned g = 0; g < kGroups; ++g)
#pragma GCC unroll 2
      for (unsigned odd = 0; odd < 2; ++odd)
        sums[r][g][odd] = _mm512_loadu_ps(totals + r * stride + g * kWordGroup + 16 * odd);
  const u16* at = values.data + k;
  for (u32 j = 0; j < values.n; ++j, at += values.stride) {
    __m512 weight[kRows];
#pragma GCC unroll 4
    for (unsigned r = 0; r < kRows; ++r) weight[r] = _mm512_set1_ps(weights[r][j]);
#pragma GCC unroll 4
    for (unsigned g = 0; g < kGroups; ++g) {
      const __m512i words = _mm512_maskz_loadu_epi16(mask[g], at + g * kWordGroup);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
      const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r) {
        sums[r][g][0] = _mm512_fmadd_ps(weight[r], even, sums[r][g][0]);
        sums[r][g][1] = _mm512_fmadd_ps(weight[r], odd, sums[r][g][1]);
      }
    }
  }
#pragma GCC unroll 4
  for (unsigned r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (unsigned g = 0; g < kGroups; ++g)
#pragma GCC unroll 2
      for (unsigned odd = 0; odd < 2; ++odd)
        _mm512_storeu_ps(totals + r * stride + g * kWordGroup + 16 * odd, sums[r][g][odd]);
}

template <unsigned kRows>
void add_rows(const float* const* weights, const HeadRows& values, float* totals,
              std::ptrdiff_t stride) {
  constexpr unsigned kGroups = kRows <= 2 ? 4 : 2;  // as many as registers hold
  const u32 groups = padded_words(values.width) / kWordGroup;
  u32 g = 0;
  for (; g + kGroups <= groups; g += kGroups)
    add_groups<kRows, kGroups>(weights, values, g * kWordGroup, totals + g * kWordGroup, stride);
  for (; g < groups; ++g)
    add_groups<kRows, 1>(weights, values, g * kWordGroup, totals + g * kWordGroup, stride);
}

void add(const float* const* weights, u32 rows, const HeadRows& values, float* totals,
         std::ptrdiff_t stride) {
  static constexpr decltype(&add_rows<1>) kByRows[] = {add_rows<1>, add_rows<2>, add_rows<3>,
                                                       add_rows<4>};
  kByRows[rows - 1](weights, values, totals, stride);
}

template <class Multiply>
constexpr AttentionKernels avx512_attention() {
  return {
      .scores = scores<Multiply>,
      .turn = turn,
      .turned_scores = turned_scores<Multiply>,
      .softmax = softmax_values,
      .add = add,
      .finish = finish_values,
  };
}

}  // namespace
}  // namespace zipmoe
