#include "geometry.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace zipmoe {
namespace {

void check_sides(std::uint64_t rows, std::uint64_t columns) {
  if (!within_limits(rows, columns))
    throw std::invalid_argument("a matrix of " + std::to_string(rows) + " x " +
                                std::to_string(columns) + " weights is beyond the format's limits");
}

std::uint64_t ceil_div(std::uint64_t n, std::uint64_t unit) { return (n + unit - 1) / unit; }

}  // namespace

Geometry choose_geometry(std::uint64_t rows, std::uint64_t columns) {
  check_sides(rows, columns);
  if (rows == 0 || columns == 0) return {kPanelRows, kGroupWeights};
  constexpr std::uint64_t kWidest = kBlockWeights / kPanelRows;  // a tile of which 4 rows fit
  const std::uint64_t padded = ceil_to(columns, kGroupWeights);
  const std::uint64_t tiles = ceil_div(padded, kWidest);
  const std::uint64_t tile = ceil_to(ceil_div(padded, tiles), kGroupWeights);
  const std::uint64_t fits = kPanelRows * (kBlockWeights / (kPanelRows * tile));
  const std::uint64_t group = std::min(fits, ceil_to(rows, kPanelRows));
  return {static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(tile)};
}

bool within_limits(std::uint64_t rows, std::uint64_t columns) {
  return rows <= kMaxSide && columns <= kMaxSide && rows * columns <= kMaxWeights;
}

bool is_valid(Geometry geometry) {
  const std::uint64_t group = geometry.row_group, tile = geometry.k_tile;
  return group != 0 && tile != 0 && group % kPanelRows == 0 && tile % kGroupWeights == 0 &&
         group * tile <= kBlockWeights;
}

Grid::Grid(std::uint64_t rows, std::uint64_t columns, Geometry geometry)
    : rows_(rows), columns_(columns), geometry_(geometry) {
  check_sides(rows, columns);
  if (!is_valid(geometry))
    throw std::invalid_argument("row group " + std::to_string(geometry.row_group) +
                                " with k-tile " + std::to_string(geometry.k_tile) +
                                " is not allowed: multiples of 4 and of 64, product at most 8192");
  if (rows == 0 || columns == 0) return;
  row_groups_ = ceil_div(rows, geometry.row_group);
  k_tiles_ = ceil_div(columns, geometry.k_tile);
  padded_rows_ = ceil_to(rows, kPanelRows);
  padded_columns_ = ceil_to(columns, kGroupWeights);
}

}  // namespace zipmoe
