// How a matrix is cut into blocks: docs/format.md section 5.
#pragma once
#include <cstdint>

namespace zipmoe {

inline constexpr std::uint64_t kPanelRows = 4;
inline constexpr std::uint64_t kGroupWeights = 64;
inline constexpr std::uint64_t kBlockWeights = 8192;  // the most that one block may hold
inline constexpr std::uint64_t kMaxSide = 0x7FFFFFFF;
inline constexpr std::uint64_t kMaxWeights = std::uint64_t{1} << 40;

constexpr std::uint64_t ceil_to(std::uint64_t n, std::uint64_t unit) {
  return (n + unit - 1) / unit * unit;
}

struct Geometry {
  std::uint32_t row_group = 0;  // R, a multiple of 4
  std::uint32_t k_tile = 0;     // T, a multiple of 64; R * T <= 8192
  bool operator==(const Geometry&) const = default;
};

// The pair zipmoe chooses. Throws std::invalid_argument beyond kMaxSide or kMaxWeights.
Geometry choose_geometry(std::uint64_t rows, std::uint64_t columns);

// True where a matrix may have these sides.
bool within_limits(std::uint64_t rows, std::uint64_t columns);

// True where the pair obeys the format, whatever the matrix.
bool is_valid(Geometry geometry);

// The blocks of one matrix. Empty where rows or columns are 0.
class Grid {
 public:
  // Throws std::invalid_argument for an invalid pair, or beyond kMaxSide or kMaxWeights.
  Grid(std::uint64_t rows, std::uint64_t columns, Geometry geometry);

  std::uint64_t rows() const { return rows_; }
  std::uint64_t columns() const { return columns_; }
  std::uint64_t row_groups() const { return row_groups_; }
  std::uint64_t k_tiles() const { return k_tiles_; }
  std::uint64_t blocks() const { return row_groups_ * k_tiles_; }
  std::uint64_t row_group() const { return geometry_.row_group; }
  std::uint64_t k_tile() const { return geometry_.k_tile; }
  // All weights with padding.
  std::uint64_t weights() const { return padded_rows_ * padded_columns_; }
  std::uint64_t padded_rows() const { return padded_rows_; }

  std::uint64_t first_row(std::uint64_t group) const { return group * row_group(); }
  std::uint64_t first_column(std::uint64_t tile) const { return tile * k_tile(); }
  // Sides of a block with padding, and those of the part that is in the matrix.
  std::uint64_t height(std::uint64_t group) const {
    return group + 1 < row_groups_ ? row_group() : padded_rows_ - first_row(group);
  }
  std::uint64_t width(std::uint64_t tile) const {
    return tile + 1 < k_tiles_ ? k_tile() : padded_columns_ - first_column(tile);
  }
  std::uint64_t real_height(std::uint64_t group) const {
    return group + 1 < row_groups_ ? row_group() : rows_ - first_row(group);
  }
  std::uint64_t real_width(std::uint64_t tile) const {
    return tile + 1 < k_tiles_ ? k_tile() : columns_ - first_column(tile);
  }
  // Where a block's weights begin in the planes. Always a multiple of 256.
  std::uint64_t first_weight(std::uint64_t group, std::uint64_t tile) const {
    return first_row(group) * padded_columns_ + height(group) * first_column(tile);
  }

 private:
  std::uint64_t rows_, columns_;
  Geometry geometry_;
  std::uint64_t row_groups_ = 0, k_tiles_ = 0;
  std::uint64_t padded_rows_ = 0, padded_columns_ = 0;
};

}  // namespace zipmoe
