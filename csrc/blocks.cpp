#include "blocks.h"

#include <algorithm>
#include <cstring>

namespace zipmoe {
namespace {

// A cache line of words: strips of so many rows use each line that they touch to its end.
constexpr std::uint64_t kLineWords = 32;

// From this size on a matrix is written past the caches.
constexpr std::uint64_t kStreamBytes = std::uint64_t{1} << 20;

// A square of the source, transposed; written out by whole lines, because the rows of the target
// may lie a power of two apart and would evict each other from the cache.
struct Tile {
  std::uint16_t words[kLineWords][kLineWords];

  void read(const std::uint16_t* from, const Source& source, std::uint64_t rows,
            std::uint64_t columns) {
    for (std::uint64_t c = 0; c < columns; ++c, from += source.column_stride) {
      if (source.row_stride == 1) {
        for (std::uint64_t r = 0; r < rows; ++r) words[r][c] = from[r];
      } else {
        const std::uint16_t* word = from;
        for (std::uint64_t r = 0; r < rows; ++r, word += source.row_stride) words[r][c] = *word;
      }
    }
  }
};

// out[r * columns + c] = element (first_row + r, c).
void transpose(const Source& source, std::uint64_t first_row, std::uint64_t rows,
               std::uint16_t* out) {
  Tile tile;
  for (std::uint64_t c = 0; c < source.columns; c += kLineWords) {
    const std::uint64_t width = std::min(kLineWords, source.columns - c);
    for (std::uint64_t r = 0; r < rows; r += kLineWords) {
      const std::uint64_t height = std::min(kLineWords, rows - r);
      tile.read(source.data + static_cast<std::ptrdiff_t>(c) * source.column_stride +
                    static_cast<std::ptrdiff_t>(first_row + r) * source.row_stride,
                source, height, width);
      for (std::uint64_t k = 0; k < height; ++k)
        std::memcpy(out + (r + k) * source.columns + c, tile.words[k], width * sizeof *out);
    }
  }
}

bool is_line_aligned(const Target& target) {
  const auto address = reinterpret_cast<std::uintptr_t>(target.data);
  return address % 64 == 0 && target.row_stride % static_cast<std::ptrdiff_t>(kLineWords) == 0;
}

}  // namespace

BlockWriter::BlockWriter(const Grid& grid, const Target& target, const Kernels& kernels)
    : grid_(grid),
      target_(target),
      kernels_(kernels),
      stream_(grid.rows() * grid.columns() * sizeof(std::uint16_t) >= kStreamBytes &&
              is_line_aligned(target)),
      words_{} {}

// Also on the way out of a failure: whoever catches it may read what was written.
BlockWriter::~BlockWriter() {
  if (stream_) kernels_.fence();
}

std::uint16_t* BlockWriter::place(std::uint64_t group, std::uint64_t tile) const {
  return static_cast<std::uint16_t*>(target_.data) +
         static_cast<std::ptrdiff_t>(grid_.first_row(group)) * target_.row_stride +
         static_cast<std::ptrdiff_t>(grid_.first_column(tile));
}

bool BlockWriter::is_whole(std::uint64_t group, std::uint64_t tile) const {
  return grid_.real_height(group) == grid_.height(group) &&
         grid_.real_width(tile) == grid_.width(tile);
}

BlockTarget BlockWriter::begin(std::uint64_t group, std::uint64_t tile) {
  BlockTarget target{};
  target.height = static_cast<std::uint32_t>(grid_.height(group));
  target.width = static_cast<std::uint32_t>(grid_.width(tile));
  if (is_whole(group, tile)) {
    target.out = place(group, tile);
    target.stride = target_.row_stride;
    target.stream = stream_;
  } else {
    target.out = words_.data();
    target.stride = static_cast<std::ptrdiff_t>(grid_.width(tile));
  }
  return target;
}

void BlockWriter::end(std::uint64_t group, std::uint64_t tile) {
  if (is_whole(group, tile)) return;
  std::uint16_t* out = place(group, tile);
  const std::uint16_t* from = words_.data();
  for (std::uint64_t row = 0; row < grid_.real_height(group); ++row) {
    std::memcpy(out, from, grid_.real_width(tile) * sizeof *out);
    out += target_.row_stride;
    from += grid_.width(tile);
  }
}

BlockReader::BlockReader(const Grid& grid, const Source& source, const Kernels& kernels)
    : grid_(grid), source_(source), kernels_(kernels), words_{} {}

std::uint64_t BlockReader::strip_groups() const {
  return std::max<std::uint64_t>(1, kLineWords / grid_.row_group());
}

void BlockReader::gather(std::uint64_t group) {
  strip_begin_ = group;
  strip_end_ = std::min(group + strip_groups(), grid_.row_groups());
  const std::uint64_t first = grid_.first_row(group);
  const std::uint64_t rows = std::min(grid_.first_row(strip_end_), grid_.rows()) - first;
  strip_.resize(rows * grid_.columns() * sizeof(std::uint16_t));
  transpose(source_, first, rows, reinterpret_cast<std::uint16_t*>(strip_.data()));
}

void BlockReader::read(std::uint64_t group, std::uint64_t tile, std::uint8_t* sign_mantissa,
                       BlockPlanes& planes) {
  const std::uint64_t height = grid_.height(group), width = grid_.width(tile);
  const std::uint64_t real_height = grid_.real_height(group), real_width = grid_.real_width(tile);
  const std::uint16_t* words;
  std::ptrdiff_t stride;
  if (source_.column_stride == 1) {
    stride = source_.row_stride;
    words = source_.data + static_cast<std::ptrdiff_t>(grid_.first_row(group)) * stride;
  } else {
    if (group < strip_begin_ || group >= strip_end_) gather(group);
    stride = static_cast<std::ptrdiff_t>(grid_.columns());
    words = reinterpret_cast<const std::uint16_t*>(strip_.data()) +
            (grid_.first_row(group) - grid_.first_row(strip_begin_)) * grid_.columns();
  }
  words += grid_.first_column(tile);
  if (real_height != height || real_width != width) {
    words_.fill(0);
    for (std::uint64_t row = 0; row < real_height; ++row)
      std::memcpy(words_.data() + row * width, words + static_cast<std::ptrdiff_t>(row) * stride,
                  real_width * sizeof *words);
    words = words_.data();
    stride = static_cast<std::ptrdiff_t>(width);
  }
  planes.weights = height * width;
  planes.padding = planes.weights - real_height * real_width;
  kernels_.split(words, stride, static_cast<std::uint32_t>(height),
                 static_cast<std::uint32_t>(width), sign_mantissa, planes.exponents.data());
}

}  // namespace zipmoe
