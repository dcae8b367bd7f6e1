#include "shard_codec.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "blocks.h"
#include "compressors.h"
#include "error.h"
#include "parallel.h"

namespace zipmoe {
namespace {

constexpr std::uint64_t kAlign = 64;
constexpr std::uint64_t kHeadBytes = 8;
constexpr std::uint64_t kEntryBytes = 8;

struct Shard {
  std::uint64_t plane_at, plane_bytes;  // in the exponent plane
  std::uint64_t data_at, data_bytes;    // in the extent
};

std::uint64_t load_u32(const std::uint8_t* from) {
  std::uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

void store_u32(std::uint8_t* to, std::uint64_t wide) {
  const auto value = static_cast<std::uint32_t>(wide);
  std::memcpy(to, &value, sizeof value);
}

[[noreturn]] void fail(const std::string& what) { throw CorruptError(what, kExponentPlane); }

void check_zero(std::span<const std::uint8_t> extent, std::uint64_t begin, std::uint64_t end) {
  const auto gap = extent.subspan(begin, end - begin);
  if (std::any_of(gap.begin(), gap.end(), [](std::uint8_t byte) { return byte != 0; }))
    fail("padding between the shards of the exponent plane is not zero");
}

// The cut of a plane into at most `wanted` shards: even, multiples of 64, none empty.
std::vector<std::uint64_t> cut(std::uint64_t plane, std::uint64_t wanted) {
  const std::uint64_t each = ceil_to((plane + wanted - 1) / wanted, kAlign);
  std::vector<std::uint64_t> lengths;
  for (std::uint64_t at = 0; at < plane; at += each) lengths.push_back(std::min(each, plane - at));
  return lengths;
}

std::vector<Shard> parse(std::span<const std::uint8_t> extent, std::uint64_t plane) {
  if (extent.size() < kHeadBytes) fail("the exponent plane has no shard table");
  const std::uint64_t count = load_u32(extent.data());
  if (count == 0 || count > kMaxShards) fail("a count of " + std::to_string(count) + " shards");
  if (load_u32(extent.data() + 4) != 0) fail("a reserved field is not zero");
  const std::uint64_t table_end = kHeadBytes + kEntryBytes * count;
  std::uint64_t data_at = ceil_to(table_end, kAlign), plane_at = 0, end = table_end;
  std::vector<Shard> shards;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (data_at > extent.size()) fail("the exponent plane ends before its shards do");
    check_zero(extent, end, data_at);
    const std::uint8_t* entry = extent.data() + kHeadBytes + kEntryBytes * i;
    const Shard shard{plane_at, load_u32(entry), data_at, load_u32(entry + 4)};
    end = data_at + shard.data_bytes;
    if (shard.plane_bytes == 0 || (i + 1 < count && shard.plane_bytes % kAlign != 0) ||
        end > extent.size())
      fail("the length of shard " + std::to_string(i) + " is wrong");
    plane_at += shard.plane_bytes;
    data_at = ceil_to(end, kAlign);
    shards.push_back(shard);
  }
  if (plane_at != plane || end != extent.size())
    fail("the shards do not add up to the exponent plane");
  return shards;
}

}  // namespace

void decode_shards(Codec codec, const Grid& grid, const Extents& extents, const Target& target,
                   const Kernels& kernels, unsigned threads) {
  const std::vector<Shard> shards = parse(extents.exponent, grid.weights());
  Buffer plane(grid.weights());
  parallel_ranges(
      shards.size(), threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
        for (std::uint64_t i = begin; i < end; ++i) {
          const Shard& shard = shards[i];
          if (!decompress(codec, extents.exponent.subspan(shard.data_at, shard.data_bytes),
                          {plane.data() + shard.plane_at, shard.plane_bytes}))
            fail("shard " + std::to_string(i) + " does not decompress");
        }
      });
  parallel_ranges(grid.row_groups(), threads,
                  [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
                    BlockWriter writer(grid, target, kernels);
                    for (std::uint64_t group = begin; group < end; ++group)
                      for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
                        const std::uint64_t first = grid.first_weight(group, tile);
                        kernels.merge8(extents.sign_mantissa.data() + first, plane.data() + first,
                                       writer.begin(group, tile));
                        writer.end(group, tile);
                      }
                  });
}

namespace {

// Both planes as bytes; padding weights are 0 in both.
Buffer split_planes(const Source& source, const Grid& grid, const Kernels& kernels,
                    unsigned threads, std::uint8_t* sign_mantissa) {
  Buffer exponents(grid.weights());
  parallel_ranges(
      grid.row_groups(), threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
        BlockReader reader(grid, source, kernels);
        BlockPlanes planes{};
        for (std::uint64_t group = begin; group < end; ++group)
          for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
            const std::uint64_t first = grid.first_weight(group, tile);
            reader.read(group, tile, sign_mantissa + first, planes);
            std::copy_n(planes.exponents.data(), planes.weights, exponents.data() + first);
          }
      });
  return exponents;
}

}  // namespace

void encode_shards(const Source& source, const Grid& grid, const Kernels& kernels,
                   const EncodeOptions& options, Encoded& encoded) {
  if (grid.blocks() == 0) return;
  encoded.sign_mantissa.resize(grid.weights());
  const Buffer plane =
      split_planes(source, grid, kernels, options.threads, encoded.sign_mantissa.data());
  const std::vector<std::uint64_t> lengths = cut(grid.weights(), options.shards);
  std::vector<Buffer> coded(lengths.size());
  parallel_ranges(
      lengths.size(), options.threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
        for (std::uint64_t i = begin; i < end; ++i) {
          coded[i].resize(compressed_bound(options.codec, lengths[i]));
          const std::span<const std::uint8_t> shard(plane.data() + lengths[0] * i, lengths[i]);
          coded[i].resize(compress(options.codec, shard, {coded[i].data(), coded[i].size()}));
        }
      });
  std::uint64_t at = kHeadBytes + kEntryBytes * lengths.size();
  for (const Buffer& shard : coded) at = ceil_to(at, kAlign) + shard.size();
  encoded.exponent.resize(at);
  std::uint8_t* out = encoded.exponent.data();
  std::memset(out, 0, at);
  store_u32(out, lengths.size());
  at = kHeadBytes + kEntryBytes * lengths.size();
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    store_u32(out + kHeadBytes + kEntryBytes * i, lengths[i]);
    store_u32(out + kHeadBytes + kEntryBytes * i + 4, coded[i].size());
    at = ceil_to(at, kAlign);
    std::copy_n(coded[i].data(), coded[i].size(), out + at);
    at += coded[i].size();
  }
}

}  // namespace zipmoe
