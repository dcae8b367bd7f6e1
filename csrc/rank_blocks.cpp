#include "rank_blocks.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "error.h"

namespace zipmoe {
namespace {

constexpr std::size_t kGroup2Bytes = 16;

[[noreturn]] void fail(std::uint64_t block, const char* what) {
  throw CorruptError("block " + std::to_string(block) + ": " + what, kExponentPlane);
}

std::size_t load_u16(const std::uint8_t* from) {
  return static_cast<std::size_t>(from[0] | (from[1] << 8));
}

// The last entry of each level's table must be the smallest value that the others are not: decoders
// find the escapes by it, so a store that breaks this would decode differently on another machine.
void check_sentinel(const std::uint8_t* table, unsigned entries, std::uint64_t block) {
  std::uint8_t smallest = 0;
  while (std::find(table, table + entries, smallest) != table + entries) ++smallest;
  if (table[entries] != smallest) fail(block, "its table does not end as it must");
}

// Bits that n codes, less than a group, leave unused in 8 bytes of a 2-bit group: byte i holds the
// codes i, i + 16, i + 32 and i + 48, the first in its lowest bits; `first` is the first byte's i.
std::uint64_t unused2(std::size_t n, std::size_t first) {
  constexpr std::uint64_t kEachByte = 0x0101010101010101;
  const std::size_t full = n / 16, more = n % 16;  // all bytes hold `full` codes, `more` one more
  const std::uint64_t without = ((0xFFU << (2 * full)) & 0xFF) * kEachByte;
  const std::uint64_t with = ((0xFFU << (2 * full + 2)) & 0xFF) * kEachByte;
  const std::size_t bytes = more > first ? std::min<std::size_t>(more - first, 8) : 0;
  const std::uint64_t low = bytes == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * bytes)) - 1;
  return (with & low) | (without & ~low);
}

// Codes after the n-th of a last, partly filled 2-bit group must be 0.
bool is_tail_zero2(const std::uint8_t* group, std::size_t n) {
  std::array<std::uint64_t, 2> halves;
  std::memcpy(halves.data(), group, kGroup2Bytes);
  return ((halves[0] & unused2(n, 0)) | (halves[1] & unused2(n, 8))) == 0;
}

bool is_tail_zero3(const std::uint8_t* group, std::size_t n) {
  std::uint64_t high;
  std::memcpy(&high, group + kGroup2Bytes, sizeof high);
  return is_tail_zero2(group, n) && (high >> n) == 0;
}

}  // namespace

ReadyBlock BlockCodes::prepare(Codec codec, const RankExtent& extent, std::uint64_t block,
                               std::uint64_t first_weight, std::size_t weights,
                               const Kernels& kernels) {
  const std::span<const std::uint8_t> variable = readable(extent, block);
  ReadyBlock ready{{nullptr, extent.codes(first_weight), extent.table(block), variable.data()},
                   block,
                   variable.size()};
  if (codec == Codec::rank223)
    unnest(ready, variable, weights, kernels);
  else
    check_sentinel(ready.coded.table, codec == Codec::rank3 ? 7 : 15, block);
  return ready;
}

void BlockCodes::finish(const ReadyBlock& ready, std::size_t used) {
  if (used != ready.escapes) fail(ready.block, "escapes and codes do not agree");
}

// The variable part of a block, kOverrun readable bytes behind it: the last ones are copied.
std::span<const std::uint8_t> BlockCodes::readable(const RankExtent& extent, std::uint64_t block) {
  const std::span<const std::uint8_t> variable = extent.variable(block);
  if (extent.bytes_behind(variable) >= kOverrun) return variable;
  if (variable.size() > kLongestVariable) fail(block, "its variable part is too long");
  std::copy(variable.begin(), variable.end(), tail_.begin());
  return {tail_.data(), variable.size()};
}

void BlockCodes::unnest(ReadyBlock& ready, std::span<const std::uint8_t> variable,
                        std::size_t weights, const Kernels& kernels) {
  const std::uint64_t block = ready.block;
  const std::uint8_t* table = ready.coded.table;
  if (variable.size() < 4) fail(block, "its variable part is too short");
  const std::size_t n2 = load_u16(variable.data()), n3 = load_u16(variable.data() + 2);
  const std::size_t groups2 = (n2 + kGroupWeights - 1) / kGroupWeights;
  const std::size_t groups3 = (n3 + kGroupWeights - 1) / kGroupWeights;
  const std::size_t fixed = 4 + groups2 * kGroup2Bytes + groups3 * kGroup3Bytes;
  if (n2 > weights || n3 > n2 || fixed > variable.size())
    fail(block, "its variable part does not hold the codes it promises");
  const std::uint8_t* codes2 = variable.data() + 4;
  const std::uint8_t* codes3 = codes2 + groups2 * kGroup2Bytes;
  const std::uint8_t* escapes = codes3 + groups3 * kGroup3Bytes;
  check_sentinel(table, 3, block);
  check_sentinel(table + 4, 3, block);
  check_sentinel(table + 8, 7, block);
  if ((n2 % kGroupWeights != 0 && !is_tail_zero2(codes3 - kGroup2Bytes, n2 % kGroupWeights)) ||
      (n3 % kGroupWeights != 0 && !is_tail_zero3(escapes - kGroup3Bytes, n3 % kGroupWeights)))
    fail(block, "there are codes behind its last one");
  const std::size_t used4 = kernels.unrank3(codes3, n3, table + 8, escapes, third_.data());
  const std::size_t used3 = kernels.unrank2(codes2, n2, table + 4, third_.data(), second_.data());
  if (used4 != variable.size() - fixed || used3 != n3) fail(block, "its levels do not agree");
  ready.coded.escapes = second_.data();
  ready.escapes = n2;
}

}  // namespace zipmoe
