#include "expert_table.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "integer_codec.h"

namespace zipmoe {
namespace {

// The columns of the table.
enum Column : std::size_t {
  kLayer,
  kExpert,
  kMatrix,
  kShard,
  kCodec,
  kElementBytes,
  kRows,
  kColumns,
  kRowGroup,
  kKTile,
  kExtents,
};
constexpr std::size_t kExtentColumns = 3;  // offset, length, xxh3

// Collects what is known of a place, so that every check names it.
class Complaint {
 public:
  Complaint(std::uint64_t layer, std::uint64_t expert, const std::string* path)
      : layer_(static_cast<std::int64_t>(layer)),
        expert_(static_cast<std::int64_t>(expert)),
        path_(path) {}

  void require(bool holds, const char* why) const {
    if (!holds) throw at(CorruptError(why));
  }
  void require(bool holds, const char* why, const char* plane, std::uint64_t offset) const {
    if (holds) return;
    CorruptError error(why, plane);
    error.offset = offset;
    throw at(std::move(error));
  }

 private:
  [[nodiscard]] CorruptError at(CorruptError error) const {
    error.layer = layer_;
    error.expert = expert_;
    if (path_ != nullptr) error.file = *path_;
    return error;
  }

  std::int64_t layer_, expert_;
  const std::string* path_;
};

Codec known_codec(std::uint64_t id) {
  try {
    return codec_from_id(id);
  } catch (const std::invalid_argument& unknown) {
    throw FormatError(unknown.what());
  }
}

MatrixSpec check_matrix(std::span<const std::uint64_t, kTableColumns> row, const Complaint& say) {
  const std::uint64_t element = row[kElementBytes];
  say.require(element == 1 || element == 2 || element == 4 || element == 8,
              "elements must have 1, 2, 4 or 8 bytes");
  say.require(row[kRows] <= kMaxSide && row[kColumns] <= kMaxSide &&
                  row[kRows] * row[kColumns] <= kMaxWeights,
              "the matrix is beyond the format's limits");
  MatrixSpec spec;
  spec.codec = known_codec(row[kCodec]);
  spec.rows = row[kRows];
  spec.columns = row[kColumns];
  spec.element_bytes = static_cast<std::uint32_t>(element);
  constexpr std::uint64_t kMaxU32 = std::numeric_limits<std::uint32_t>::max();
  say.require(row[kRowGroup] <= kMaxU32 && row[kKTile] <= kMaxU32, "the row group is too large");
  spec.geometry = {static_cast<std::uint32_t>(row[kRowGroup]),
                   static_cast<std::uint32_t>(row[kKTile])};

  const std::uint64_t sign_mantissa = row[kExtents + 1], exponent = row[kExtents + 4];
  if (spec.codec == Codec::raw) {
    say.require(sign_mantissa == spec.rows * spec.columns * element,
                "a raw extent must be as long as its matrix");
    say.require(exponent == 0, "a raw matrix has no second extent");
    return spec;
  }
  say.require(element == 2, "only BF16 matrices can be coded");
  say.require(is_valid(spec.geometry), "row group and k-tile are not allowed");
  const Grid grid(spec.rows, spec.columns, spec.geometry);
  if (!is_integer(spec.codec)) {
    say.require(sign_mantissa == grid.weights(),
                "the sign-mantissa plane must have one byte per weight");
    return spec;
  }
  try {
    (void)IntegerLayout(spec.codec, grid, sign_mantissa, exponent);
  } catch (const CorruptError& error) {
    say.require(false, error.reason.c_str());
  }
  return spec;
}

}  // namespace

ExpertTable::ExpertTable(std::span<const std::uint64_t> numbers,
                         std::span<const std::string> paths) {
  const std::size_t count = numbers.size() / kTableColumns;
  if (count == 0) throw std::invalid_argument("the table of matrices is empty");
  matrices_.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    add(numbers.subspan(i * kTableColumns).first<kTableColumns>(), paths);
  }
  records_.shrink_to_fit();
  index();
}

void ExpertTable::add(Row row, std::span<const std::string> paths) {
  const std::uint64_t shard = row[kShard];
  const bool named = shard < paths.size();
  const Complaint say(row[kLayer], row[kExpert], named ? &paths[shard] : nullptr);
  say.require(row[kLayer] < kMaxOrdinal && row[kExpert] < kMaxOrdinal,
              "layer or expert is beyond the format's limits");
  say.require(paths.empty() ? shard < kMaxOrdinal : named,
              "the table names a shard that is not there");

  ExpertMatrix matrix{.spec = check_matrix(row, say), .extents = {}};
  const bool first = records_.empty() || records_.back().layer != row[kLayer] ||
                     records_.back().expert != row[kExpert];
  if (first) {
    records_.push_back({.layer = static_cast<std::uint32_t>(row[kLayer]),
                        .expert = static_cast<std::uint32_t>(row[kExpert]),
                        .shard = static_cast<std::uint32_t>(shard),
                        .first_matrix = static_cast<std::uint32_t>(matrices_.size()),
                        .num_matrices = 0,
                        .offset = row[kExtents],
                        .length = 0});
  }
  ExpertRecord& record = records_.back();
  say.require(row[kMatrix] == record.num_matrices, "matrices of an expert must be listed in order");
  say.require(shard == record.shard, "an expert must lie in one shard");
  for (std::size_t extent = 0; extent < kExtentsPerMatrix; ++extent) {
    const std::size_t column = kExtents + kExtentColumns * extent;
    const ExtentPlace place{row[column], row[column + 1], row[column + 2]};
    const auto require = [&](bool holds, const char* why) {
      say.require(holds, why, plane_name(matrix.spec.codec, extent), place.offset);
    };
    require(place.offset % kReadAlignment == 0, "an extent must begin at a multiple of 4096");
    require(place.length <= kMaxRecordBytes && record.length + place.padded() <= kMaxRecordBytes,
            "a record is larger than the format allows");
    require(place.offset <= std::numeric_limits<std::int64_t>::max() - kMaxRecordBytes,
            "an extent lies beyond any file's end");
    require(place.offset == record.offset + record.length,
            "extents of an expert must lie in one run");
    require(place.length > 0 || place.xxh3 == 0, "the checksum of an empty extent must be 0");
    record.length += place.padded();
    matrix.extents[extent] = place;
  }
  ++record.num_matrices;
  matrices_.push_back(matrix);
}

void ExpertTable::index() {
  keys_.reserve(records_.size());
  for (std::uint32_t i = 0; i < records_.size(); ++i) {
    keys_.push_back({std::uint64_t{records_[i].layer} << 32 | records_[i].expert, i});
  }
  std::sort(keys_.begin(), keys_.end());
  num_layers_ = static_cast<std::uint32_t>(keys_.back().value >> 32) + 1;
  const auto twice = std::adjacent_find(keys_.begin(), keys_.end(),
                                        [](Key a, Key b) { return a.value == b.value; });
  if (twice == keys_.end()) return;
  const ExpertRecord& record = records_[twice->record];
  Complaint(record.layer, record.expert, nullptr).require(false, "an expert is listed twice");
}

void ExpertTable::check_inside(std::span<const ShardFile> shards) const {
  for (const ExpertRecord& record : records_) {
    const ShardFile& shard = shards[record.shard];
    Complaint(record.layer, record.expert, &shard.path())
        .require(record.offset + record.length <= shard.size(),
                 "the record does not lie inside the file: is it truncated?",
                 plane_name(matrices(record).front().spec.codec, 0), record.offset);
  }
}

std::uint32_t ExpertTable::find(std::uint64_t layer, std::uint64_t expert) const {
  if (layer < kMaxOrdinal && expert < kMaxOrdinal) {
    const Key wanted{layer << 32 | expert, 0};
    const auto key = std::lower_bound(keys_.begin(), keys_.end(), wanted);
    if (key != keys_.end() && key->value == wanted.value) return key->record;
  }
  throw std::invalid_argument("there is no expert " + std::to_string(expert) + " in layer " +
                              std::to_string(layer));
}

std::vector<std::uint32_t> ExpertTable::layers() const {
  std::vector<std::uint32_t> layers;
  layers.reserve(records_.size());
  for (const ExpertRecord& record : records_) layers.push_back(record.layer);
  return layers;
}

std::uint64_t ExpertTable::largest_record_bytes() const {
  const auto largest = std::max_element(
      records_.begin(), records_.end(),
      [](const ExpertRecord& a, const ExpertRecord& b) { return a.length < b.length; });
  return largest->length;
}

std::uint64_t ExpertTable::decode_scratch() const {
  std::uint64_t most = 0;
  for (const ExpertMatrix& matrix : matrices_)
    most = std::max(most, decode_scratch_bytes(matrix.spec));
  return most;
}

std::uint64_t ExpertTable::bytes() const {
  return matrices_.capacity() * sizeof(ExpertMatrix) + records_.capacity() * sizeof(ExpertRecord) +
         keys_.capacity() * sizeof(Key);
}

std::string matrix_name(std::size_t matrix, std::size_t num_matrices) {
  static constexpr std::array kRoles{"gate", "up", "down"};
  const std::string name = "matrix " + std::to_string(matrix);
  if (num_matrices < 2 || num_matrices > kRoles.size()) return name;
  return name + " (" + kRoles[kRoles.size() - num_matrices + matrix] + ")";
}

const char* plane_name(Codec codec, std::size_t extent) {
  if (is_integer(codec)) return extent == 0 ? kCodesPlane : kScalesPlane;
  return extent == 0 ? kSignMantissaPlane : kExponentPlane;
}

}  // namespace zipmoe
