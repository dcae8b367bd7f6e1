// XXH3, 64 bits, seed 0: the checksum of every extent.
#pragma once
#include <cstdint>
#include <span>

namespace zipmoe {

std::uint64_t xxh3(std::span<const std::uint8_t> bytes);

}  // namespace zipmoe
