// BF16 and the exponential, value by value: the same source for every instruction set, left to the
// compiler to vectorise, without contraction (the build says -ffp-contract=off). So the results are
// the same everywhere. Internal linkage: each file that includes it is compiled with its own flags.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zipmoe {
namespace {

inline std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

// To nearest, ties to even; NaN stays NaN.
inline std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  return static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded);
}

inline float from_bf16(std::uint16_t word) { return float_of(std::uint32_t{word} << 16); }

// e to the x within 2 units in the last place, for x <= 88; 0 below -87; NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; a polynomial of degree 6 for e to the r.
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer
  const float bounded = x > 88.0F ? 88.0F : x;
  const float shifted = bounded * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const float r = (bounded - n * 0.693359375F) - n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = (p * r) * r + (r + 1.0F);
  const auto exponent = (bits_of(shifted) - bits_of(kRound)) << 23;
  const float scaled = float_of(bits_of(p) + exponent);
  const float bounded_below = x < -87.0F ? 0.0F : scaled;
  return x != x ? x : bounded_below;
}

// Absolute error below 3e-7.
inline float tanh_of(float x) { return 1.0F - 2.0F / (1.0F + exp_of(2.0F * x)); }

}  // namespace
}  // namespace zipmoe
