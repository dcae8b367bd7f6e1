#include "integer_scale.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "scalar.h"

namespace zipmoe {
namespace {

// Four weights at a time, in the compiler's own vectors: the same operations, in the same order, on
// every machine.
using Floats = float __attribute__((vector_size(16)));
using Ints = std::int32_t __attribute__((vector_size(16)));
constexpr std::size_t kLanes = 4;

Floats all(float value) { return Floats{value, value, value, value}; }

constexpr float largest(unsigned bits) { return bits == 8 ? 127.0F : bits == 4 ? 7.0F : 3.0F; }

// To nearest, ties to even; |x| < 2^22.
Floats nearest(Floats x) {
  const Floats round = all(12582912.0F);  // 1.5 * 2^23
  return (x + round) - round;
}

Floats bounded(Floats x, float most) {
  const Floats below = x > all(most) ? all(most) : x;
  return below < all(-most) ? all(-most) : below;
}

// Those of 2 bits are odd, and lie between the even ones: the nearest to x is one above twice the
// floor of x / 2.
template <unsigned kBits>
Floats integers_of(Floats x) {
  const Floats inside = bounded(x, largest(kBits));
  if constexpr (kBits != 2) return nearest(inside);
  const Floats half = all(0.5F) * inside;
  const Floats rounded = nearest(half);
  const Floats floor = rounded - (rounded > half ? all(1.0F) : all(0.0F));
  return all(2.0F) * floor + all(1.0F);
}

struct Fit {
  float error = 0;          // squared, of all weights
  float least_squares = 0;  // the best scale for the same integers
};

float total(Floats sums) { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }

template <unsigned kBits>
Fit fit(std::span<const float> weights, float scale) {
  Floats errors{}, products{}, squares{};
  const auto add = [&](Floats weight, Ints counts) {
    const Floats q = integers_of<kBits>(weight / all(scale));
    const Floats missed = weight - q * all(scale);
    errors += counts ? missed * missed : Floats{};
    products += counts ? weight * q : Floats{};
    squares += counts ? q * q : Floats{};
  };
  std::size_t i = 0;
  Floats four{};
  for (; i + kLanes <= weights.size(); i += kLanes) {
    std::memcpy(&four, weights.data() + i, sizeof four);
    add(four, Ints{-1, -1, -1, -1});
  }
  if (const std::size_t rest = weights.size() - i; rest != 0) {
    four = Floats{};
    std::memcpy(&four, weights.data() + i, rest * sizeof(float));
    add(four, Ints{-1, rest > 1 ? -1 : 0, rest > 2 ? -1 : 0, 0});
  }
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
  for (std::size_t i = 0; i < weights.size(); i += kLanes) {
    const std::size_t count = std::min(kLanes, weights.size() - i);
    Floats four{};
    std::memcpy(&four, weights.data() + i, count * sizeof(float));
    const Floats found = integers_of<kBits>(four / all(scale));
    for (std::size_t k = 0; k < count; ++k) out[i + k] = static_cast<std::int8_t>(found[k]);
  }
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
    std::fill_n(out, weights.size(), static_cast<std::int8_t>(bits == 2 ? 1 : 0));
    return;
  }
  if (bits == 8) return integers<8>(weights, from_bf16(scale), out);
  if (bits == 4) return integers<4>(weights, from_bf16(scale), out);
  integers<2>(weights, from_bf16(scale), out);
}

}  // namespace zipmoe
