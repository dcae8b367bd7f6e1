#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "blocks.h"
#include "error.h"
#include "parallel.h"
#include "rank_codec.h"
#include "rank_layout.h"

namespace zipmoe {
namespace {

constexpr std::size_t kGroup2Bytes = 16;
constexpr std::size_t kGroup3Bytes = 24;

// Whatever its codes say, a block advances a stream of escapes by at most kBlockWeights before the
// end check catches it; a vector is loaded beyond that.
constexpr std::size_t kOverrun = kBlockWeights + kVectorSlack;
constexpr std::size_t kLongestVariable =
    4 + kBlockWeights / kGroupWeights * (kGroup2Bytes + kGroup3Bytes) + kBlockWeights;

// Exponents of the inner levels. The streams that are read from them advance at most kBlockWeights,
// whatever the codes say, so that no corrupt block reads past them; zeroed once for the same
// reason.
struct Levels {
  alignas(64) std::array<std::uint8_t, kBlockWeights + kVectorSlack> second{};
  alignas(64) std::array<std::uint8_t, kBlockWeights + kVectorSlack> third{};
};

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

// One thread's decoder of blocks.
class BlockDecoder {
 public:
  BlockDecoder(Codec codec, const RankExtent& extent, const Kernels& kernels)
      : codec_(codec), extent_(extent), kernels_(kernels) {}

  void operator()(std::uint64_t block, std::uint64_t first_weight,
                  const std::uint8_t* sign_mantissa, const BlockTarget& target) {
    const CodedBlock coded{sign_mantissa, extent_.codes(first_weight), extent_.table(block),
                           nullptr};
    const std::span<const std::uint8_t> variable = readable(block);
    if (codec_ == Codec::rank223) return nested(block, coded, variable, target);
    const bool three = codec_ == Codec::rank3;
    check_sentinel(coded.table, three ? 7 : 15, block);
    CodedBlock flat = coded;
    flat.escapes = variable.data();
    const std::size_t used = three ? kernels_.merge3(flat, target) : kernels_.merge4(flat, target);
    if (used != variable.size()) fail(block, "escapes and codes do not agree");
  }

 private:
  // The variable part of a block, kOverrun readable bytes behind it: the last ones are copied.
  std::span<const std::uint8_t> readable(std::uint64_t block) {
    const std::span<const std::uint8_t> variable = extent_.variable(block);
    if (extent_.bytes_behind(variable) >= kOverrun) return variable;
    if (variable.size() > kLongestVariable) fail(block, "its variable part is too long");
    std::copy(variable.begin(), variable.end(), tail_.begin());
    return {tail_.data(), variable.size()};
  }

  void nested(std::uint64_t block, CodedBlock coded, std::span<const std::uint8_t> variable,
              const BlockTarget& target) {
    if (variable.size() < 4) fail(block, "its variable part is too short");
    const std::size_t n2 = load_u16(variable.data()), n3 = load_u16(variable.data() + 2);
    const std::size_t weights = std::size_t{target.height} * target.width;
    const std::size_t groups2 = (n2 + kGroupWeights - 1) / kGroupWeights;
    const std::size_t groups3 = (n3 + kGroupWeights - 1) / kGroupWeights;
    const std::size_t fixed = 4 + groups2 * kGroup2Bytes + groups3 * kGroup3Bytes;
    if (n2 > weights || n3 > n2 || fixed > variable.size())
      fail(block, "its variable part does not hold the codes it promises");
    const std::uint8_t* codes2 = variable.data() + 4;
    const std::uint8_t* codes3 = codes2 + groups2 * kGroup2Bytes;
    const std::uint8_t* escapes = codes3 + groups3 * kGroup3Bytes;
    check_sentinel(coded.table, 3, block);
    check_sentinel(coded.table + 4, 3, block);
    check_sentinel(coded.table + 8, 7, block);
    if ((n2 % kGroupWeights != 0 && !is_tail_zero2(codes3 - kGroup2Bytes, n2 % kGroupWeights)) ||
        (n3 % kGroupWeights != 0 && !is_tail_zero3(escapes - kGroup3Bytes, n3 % kGroupWeights)))
      fail(block, "there are codes behind its last one");
    const std::size_t used4 =
        kernels_.unrank3(codes3, n3, coded.table + 8, escapes, levels_.third.data());
    const std::size_t used3 =
        kernels_.unrank2(codes2, n2, coded.table + 4, levels_.third.data(), levels_.second.data());
    coded.escapes = levels_.second.data();
    const std::size_t used2 = kernels_.merge2(coded, target);
    if (used4 != variable.size() - fixed || used3 != n3 || used2 != n2)
      fail(block, "its levels do not agree");
  }

  Codec codec_;
  const RankExtent& extent_;
  const Kernels& kernels_;
  Levels levels_;
  alignas(64) std::array<std::uint8_t, kLongestVariable + kOverrun> tail_{};
};

}  // namespace

void decode_rank(Codec codec, const Grid& grid, const Extents& extents, const Target& target,
                 const Kernels& kernels, unsigned threads) {
  const RankExtent extent(extents.exponent, codec, grid);
  parallel_ranges(
      grid.row_groups(), threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
        BlockWriter writer(grid, target, kernels);
        BlockDecoder decode_block(codec, extent, kernels);
        for (std::uint64_t group = begin; group < end; ++group)
          for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
            const std::uint64_t first = grid.first_weight(group, tile);
            decode_block(group * grid.k_tiles() + tile, first, extents.sign_mantissa.data() + first,
                         writer.begin(group, tile));
            writer.end(group, tile);
          }
      });
}

}  // namespace zipmoe
