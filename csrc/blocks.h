// Blocks in and out of a matrix: what the kernels want is whole blocks, what callers have is not.
#pragma once
#include <array>
#include <cstdint>

#include "codec.h"
#include "geometry.h"
#include "kernels.h"

namespace zipmoe {

// Gives the kernels a place for each block of one matrix: the matrix itself where the block lies
// wholly inside, else a buffer of its own from which the real part is copied. One per thread.
class BlockWriter {
 public:
  BlockWriter(const Grid& grid, const Target& target, const Kernels& kernels);
  ~BlockWriter();
  BlockWriter(const BlockWriter&) = delete;
  BlockWriter& operator=(const BlockWriter&) = delete;

  BlockTarget begin(std::uint64_t group, std::uint64_t tile);
  // To be called when the kernel has filled what `begin` gave.
  void end(std::uint64_t group, std::uint64_t tile);

 private:
  std::uint16_t* place(std::uint64_t group, std::uint64_t tile) const;
  bool is_whole(std::uint64_t group, std::uint64_t tile) const;

  const Grid& grid_;
  Target target_;
  const Kernels& kernels_;
  bool stream_;
  alignas(64) std::array<std::uint16_t, kBlockWeights> words_;
};

// The planes of one block, in the order of the format, and which of its weights are padding.
struct BlockPlanes {
  alignas(64) std::array<std::uint8_t, kBlockWeights + kVectorSlack> exponents;
  std::uint64_t weights;  // with padding
  std::uint64_t padding;
};

// Reads blocks of one matrix with any strides. One per thread; blocks of ascending row groups are
// quickest, because columns that are far apart are gathered for several row groups at once.
class BlockReader {
 public:
  BlockReader(const Grid& grid, const Source& source, const Kernels& kernels);

  // Sign-mantissa bytes go to `sign_mantissa` (the block's place in extent 0).
  void read(std::uint64_t group, std::uint64_t tile, std::uint8_t* sign_mantissa,
            BlockPlanes& planes);

 private:
  void gather(std::uint64_t group);
  std::uint64_t strip_groups() const;

  const Grid& grid_;
  Source source_;
  const Kernels& kernels_;
  Buffer strip_;
  std::uint64_t strip_begin_ = 0, strip_end_ = 0;  // row groups that strip_ holds
  alignas(64) std::array<std::uint16_t, kBlockWeights> words_;
};

// Calls visit(byte index within the block) for every padding weight of a block.
template <class Visit>
void each_padding(const Grid& grid, std::uint64_t group, std::uint64_t tile, const Visit& visit) {
  const std::uint64_t height = grid.height(group), width = grid.width(tile);
  const std::uint64_t real_height = grid.real_height(group), real_width = grid.real_width(tile);
  std::uint64_t at = 0;
  for (std::uint64_t panel = 0; panel < height; panel += kPanelRows)
    for (std::uint64_t column = 0; column < width; column += kGroupWeights)
      for (std::uint64_t row = panel; row < panel + kPanelRows; ++row, at += kGroupWeights) {
        if (row < real_height && column + kGroupWeights <= real_width) continue;
        for (std::uint64_t w = 0; w < kGroupWeights; ++w)
          if (row >= real_height || column + w >= real_width)
            visit(at + 16 * ((w >> 3) & 3) + 8 * (w >> 5) + (w & 7));
      }
}

}  // namespace zipmoe
