// The scale of a group of weights, and the integers under it.
#pragma once
#include <cstdint>
#include <span>

namespace zipmoe {

// The BF16 scale under which integers of so many bits come nearest to the weights, which must be
// finite. For 8 bits: the largest magnitude over 127. For 4 and 2 bits the best of a fixed list:
// starts at parts of the largest magnitude, each improved by least squares once. 0 where all
// weights are 0 or too small for a scale. The same on every machine.
std::uint16_t choose_scale(std::span<const float> weights, unsigned bits);

// The nearest of the integers that codes of so many bits stand for; a scale of 0 gives the one
// whose code is 0.
void to_integers(std::span<const float> weights, unsigned bits, std::uint16_t scale,
                 std::int8_t* out);

}  // namespace zipmoe
