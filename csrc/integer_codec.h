// The codecs int8, int4 and int2, which are lossy: docs/format.md section 7.4.
#pragma once
#include <cstdint>
#include <span>

#include "codec.h"
#include "geometry.h"

namespace zipmoe {

// Where the codes and scales of a matrix lie in its two extents.
class IntegerLayout {
 public:
  // Throws CorruptError where extents of these lengths are not those of such a matrix.
  IntegerLayout(Codec codec, const Grid& grid, std::uint64_t codes_bytes,
                std::uint64_t scales_bytes);

  static std::uint64_t codes_bytes(Codec codec, const Grid& grid) {
    return grid.weights() * code_bits(codec) / 8;
  }
  // `scale_group`: weights of a row that share a scale, kGroupWeights, or 0 for the whole row.
  static std::uint64_t scales_bytes(const Grid& grid, std::uint32_t scale_group) {
    const std::uint64_t scales =
        scale_group == 0 ? grid.padded_rows() : grid.weights() / kGroupWeights;
    return scales * sizeof(std::uint16_t);
  }
  [[nodiscard]] std::uint64_t first_code_byte(std::uint64_t first_weight) const {
    return first_weight * bits_ / 8;
  }
  [[nodiscard]] bool has_row_scales() const { return has_row_scales_; }

 private:
  unsigned bits_;
  bool has_row_scales_;
};

// Extents as decode() got them; the grid is not empty.
void decode_integers(Codec codec, const Grid& grid, const Extents& extents, const Target& target,
                     unsigned threads);

// Fills both extents. Throws std::domain_error where a weight is not finite.
void encode_integers(const Source& source, const Grid& grid, const EncodeOptions& options,
                     Encoded& encoded);

}  // namespace zipmoe
