// Products of integer codes for AVX2: codes become FP32 in registers. Internal linkage: each file
// that includes it has its own flags.
#pragma once
#include "dot_pointwise.h"
#include "integer_codes.h"
#include "sums_avx2.h"

namespace zipmoe {
namespace {

// Of 16 weights, those with even and those with odd numbers.
struct Integers {
  __m256 even, odd;
};

// From codes at the top of their lanes. Those of 2 bits stand for odd integers: they come down to
// twice their values, and what comes with them in the lowest bit does not matter.
template <unsigned kBits>
[[gnu::always_inline]] inline __m256 integers_of(__m256i top) {
  constexpr int kDown = 32 - static_cast<int>(kBits);
  if constexpr (kBits != 2) return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, kDown));
  const __m256i twice = _mm256_srai_epi32(top, kDown - 1);
  return _mm256_cvtepi32_ps(_mm256_or_si256(twice, _mm256_set1_epi32(1)));
}

// The weights of sums 0 to 7 (`half` 0) or 8 to 15 in the first and second 32 weights of a group:
// each 32-bit lane holds codes of an even weight in its low and of an odd one in its high half.
template <unsigned kBits>
[[gnu::always_inline]] inline void read_half(const std::uint8_t* chunk, unsigned row, unsigned half,
                                             Integers (&out)[2]) {
  constexpr unsigned kWordCodes = 16 / kBits;
  const std::uint8_t* unit = chunk + 2 * row / kWordCodes * 64;
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + 32 * half));
#pragma GCC unroll 2
  for (unsigned step = 0; step < 2; ++step) {
    if constexpr (kBits == 8) {
      const __m256i zero = _mm256_setzero_si256();
      const __m256i high =
          step == 0 ? _mm256_unpacklo_epi8(zero, words) : _mm256_unpackhi_epi8(zero, words);
      out[step].even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(high, 16), 24));
      out[step].odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(high, 24));
    } else {
      const int bit = static_cast<int>((2 * row + step) % kWordCodes * kBits);
      constexpr int kTop = 32 - static_cast<int>(kBits);
      out[step].even = integers_of<kBits>(_mm256_slli_epi32(words, kTop - bit));
      out[step].odd = integers_of<kBits>(_mm256_slli_epi32(words, kTop - 16 - bit));
    }
  }
}

[[gnu::always_inline]] inline __m256 add(__m256 sums, const Integers& weights,
                                         const Halves& values) {
  return _mm256_fmadd_ps(weights.odd, values.odd, _mm256_fmadd_ps(weights.even, values.even, sums));
}

// One row of a panel, eight of its 16 sums at a time.
template <unsigned kBits, unsigned kColumns, bool kScaled>
void integer_row(const IntegerBlock& panel, unsigned row, std::uint32_t width, const Columns& x,
                 float* out, std::ptrdiff_t step, bool begin) {
  for (unsigned half = 0; half < 2; ++half) {
    __m256 sums[kColumns];
#pragma GCC unroll 4
    for (unsigned c = 0; c < kColumns; ++c)
      sums[c] = begin ? _mm256_setzero_ps() : _mm256_loadu_ps(out + c * step + 8 * half);
    const std::uint8_t* chunk = panel.codes;
    for (std::uint32_t k = 0; k < width; k += kChunkColumns, chunk += kChunkBytes<kBits>) {
      Integers weights[2];
      read_half<kBits>(chunk, row, half, weights);
      __m256 scale{};
      if constexpr (kScaled) {
        const std::uint32_t word = panel.scales[k / kChunkColumns * kChunkRows + row];
        scale = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word << 16)));
      }
#pragma GCC unroll 4
      for (unsigned c = 0; c < kColumns; ++c) {
        const std::uint16_t* values = x.data + c * x.stride + k + 16 * half;
        const __m256 part = kScaled ? _mm256_setzero_ps() : sums[c];
        const __m256 sum =
            add(add(part, weights[0], Halves(values)), weights[1], Halves(values + 32));
        sums[c] = kScaled ? _mm256_fmadd_ps(scale, sum, sums[c]) : sum;
      }
    }
#pragma GCC unroll 4
    for (unsigned c = 0; c < kColumns; ++c) _mm256_storeu_ps(out + c * step + 8 * half, sums[c]);
  }
}

template <unsigned kBits, unsigned kColumns, bool kScaled>
void integer_block(const IntegerBlock& block, std::uint32_t height, std::uint32_t width,
                   const Columns& x, const Sums& sums) {
  const std::ptrdiff_t step = sums.stride * static_cast<std::ptrdiff_t>(kSums);
  IntegerBlock panel = block;
  float* out = sums.data;
  for (std::uint32_t row = 0; row < height; row += kChunkRows) {
    for (unsigned r = 0; r < kChunkRows; ++r, out += kSums)
      integer_row<kBits, kColumns, kScaled>(panel, r, width, x, out, step, sums.begin);
    panel.codes += width / kChunkColumns * kChunkBytes<kBits>;
    if constexpr (kScaled) panel.scales += width / kChunkColumns * kChunkRows;
  }
}

template <unsigned kBits>
void integers(const IntegerBlock& block, std::uint32_t height, std::uint32_t width,
              const Columns& x, const Sums& sums) {
  static constexpr MultiplyIntegers kPlain[kCodedColumns] = {
      integer_block<kBits, 1, false>, integer_block<kBits, 2, false>,
      integer_block<kBits, 3, false>, integer_block<kBits, 4, false>};
  static constexpr MultiplyIntegers kScaled[kCodedColumns] = {
      integer_block<kBits, 1, true>, integer_block<kBits, 2, true>, integer_block<kBits, 3, true>,
      integer_block<kBits, 4, true>};
  (block.scales == nullptr ? kPlain : kScaled)[x.count - 1](block, height, width, x, sums);
  finish<sum_of>(sums, height, x.count);
}

}  // namespace
}  // namespace zipmoe
