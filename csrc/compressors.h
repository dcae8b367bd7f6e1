// zstd and LZ4 behind one face: bytes in, bytes out.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "codec.h"

namespace zipmoe {

// Largest output for `bytes` of input.
std::size_t compressed_bound(Codec codec, std::size_t bytes);
// Returns the length written to `out` (of compressed_bound bytes). Throws std::runtime_error.
std::size_t compress(Codec codec, std::span<const std::uint8_t> in, std::span<std::uint8_t> out);
// True where `in` decompresses to exactly out.size() bytes. Never reads or writes beyond the spans.
bool decompress(Codec codec, std::span<const std::uint8_t> in, std::span<std::uint8_t> out);

}  // namespace zipmoe
