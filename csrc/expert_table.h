// Where every expert lies: which shard, which stretch of it, which matrices. Checked before it is
// used.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "codec.h"
#include "error.h"
#include "reader.h"

namespace zipmoe {

// Numbers per matrix in the table that callers hand over, in this order: layer, expert, matrix,
// shard, codec id, bytes per element, rows, columns, row group, k-tile, then offset, length and
// xxh3 of extent 0 and of extent 1.
inline constexpr std::size_t kTableColumns = 16;
inline constexpr std::size_t kExtentsPerMatrix = 2;
inline constexpr std::uint64_t kMaxRecordBytes = std::uint64_t{64} << 30;
inline constexpr std::uint64_t kMaxOrdinal = 65536;  // layers; experts of a layer

struct ExtentPlace {
  std::uint64_t offset = 0;  // in the shard
  std::uint64_t length = 0;  // without padding
  std::uint64_t xxh3 = 0;    // of the padded bytes
  [[nodiscard]] std::uint64_t padded() const { return ceil_to(length, kReadAlignment); }
};

struct ExpertMatrix {
  MatrixSpec spec;
  std::array<ExtentPlace, kExtentsPerMatrix> extents;  // sign-mantissa, exponent
};

struct ExpertRecord {
  std::uint32_t layer = 0;
  std::uint32_t expert = 0;
  std::uint32_t shard = 0;
  std::uint32_t first_matrix = 0;
  std::uint32_t num_matrices = 0;
  std::uint64_t offset = 0;  // in the shard
  std::uint64_t length = 0;  // padding included: a multiple of kReadAlignment
};

class ExpertTable {
 public:
  // Throws CorruptError where a number breaks the format, FormatError for an unknown codec. `paths`
  // name the shards in messages; empty: not known yet, and the shards' number is not checked.
  ExpertTable(std::span<const std::uint64_t> numbers, std::span<const std::string> paths);

  // Throws CorruptError where a record does not lie inside its shard.
  void check_inside(std::span<const ShardFile> shards) const;

  [[nodiscard]] std::span<const ExpertRecord> records() const { return records_; }
  [[nodiscard]] std::span<const ExpertMatrix> matrices(const ExpertRecord& record) const {
    return std::span(matrices_).subspan(record.first_matrix, record.num_matrices);
  }
  // Ordinal of a record. Throws std::invalid_argument where there is no such expert.
  [[nodiscard]] std::uint32_t find(std::uint64_t layer, std::uint64_t expert) const;
  // By record: its layer.
  [[nodiscard]] std::vector<std::uint32_t> layers() const;
  [[nodiscard]] std::uint32_t num_layers() const { return num_layers_; }
  [[nodiscard]] std::uint64_t largest_record_bytes() const;
  // The most that decoding any one matrix allocates.
  [[nodiscard]] std::uint64_t decode_scratch() const;
  // What the table itself takes.
  [[nodiscard]] std::uint64_t bytes() const;

 private:
  using Row = std::span<const std::uint64_t, kTableColumns>;
  struct Key {
    std::uint64_t value;  // layer, then expert
    std::uint32_t record;
    auto operator<=>(const Key&) const = default;
  };

  void add(Row row, std::span<const std::string> paths);
  void index();

  std::vector<ExpertMatrix> matrices_;
  std::vector<ExpertRecord> records_;
  std::vector<Key> keys_;  // sorted
  std::uint32_t num_layers_ = 0;
};

// "matrix 1 (up)", say. Roles follow from the number: gate, up, down, or up, down.
std::string matrix_name(std::size_t matrix, std::size_t num_matrices);
// The plane's name of an extent, as errors use it.
const char* plane_name(Codec codec, std::size_t extent);

}  // namespace zipmoe
