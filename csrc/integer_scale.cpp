#include "integer_scale.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "scalar.h"

namespace zipmoe {
namespace {

// A group's weights go to eight partial sums on every machine, in two vectors that each of them
// has: of wider ones the compiler makes single floats where there are none.
constexpr std::size_t kLanes = 4, kParts = 2;
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Parts = std::array<Lanes, kParts>;

float total(const Parts& parts) {
  const Lanes sums = parts[0] + parts[1];
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

constexpr float largest(unsigned bits) { return bits == 8 ? 127.0F : bits == 4 ? 15.0F : 3.0F; }

// What follows is for a float and for lanes of them; results go through references, as how vectors
// are passed depends on the machine. To nearest, ties to even; |x| < 2^22.
template <class Floats>
[[gnu::always_inline]] inline void round(Floats& x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23
  x = (x + kRound) - kRound;
}

template <class Floats>
[[gnu::always_inline]] inline void bound(Floats& x, float most) {
  const Floats high = Floats{} + most, low = Floats{} - most;
  x = x > high ? high : x;
  x = x < low ? low : x;
}

// Odd integers lie between the even ones: the nearest to x is one above twice the floor of x / 2.
template <unsigned kBits, class Floats>
[[gnu::always_inline]] inline void to_integer(Floats& x) {
  bound(x, largest(kBits));
  if constexpr (kBits == 8) {
    round(x);
  } else {
    const Floats half = 0.5F * x;
    Floats rounded = half;
    round(rounded);
    x = 2.0F * (rounded > half ? rounded - 1.0F : rounded) + 1.0F;
    bound(x, largest(kBits));
  }
}

struct Fit {
  float error = 0;          // squared, of all weights
  float least_squares = 0;  // the best scale for the same integers
};

template <unsigned kBits>
Fit fit(std::span<const float> weights, float scale) {
  Parts errors{}, products{}, squares{};
  const auto add = [&](std::size_t part, const Lanes& w, const Lanes& q) {
    const Lanes missed = w - q * scale;
    errors[part] += missed * missed;
    products[part] += w * q;
    squares[part] += q * q;
  };
  std::size_t i = 0;
  for (; i + kParts * kLanes <= weights.size(); i += kParts * kLanes) {
    for (std::size_t part = 0; part < kParts; ++part) {
      Lanes w;
      std::memcpy(&w, weights.data() + i + part * kLanes, sizeof w);
      Lanes q = w / scale;
      to_integer<kBits>(q);
      add(part, w, q);
    }
  }
  for (std::size_t part = 0; i < weights.size(); ++part) {  // lanes of nothing add nothing
    Lanes w{}, q{};
    for (std::size_t lane = 0; lane < kLanes && i < weights.size(); ++lane, ++i) {
      w[lane] = weights[i];
      float integer = weights[i] / scale;
      to_integer<kBits>(integer);
      q[lane] = integer;
    }
    add(part, w, q);
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
  for (std::size_t i = 0; i < weights.size(); ++i) {
    float q = weights[i] / scale;
    to_integer<kBits>(q);
    out[i] = static_cast<std::int8_t>(q);
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
    std::fill_n(out, weights.size(), static_cast<std::int8_t>(bits == 8 ? 0 : 1));
    return;
  }
  if (bits == 8) return integers<8>(weights, from_bf16(scale), out);
  if (bits == 4) return integers<4>(weights, from_bf16(scale), out);
  integers<2>(weights, from_bf16(scale), out);
}

}  // namespace zipmoe
