// The codecs zstd and lz4hc, on shards of the exponent plane: docs/format.md section 7.3.
#pragma once
#include "codec.h"
#include "geometry.h"
#include "kernels.h"

namespace zipmoe {

inline constexpr unsigned kMaxShards = 64;

// Extents as decode() checked them: extent 0 holds exactly grid.weights() bytes.
void decode_shards(Codec codec, const Grid& grid, const Extents& extents, const Target& target,
                   const Kernels& kernels, unsigned threads);

// Fills both planes. Throws std::length_error where a shard exceeds 2 GB.
void encode_shards(const Source& source, const Grid& grid, const Kernels& kernels,
                   const EncodeOptions& options, Encoded& encoded);

}  // namespace zipmoe
