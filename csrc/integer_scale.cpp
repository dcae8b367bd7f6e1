#include "integer_scale.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "scalar.h"

namespace zipmoe {
namespace {

// Sums of a group go to so many partial sums, whatever the compiler makes of them.
constexpr std::size_t kParts = 8;
using Parts = std::array<float, kParts>;

float total(const Parts& parts) {
  return ((parts[0] + parts[4]) + (parts[2] + parts[6])) +
         ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

constexpr float largest(unsigned bits) { return bits == 8 ? 127.0F : bits == 4 ? 15.0F : 3.0F; }

// To nearest, ties to even; |x| < 2^22.
float nearest(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23
  return (x + kRound) - kRound;
}

float bounded(float x, float most) {
  const float below = x > most ? most : x;
  return below < -most ? -most : below;
}

// Odd integers lie between the even ones: the nearest to x is one above twice the floor of x / 2.
template <unsigned kBits>
float integer_of(float x) {
  const float inside = bounded(x, largest(kBits));
  if constexpr (kBits == 8) return nearest(inside);
  const float half = 0.5F * inside;
  const float rounded = nearest(half);
  return bounded(2.0F * (rounded > half ? rounded - 1.0F : rounded) + 1.0F, largest(kBits));
}

struct Fit {
  float error = 0;         // squared, of all weights
  float least_squares = 0;  // the best scale for the same integers
};

template <unsigned kBits>
Fit fit(std::span<const float> weights, float scale) {
  Parts errors{}, products{}, squares{};
  std::size_t i = 0;
  const auto add = [&](std::size_t part) {
    const float weight = weights[i + part];
    const float q = integer_of<kBits>(weight / scale);
    const float missed = weight - q * scale;
    errors[part] += missed * missed;
    products[part] += weight * q;
    squares[part] += q * q;
  };
  for (; i + kParts <= weights.size(); i += kParts)
    for (std::size_t part = 0; part < kParts; ++part) add(part);
  for (std::size_t part = 0; i + part < weights.size(); ++part) add(part);
  return {total(errors), total(products) / total(squares)};
}

// The scale in BF16, and lower where the largest integer would become an infinity.
std::uint16_t rounded_scale(float scale, unsigned bits) {
  std::uint16_t word = to_bf16(scale);
  constexpr std::uint16_t kInfinity = 0x7F80;
  while (to_bf16(largest(bits) * from_bf16(word)) == kInfinity) --word;
  return word;
}

template <unsigned kBits>
std::uint16_t search(std::span<const float> weights, float most) {
  constexpr float kStarts[] = {1.0F, 0.9F, 0.8F, 0.7F, 0.6F, 0.5F, 0.4F, 0.3F};
  // Squares of the smallest weights would vanish, those of the largest overflow: as they are.
  constexpr float kTiny = 1e-15F, kHuge = 1e15F;
  const std::uint16_t plain = rounded_scale(most / largest(kBits), kBits);
  if (most < kTiny || most > kHuge) return plain;
  std::uint16_t best = plain;
  float least = fit<kBits>(weights, from_bf16(plain)).error;
  for (const float start : kStarts) {
    const Fit first = fit<kBits>(weights, start * most / largest(kBits));
    const std::uint16_t word = to_bf16(first.least_squares);
    // Integers that all point the other way: no scale at all.
    if (!(first.least_squares > 0)) continue;
    const float error = fit<kBits>(weights, from_bf16(word)).error;
    if (error < least) {
      least = error;
      best = word;
    }
  }
  return best;
}

template <unsigned kBits>
void integers(std::span<const float> weights, float scale, std::int8_t* out) {
  for (std::size_t i = 0; i < weights.size(); ++i)
    out[i] = static_cast<std::int8_t>(integer_of<kBits>(weights[i] / scale));
}

}  // namespace

std::uint16_t choose_scale(std::span<const float> weights, unsigned bits) {
  float most = 0;
  for (const float weight : weights) most = std::max(most, std::fabs(weight));
  if (most == 0) return 0;
  if (bits == 4) return search<4>(weights, most);
  if (bits == 2) return search<2>(weights, most);
  return rounded_scale(most / largest(bits), bits);
}

void to_integers(std::span<const float> weights, unsigned bits, std::uint16_t scale,
                 std::int8_t* out) {
  if (scale == 0) {
    std::fill_n(out, weights.size(), static_cast<std::int8_t>(bits == 8 ? 0 : 1));
    return;
  }
  if (bits == 8) return integers<8>(weights, from_bf16(scale), out);
  if (bits == 4) return integers<4>(weights, from_bf16(scale), out);
  integers<2>(weights, from_bf16(scale), out);
}

}  // namespace zipmoe
