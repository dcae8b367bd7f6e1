// Where the parts of a rank codec's extent 1 lie: docs/format.md section 7.2.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "codec.h"
#include "geometry.h"

namespace zipmoe {

inline constexpr std::uint64_t kSectionAlign = 64;
inline constexpr std::uint64_t kGuardBytes = 64;

struct RankLayout {
  // `codec` is one of the three rank codecs.
  RankLayout(Codec codec, const Grid& grid);

  std::uint32_t code_bits;    // of the first level
  std::uint32_t table_bytes;  // per block
  std::uint64_t tables_at;    // the codes stand at 0
  std::uint64_t offsets_at;
  std::uint64_t variable_at;

  std::uint64_t codes_bytes(std::uint64_t weights) const { return weights / 8 * code_bits; }
};

// Extent 1 of a rank codec whose fixed parts have been checked against its length.
class RankExtent {
 public:
  // Throws CorruptError unless the lengths fit, gaps and guard are zero, and the ends of section 4
  // are as the format says. What a single block says is checked by `variable`.
  RankExtent(std::span<const std::uint8_t> bytes, Codec codec, const Grid& grid);

  const RankLayout& layout() const { return layout_; }
  const std::uint8_t* codes(std::uint64_t first_weight) const {
    return bytes_.data() + layout_.codes_bytes(first_weight);
  }
  const std::uint8_t* table(std::uint64_t block) const {
    return bytes_.data() + layout_.tables_at + block * layout_.table_bytes;
  }
  // The variable part of a block. Throws CorruptError where its offsets are not in order.
  std::span<const std::uint8_t> variable(std::uint64_t block) const;
  // How much of the extent lies behind a part of it.
  std::size_t bytes_behind(std::span<const std::uint8_t> part) const {
    return static_cast<std::size_t>(bytes_.data() + bytes_.size() - (part.data() + part.size()));
  }

 private:
  std::uint64_t offset(std::uint64_t block) const;
  void check_zero(std::uint64_t begin, std::uint64_t end) const;

  std::span<const std::uint8_t> bytes_;
  RankLayout layout_;
  std::uint64_t variable_bytes_ = 0;
};

}  // namespace zipmoe
