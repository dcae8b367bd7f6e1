// The rank codecs rank223, rank3 and rank4: docs/format.md section 7.2.
#pragma once
#include "codec.h"
#include "geometry.h"
#include "kernels.h"

namespace zipmoe {

// Extents as decode() checked them: extent 0 holds exactly grid.weights() bytes.
void decode_rank(Codec codec, const Grid& grid, const Extents& extents, const Target& target,
                 const Kernels& kernels, unsigned threads);

// One block of a rank codec to BF16. Returns how many escapes were consumed.
std::size_t merge(Codec codec, const CodedBlock& block, const BlockTarget& target,
                  const Kernels& kernels);

// Fills both planes. Throws std::length_error where the variable part exceeds 4 GiB.
void encode_rank(const Source& source, const Grid& grid, const Kernels& kernels, unsigned threads,
                 Encoded& encoded);

}  // namespace zipmoe
