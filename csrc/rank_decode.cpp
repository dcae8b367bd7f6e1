#include "blocks.h"
#include "parallel.h"
#include "rank_blocks.h"
#include "rank_codec.h"

namespace zipmoe {

std::size_t merge(Codec codec, const CodedBlock& block, const BlockTarget& target,
                  const Kernels& kernels) {
  if (codec == Codec::rank223) return kernels.merge2(block, target);
  return codec == Codec::rank3 ? kernels.merge3(block, target) : kernels.merge4(block, target);
}

void decode_rank(Codec codec, const Grid& grid, const Extents& extents, const Target& target,
                 const Kernels& kernels, unsigned threads) {
  const RankExtent extent(extents.exponent, codec, grid);
  parallel_ranges(
      grid.row_groups(), threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
        BlockWriter writer(grid, target, kernels);
        BlockCodes codes;
        for (std::uint64_t group = begin; group < end; ++group)
          for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
            const std::uint64_t first = grid.first_weight(group, tile);
            const BlockTarget place = writer.begin(group, tile);
            ReadyBlock ready = codes.prepare(codec, extent, group * grid.k_tiles() + tile, first,
                                             std::size_t{place.height} * place.width, kernels);
            ready.coded.sign_mantissa = extents.sign_mantissa.data() + first;
            BlockCodes::finish(ready, merge(codec, ready.coded, place, kernels));
            writer.end(group, tile);
          }
      });
}

}  // namespace zipmoe
