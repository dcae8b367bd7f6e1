#include "rank_layout.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"

namespace zipmoe {

RankLayout::RankLayout(Codec codec, const Grid& grid)
    : code_bits(codec == Codec::rank223 ? 2
                : codec == Codec::rank3 ? 3
                                        : 4),
      table_bytes(codec == Codec::rank3 ? 8 : 16),
      tables_at(ceil_to(codes_bytes(grid.weights()), kSectionAlign)),
      offsets_at(ceil_to(tables_at + table_bytes * grid.blocks(), kSectionAlign)),
      variable_at(ceil_to(offsets_at + 4 * (grid.blocks() + 1), kSectionAlign)) {}

RankExtent::RankExtent(std::span<const std::uint8_t> bytes, Codec codec, const Grid& grid)
    : bytes_(bytes), layout_(codec, grid) {
  if (bytes.size() < layout_.variable_at + kGuardBytes)
    throw CorruptError("the coded plane has " + std::to_string(bytes.size()) +
                           " bytes, its fixed parts alone need " +
                           std::to_string(layout_.variable_at + kGuardBytes),
                       kExponentPlane);
  variable_bytes_ = bytes.size() - layout_.variable_at - kGuardBytes;
  if (offset(0) != 0 || offset(grid.blocks()) != variable_bytes_)
    throw CorruptError("the offsets of the coded plane do not span its variable part",
                       kExponentPlane);
  check_zero(layout_.codes_bytes(grid.weights()), layout_.tables_at);
  check_zero(layout_.tables_at + layout_.table_bytes * grid.blocks(), layout_.offsets_at);
  check_zero(layout_.offsets_at + 4 * (grid.blocks() + 1), layout_.variable_at);
  check_zero(bytes.size() - kGuardBytes, bytes.size());
}

std::uint64_t RankExtent::offset(std::uint64_t block) const {
  std::uint32_t value;
  std::memcpy(&value, bytes_.data() + layout_.offsets_at + 4 * block, sizeof value);
  return value;
}

void RankExtent::check_zero(std::uint64_t begin, std::uint64_t end) const {
  const auto gap = bytes_.subspan(begin, end - begin);
  if (std::any_of(gap.begin(), gap.end(), [](std::uint8_t byte) { return byte != 0; }))
    throw CorruptError("padding between the sections of the coded plane is not zero",
                       kExponentPlane);
}

std::span<const std::uint8_t> RankExtent::variable(std::uint64_t block) const {
  const std::uint64_t begin = offset(block), end = offset(block + 1);
  if (begin > end || end > variable_bytes_)
    throw CorruptError("block " + std::to_string(block) + ": its offset is not in order",
                       kExponentPlane);
  return bytes_.subspan(layout_.variable_at + begin, end - begin);
}

}  // namespace zipmoe
