#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "blocks.h"
#include "parallel.h"
#include "rank_codec.h"
#include "rank_layout.h"

namespace zipmoe {
namespace {

constexpr std::size_t kGroup2Bytes = 16;
constexpr std::size_t kGroup3Bytes = 24;
constexpr unsigned kRanks = 15;  // the most that any table needs

using Values = std::array<std::uint8_t, kBlockWeights + kVectorSlack>;

// Exponents by falling count, equal counts by rising value: the first kRanks of them.
std::array<std::uint8_t, kRanks> most_frequent(const std::array<std::uint32_t, 256>& counts) {
  std::array<std::uint32_t, 256> keys;  // count and inverted value: descending is the order wanted
  unsigned present = 0;
  for (unsigned value = 0; value < 256; ++value)
    if (counts[value] != 0) keys[present++] = (counts[value] << 8) | (255 - value);
  for (unsigned value = 0; value < 256 && present < kRanks; ++value)
    if (counts[value] == 0) keys[present++] = 255 - value;
  std::partial_sort(keys.begin(), keys.begin() + kRanks, keys.begin() + present, std::greater<>());
  std::array<std::uint8_t, kRanks> order;
  for (unsigned rank = 0; rank < kRanks; ++rank)
    order[rank] = static_cast<std::uint8_t>(255 - (keys[rank] & 255));
  return order;
}

// One level's table: the entries, then the smallest value that is not among them.
void put_table(const std::uint8_t* entries, unsigned count, std::uint8_t* table) {
  std::copy_n(entries, count, table);
  std::uint8_t absent = 0;
  while (std::find(entries, entries + count, absent) != entries + count) ++absent;
  table[count] = absent;
}

void append(std::vector<std::uint8_t>& to, const std::uint8_t* from, std::size_t bytes) {
  to.insert(to.end(), from, from + bytes);
}

// One thread's encoder: codes and tables go to their place, variable parts are collected.
class BlockEncoder {
 public:
  BlockEncoder(Codec codec, const Kernels& kernels) : codec_(codec), kernels_(kernels) {}

  // set_padding(value) gives every padding weight of `planes` that exponent.
  template <class SetPadding>
  void operator()(BlockPlanes& planes, const SetPadding& set_padding, std::uint8_t* codes,
                  std::uint8_t* table, std::vector<std::uint8_t>& variable) {
    std::array<std::uint32_t, 256> counts;
    kernels_.histogram(planes.exponents.data(), planes.weights, counts.data());
    counts[0] -= static_cast<std::uint32_t>(planes.padding);
    const auto order = most_frequent(counts);
    if (planes.padding != 0) set_padding(order[0]);
    const std::uint8_t* values = planes.exponents.data();
    if (codec_ == Codec::rank223)
      return nested(order, values, planes.weights, codes, table, variable);
    const bool three = codec_ == Codec::rank3;
    put_table(order.data(), three ? 7 : 15, table);
    const std::size_t escaped =
        three ? kernels_.rank3(values, planes.weights, table, codes, second_.data())
              : kernels_.rank4(values, planes.weights, table, codes, second_.data());
    append(variable, second_.data(), escaped);
  }

 private:
  void nested(const std::array<std::uint8_t, kRanks>& order, const std::uint8_t* values,
              std::size_t n, std::uint8_t* codes, std::uint8_t* table,
              std::vector<std::uint8_t>& variable) {
    put_table(order.data(), 3, table);
    put_table(order.data() + 3, 3, table + 4);
    put_table(order.data() + 6, 7, table + 8);
    const std::size_t n2 = kernels_.rank2(values, n, table, codes, second_.data());
    const std::size_t n3 =
        kernels_.rank2(second_.data(), n2, table + 4, codes2_.data(), third_.data());
    const std::size_t n4 =
        kernels_.rank3(third_.data(), n3, table + 8, codes3_.data(), fourth_.data());
    const std::array<std::uint8_t, 4> sizes{
        static_cast<std::uint8_t>(n2), static_cast<std::uint8_t>(n2 >> 8),
        static_cast<std::uint8_t>(n3), static_cast<std::uint8_t>(n3 >> 8)};
    append(variable, sizes.data(), sizes.size());
    append(variable, codes2_.data(), ceil_to(n2, kGroupWeights) / kGroupWeights * kGroup2Bytes);
    append(variable, codes3_.data(), ceil_to(n3, kGroupWeights) / kGroupWeights * kGroup3Bytes);
    append(variable, fourth_.data(), n4);
  }

  Codec codec_;
  const Kernels& kernels_;
  alignas(64) Values second_{}, third_{}, fourth_{};
  alignas(64) std::array<std::uint8_t, kBlockWeights / 64 * kGroup2Bytes> codes2_{};
  alignas(64) std::array<std::uint8_t, kBlockWeights / 64 * kGroup3Bytes> codes3_{};
};

// What all threads share: the matrix, and the places of what has a fixed length.
struct Job {
  const Source& source;
  const Grid& grid;
  const Kernels& kernels;
  const RankLayout& layout;
  Codec codec;
  std::uint8_t* sign_mantissa;
  std::uint8_t* codes;
  std::uint8_t* tables;
};

// A run of row groups, and the variable parts of its blocks.
struct Part {
  std::uint64_t first_block = 0;
  std::vector<std::uint64_t> ends;  // length of `variable` after each block
  std::vector<std::uint8_t> variable;
};

void encode_part(const Job& job, std::uint64_t begin, std::uint64_t end, Part& part) {
  const Grid& grid = job.grid;
  BlockReader reader(grid, job.source, job.kernels);
  BlockEncoder encode_block(job.codec, job.kernels);
  BlockPlanes planes{};
  part.first_block = begin * grid.k_tiles();
  // Enough for all but the strangest matrices; untouched, it costs nothing.
  constexpr std::uint64_t kMostReserved = std::uint64_t{1} << 27;
  part.variable.reserve(
      std::min((end - begin) * grid.row_group() * grid.columns() / 8, kMostReserved));
  for (std::uint64_t group = begin; group < end; ++group)
    for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
      const std::uint64_t first = grid.first_weight(group, tile);
      const std::uint64_t block = group * grid.k_tiles() + tile;
      reader.read(group, tile, job.sign_mantissa + first, planes);
      const auto set_padding = [&](std::uint8_t value) {
        each_padding(grid, group, tile, [&](std::uint64_t at) { planes.exponents[at] = value; });
      };
      encode_block(planes, set_padding, job.codes + job.layout.codes_bytes(first),
                   job.tables + block * job.layout.table_bytes, part.variable);
      part.ends.push_back(part.variable.size());
    }
}

}  // namespace

void encode_rank(const Source& source, const Grid& grid, const Kernels& kernels, unsigned threads,
                 Encoded& encoded) {
  if (grid.blocks() == 0) return;
  const RankLayout layout(encoded.codec, grid);
  encoded.sign_mantissa.resize(grid.weights());
  encoded.exponent.resize(layout.variable_at);
  std::uint8_t* head = encoded.exponent.data();
  // Gaps between sections must be zero; all else in front of the variable part gets written.
  std::memset(head + layout.codes_bytes(grid.weights()), 0,
              layout.variable_at - layout.codes_bytes(grid.weights()));
  const Job job{source,        grid,
                kernels,       layout,
                encoded.codec, encoded.sign_mantissa.data(),
                head,          head + layout.tables_at};
  std::vector<Part> parts(std::max(1U, threads));
  parallel_ranges(grid.row_groups(), threads,
                  [&](std::uint64_t index, std::uint64_t begin, std::uint64_t end) {
                    encode_part(job, begin, end, parts[index]);
                  });

  std::uint64_t total = 0;
  for (const Part& part : parts) total += part.variable.size();
  if (total > std::numeric_limits<std::uint32_t>::max())
    throw std::length_error("the variable part exceeds 4 GiB");
  encoded.exponent.resize(layout.variable_at + total + kGuardBytes);
  std::uint8_t* offsets = encoded.exponent.data() + layout.offsets_at;
  std::uint8_t* variable = encoded.exponent.data() + layout.variable_at;
  std::uint64_t base = 0;
  for (const Part& part : parts) {
    std::uint64_t block = part.first_block;
    for (std::uint64_t length : part.ends) {
      const auto end = static_cast<std::uint32_t>(base + length);
      std::memcpy(offsets + 4 * ++block, &end, sizeof end);
    }
    std::copy(part.variable.begin(), part.variable.end(), variable + base);
    base += part.variable.size();
  }
  std::memset(variable + total, 0, kGuardBytes);
}

}  // namespace zipmoe
