// Blocks of a rank codec, made ready for whoever merges or multiplies them.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "codec.h"
#include "kernels.h"
#include "rank_layout.h"

namespace zipmoe {

// A block whose inner levels are decoded. Whoever consumes the first level says to `finish` how
// many escapes it took.
struct ReadyBlock {
  CodedBlock coded;
  std::uint64_t block;
  std::size_t escapes;  // that must be consumed
};

// One thread's room for the inner levels of one block.
class BlockCodes {
 public:
  // `weights` of the block, padding included. What it gives is valid until the next call. Throws
  // CorruptError. A kernel may consume up to kBlockWeights escapes, whatever the codes say, and
  // load one vector more, without leaving readable memory.
  ReadyBlock prepare(Codec codec, const RankExtent& extent, std::uint64_t block,
                     std::uint64_t first_weight, std::size_t weights, const Kernels& kernels);
  // Throws CorruptError where the codes and the escapes do not agree.
  static void finish(const ReadyBlock& ready, std::size_t used);

 private:
  // Whatever its codes say, a block advances a stream of escapes by at most kBlockWeights before
  // `finish` catches it; a vector is loaded beyond that.
  static constexpr std::size_t kOverrun = kBlockWeights + kVectorSlack;
  static constexpr std::size_t kGroup2Bytes = 16;
  static constexpr std::size_t kGroup3Bytes = 24;
  static constexpr std::size_t kLongestVariable =
      4 + kBlockWeights / kGroupWeights * (kGroup2Bytes + kGroup3Bytes) + kBlockWeights;

  std::span<const std::uint8_t> readable(const RankExtent& extent, std::uint64_t block);
  void unnest(ReadyBlock& ready, std::span<const std::uint8_t> variable, std::size_t weights,
              const Kernels& kernels);

  // Exponents of the inner levels; zeroed once, so that no corrupt block reads what is undefined.
  alignas(64) std::array<std::uint8_t, kOverrun> second_{};
  alignas(64) std::array<std::uint8_t, kOverrun> third_{};
  alignas(64) std::array<std::uint8_t, kLongestVariable + kOverrun> tail_{};
};

}  // namespace zipmoe
