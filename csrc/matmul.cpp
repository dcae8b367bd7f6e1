#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "error.h"
#include "rank_codec.h"
#include "scalar.h"

namespace zipmoe {
namespace {

// What is decoded before many columns are multiplied with it: no more than half a second cache.
constexpr std::uint64_t kManyRows = 32, kManyWeights = std::uint64_t{1} << 17;

// Rows of a decoded panel do not lie a power of two apart, for the reason given at column_stride.
constexpr std::uint32_t kPanelSkew = 32;

constexpr std::uint64_t kLineWeights = 32;  // of a line of memory

Columns part(const Columns& x, std::uint64_t first_weight, std::uint32_t first,
             std::uint32_t count) {
  return {x.data + first * x.stride + static_cast<std::ptrdiff_t>(first_weight), x.stride, count};
}

Sums part(const Sums& sums, std::uint64_t row, std::uint32_t column) {
  const auto at = static_cast<std::ptrdiff_t>(row) + column * sums.stride;
  return {sums.data + at * static_cast<std::ptrdiff_t>(kSums), sums.stride, sums.begin,
          sums.out == nullptr ? nullptr : sums.out + at};
}

// What is left of it after so many weights of each row, for so many more.
Ahead part(const Ahead& ahead, std::uint64_t first_weight, std::uint64_t weights) {
  const std::uint64_t done = first_weight / kLineWeights;
  if (done >= ahead.lines) return {};
  Ahead left{{}, std::min(ahead.lines - done, weights / kLineWeights)};
  for (std::size_t i = 0; i < std::size(left.stretches); ++i)
    left.stretches[i] = ahead.stretches[i] + first_weight * sizeof(std::uint16_t);
  return left;
}

// Of a piece of K: begun by the first one, complete with the last.
Sums of_piece(const Sums& sums, bool is_first, bool is_last) {
  return {sums.data, sums.stride, is_first, is_last ? sums.out : nullptr};
}

// A kernel of those for 2, 3 and 4-bit codes.
template <class Kernel>
Kernel by_codec(const PackedMatrix& matrix, Kernel two, Kernel three, Kernel four) {
  const Codec codec = matrix.spec().codec;
  return codec == Codec::rank223 ? two : codec == Codec::rank3 ? three : four;
}

}  // namespace

bool PackedMatrix::is_multiplied_packed(Codec codec) {
  return codec == Codec::raw || codec == Codec::rank223 || codec == Codec::rank3 ||
         codec == Codec::rank4 || is_integer(codec);
}

PackedMatrix::PackedMatrix(const MatrixSpec& spec, const Extents& extents)
    : spec_(spec), extents_(extents) {
  if (!is_multiplied_packed(spec.codec))
    throw std::invalid_argument("codec " + std::string(name(spec.codec)) +
                                " has to be decoded before it is multiplied");
  if (spec.element_bytes != sizeof(std::uint16_t))
    throw std::invalid_argument("only BF16 matrices are multiplied");
  if (!within_limits(spec.rows, spec.columns))
    throw CorruptError("a matrix of such a size is beyond the format's limits");
  std::uint64_t first = spec.rows * spec.columns * sizeof(std::uint16_t);
  if (spec.codec != Codec::raw) {
    if (!is_valid(spec.geometry)) throw CorruptError("the geometry is none of the format's");
    grid_.emplace(spec.rows, spec.columns, spec.geometry);
    first = grid_->weights();
  }
  if (is_integer(spec.codec)) {
    layout_.emplace(spec.codec, *grid_, extents.sign_mantissa.size(), extents.exponent.size());
    return;
  }
  if (extents.sign_mantissa.size() != first)
    throw CorruptError("the plane has " + std::to_string(extents.sign_mantissa.size()) +
                           " bytes where such a matrix has " + std::to_string(first),
                       kSignMantissaPlane);
  if (grid_ && grid_->blocks() != 0)
    codes_.emplace(extents.exponent, spec.codec, *grid_);
  else if (!extents.exponent.empty())
    throw CorruptError("there are codes where there are none to be", kExponentPlane);
}

IntegerBlock PackedMatrix::block(std::uint64_t group, std::uint64_t tile) const {
  const std::uint64_t first = grid_->first_weight(group, tile);
  return {extents_.sign_mantissa.data() + layout_->first_code_byte(first),
          layout_->has_row_scales() ? nullptr : scales() + first / kGroupWeights};
}

struct Multiplier::Strip {
  const PackedMatrix& matrix;
  std::uint64_t begin, end;  // rows, the end padded to whole panels
  Sums sums;

  [[nodiscard]] std::uint64_t height() const { return end - begin; }
};

struct Multiplier::Panels {
  const std::uint16_t* rows;
  std::ptrdiff_t stride;
  std::uint64_t height;
  std::uint32_t width;
  Ahead ahead;  // of the first panel; the same of each panel after it
};

Multiplier::Multiplier(Isa isa)
    : kernels_(kernels(isa)), dot_(dot_kernels(isa)), codes_(std::make_unique<BlockCodes>()) {}

float* Multiplier::values(unsigned which, std::size_t n) {
  return aligned_room<float>(values_[which], n);
}

void Multiplier::rows(const PackedMatrix& matrix, std::uint64_t begin, std::uint64_t end,
                      const Columns& x, float* y, std::ptrdiff_t stride) {
  if (matrix.columns() == 0) {
    for (std::uint32_t c = 0; c < x.count; ++c) std::fill_n(y + c * stride, end - begin, 0.0F);
    return;
  }
  if (x.count > kMostColumns) {
    for (std::uint32_t c = 0; c < x.count; c += kMostColumns)
      rows(matrix, begin, end, part(x, 0, c, std::min(kMostColumns, x.count - c)), y + c * stride,
           stride);
    return;
  }
  const std::uint64_t unit = matrix.row_unit();
  // In between, the columns take the first cache, and each row group goes there alone.
  const bool is_coded = x.count <= dot_.coded_columns;
  const bool together = is_coded || x.count >= dot_.many_columns || matrix.layout_.has_value();
  const std::uint64_t most = std::min(kManyRows, kManyWeights / matrix.columns());
  const std::uint64_t step = together ? std::max(unit, most / unit * unit) : unit;
  for (std::uint64_t row = begin; row < end; row += step) {
    const std::uint64_t real = std::min(step, end - row);
    const std::uint64_t height = ceil_to(real, kPanelRows);
    auto* sums = aligned_room<float>(sums_, height * x.count * (kSums + 1));
    float* outputs = sums + height * x.count * kSums;
    const Strip strip{
        matrix, row, row + height, {sums, static_cast<std::ptrdiff_t>(height), true, outputs}};
    if (!matrix.grid_)
      raw(strip, x);
    else if (matrix.layout_)
      integers(strip, x);
    else if (is_coded)
      fused(strip, x);
    else
      by_panels(strip, x);
    for (std::uint32_t c = 0; c < x.count; ++c) {
      float* out = y + c * stride + (row - begin);
      std::copy_n(outputs + c * height, real, out);
      if (matrix.layout_ && matrix.layout_->has_row_scales()) scale_rows(matrix, row, real, out);
    }
  }
}

ReadyBlock Multiplier::prepare(const PackedMatrix& matrix, std::uint64_t group,
                               std::uint64_t tile) {
  const Grid& grid = *matrix.grid_;
  const std::uint64_t first = grid.first_weight(group, tile);
  ReadyBlock ready =
      codes_->prepare(matrix.spec_.codec, *matrix.codes_, group * grid.k_tiles() + tile, first,
                      grid.height(group) * grid.width(tile), kernels_);
  ready.coded.sign_mantissa = matrix.extents_.sign_mantissa.data() + first;
  return ready;
}

// A product with padding is 0 times what the padding decodes to, which is a number unless the
// commonest exponent of the block is that of infinities.
static bool has_unsafe_padding(const Grid& grid, std::uint64_t tile, const ReadyBlock& ready) {
  return grid.real_width(tile) != grid.width(tile) && ready.coded.table[0] == 0xFF;
}

// The variable parts stand one behind the other too: what is as far ahead of this one as the kernel
// fetches of the other planes.
static void fetch_ahead(std::span<const std::uint8_t> variable) {
  constexpr std::size_t kLine = 64;
  for (std::size_t at = 0; at < variable.size(); at += kLine)
    __builtin_prefetch(variable.data() + kFetchAhead + at, 0, 2);
}

// A block of a strip, what of the columns it is multiplied with, and where the sums are.
struct Multiplier::Block {
  std::uint64_t group, tile;
  std::uint32_t height, width;
  Columns columns;
  Sums sums;
};

static Sums of_tile(const Sums& sums, const Grid& grid, std::uint64_t tile) {
  return of_piece(sums, tile == 0, tile + 1 == grid.k_tiles());
}

// The blocks of a strip in the order in which they lie.
template <class Work>
void Multiplier::for_blocks(const Strip& strip, const Columns& x, const Work& work) {
  const Grid& grid = *strip.matrix.grid_;
  for (std::uint64_t row = strip.begin; row < strip.end; row += grid.row_group()) {
    const std::uint64_t group = row / grid.row_group();
    const Sums sums = part(strip.sums, row - strip.begin, 0);
    for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile)
      work(Block{group, tile, static_cast<std::uint32_t>(grid.height(group)),
                 static_cast<std::uint32_t>(grid.width(tile)),
                 part(x, grid.first_column(tile), 0, x.count), of_tile(sums, grid, tile)});
  }
}

void Multiplier::fused(const Strip& strip, const Columns& x) {
  const auto multiply = by_codec(strip.matrix, dot_.coded2, dot_.coded3, dot_.coded4);
  auto* panel = aligned_room<std::uint16_t>(panel_, kBlockWeights);
  for_blocks(strip, x, [&](const Block& at) {
    multiply_block(strip.matrix, at, {panel, at.width, at.height, at.width, false},
                   [&](const CodedBlock& coded) {
                     return multiply(coded, at.height, at.width, at.columns, at.sums);
                   });
  });
}

// A block times a few columns by `multiply`, straight from the codes; where its padding is unsafe,
// decoded to `room` first.
template <class Multiply>
void Multiplier::multiply_block(const PackedMatrix& matrix, const Block& at,
                                const BlockTarget& room, const Multiply& multiply) {
  const ReadyBlock ready = prepare(matrix, at.group, at.tile);
  fetch_ahead(matrix.codes_->variable(ready.block));
  if (!has_unsafe_padding(*matrix.grid_, at.tile, ready)) {
    BlockCodes::finish(ready, multiply(ready.coded));
    return;
  }
  decode_tile(matrix, at.group, at.tile, room.out, room.stride);
  multiply_panels({room.out, room.stride, room.height, room.width, {}}, at.columns, at.sums);
}

// A few columns at a time, all rows of the strip: the columns stay in the first cache, and so do
// the codes as long as they are few. Where there are no more columns than that, the blocks are read
// as they lie.
void Multiplier::integers(const Strip& strip, const Columns& x) {
  const PackedMatrix& matrix = strip.matrix;
  const Grid& grid = *matrix.grid_;
  const Codec codec = matrix.spec_.codec;
  const MultiplyIntegers multiply = codec == Codec::int8   ? dot_.int8
                                    : codec == Codec::int4 ? dot_.int4
                                                           : dot_.int2;
  if (x.count <= kCodedColumns) {
    for_blocks(strip, x, [&](const Block& at) {
      multiply(matrix.block(at.group, at.tile), at.height, at.width, at.columns, at.sums);
    });
    return;
  }
  for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
    const Sums sums = of_tile(strip.sums, grid, tile);
    for (std::uint32_t c = 0; c < x.count; c += kCodedColumns) {
      const Columns few = part(x, grid.first_column(tile), c, std::min(kCodedColumns, x.count - c));
      for (std::uint64_t row = strip.begin; row < strip.end; row += grid.row_group()) {
        const std::uint64_t group = row / grid.row_group();
        multiply(matrix.block(group, tile), static_cast<std::uint32_t>(grid.height(group)),
                 static_cast<std::uint32_t>(grid.width(tile)), few,
                 part(sums, row - strip.begin, c));
      }
    }
  }
}

void Multiplier::scale_rows(const PackedMatrix& matrix, std::uint64_t begin, std::uint64_t count,
                            float* y) {
  for (std::uint64_t row = 0; row < count; ++row) y[row] *= from_bf16(matrix.scales()[begin + row]);
}

// Decode a block; its padding columns become 0.
void Multiplier::decode_tile(const PackedMatrix& matrix, std::uint64_t group, std::uint64_t tile,
                             std::uint16_t* panel, std::ptrdiff_t stride) {
  const Grid& grid = *matrix.grid_;
  const ReadyBlock ready = prepare(matrix, group, tile);
  const BlockTarget target{panel, stride, static_cast<std::uint32_t>(grid.height(group)),
                           static_cast<std::uint32_t>(grid.width(tile)), false};
  BlockCodes::finish(ready, merge(matrix.spec_.codec, ready.coded, target, kernels_));
  const std::uint64_t real = grid.real_width(tile);
  if (real == target.width) return;
  for (std::uint32_t row = 0; row < target.height; ++row)
    std::fill(panel + row * stride + real, panel + row * stride + target.width, std::uint16_t{0});
}

// What decoding the next block will read: three quarters of it, the rest being codes of inner
// levels.
static Ahead ahead_of(const Grid& grid, const RankExtent& codes, const std::uint8_t* sign_mantissa,
                      std::uint64_t block_end, std::uint32_t width) {
  if (block_end >= grid.weights()) return {};
  constexpr std::size_t kLine = 64;
  const std::uint64_t weights =
      std::min(grid.weights() - block_end, std::uint64_t{kPanelRows} * width);
  const std::uint64_t third = weights / 3 / kLine * kLine;
  const std::uint8_t* first = sign_mantissa + block_end;
  return {{first, first + third, first + 2 * third, codes.codes(block_end)},
          std::min<std::size_t>(weights / 3 / kLine, width / kLineWeights)};
}

// Where a kernel keeps what it decodes, the first columns are multiplied meanwhile: both together
// take less than decoding first, which leaves the units idle that multiply.
void Multiplier::by_panels(const Strip& strip, const Columns& x) {
  const PackedMatrix& matrix = strip.matrix;
  const Grid& grid = *matrix.grid_;
  const auto keep = by_codec(matrix, dot_.keep2, dot_.keep3, dot_.keep4);
  const std::uint64_t stride = ceil_to(matrix.columns(), kGroupWeights) + kPanelSkew;
  auto* room = aligned_room<std::uint16_t>(panel_, strip.height() * stride);
  std::uint64_t end = 0;
  for_blocks(strip, part(x, 0, 0, std::min(kCodedColumns, x.count)), [&](const Block& at) {
    const std::uint64_t row = grid.first_row(at.group) - strip.begin;
    const BlockTarget target{room + row * stride + grid.first_column(at.tile),
                             static_cast<std::ptrdiff_t>(stride), at.height, at.width, false};
    if (keep)
      multiply_block(matrix, at, target, [&](const CodedBlock& coded) {
        return keep(coded, target, at.columns, at.sums);
      });
    else
      decode_tile(matrix, at.group, at.tile, target.out, target.stride);
    end = grid.first_weight(at.group, at.tile) + std::uint64_t{at.height} * at.width;
  });
  const std::uint32_t done = keep ? kCodedColumns : 0;
  const std::uint64_t last = grid.k_tiles() - 1;
  const auto width = static_cast<std::uint32_t>(grid.first_column(last) + grid.width(last));
  Panels panels{room, static_cast<std::ptrdiff_t>(stride), strip.height(), width, {}};
  if (!keep)
    panels.ahead = ahead_of(grid, *matrix.codes_, matrix.extents_.sign_mantissa.data(), end, width);
  multiply_panels(panels, part(x, 0, done, x.count - done), part(strip.sums, 0, done));
}

// A few columns at a time, of no more weights than stay in a near cache, all rows of the strip.
void Multiplier::multiply_panels(const Panels& panels, const Columns& x, const Sums& sums) {
  const std::uint32_t tiles = (x.count + kPanelColumns - 1) / kPanelColumns;
  for (std::uint32_t k = 0; k < panels.width; k += dot_.panel_weights) {
    const std::uint32_t width = std::min(dot_.panel_weights, panels.width - k);
    const Sums of_k = of_piece(sums, sums.begin && k == 0, k + width == panels.width);
    for (std::uint32_t tile = 0; tile < tiles; ++tile) {
      const std::uint32_t first = x.count * tile / tiles, end = x.count * (tile + 1) / tiles;
      const Columns few = part(x, k, first, end - first);
      for (std::uint64_t row = 0; row < panels.height; row += kPanelRows)
        dot_.panel(panels.rows + static_cast<std::ptrdiff_t>(row) * panels.stride + k,
                   panels.stride, width, few, part(of_k, row, first),
                   tile == 0 && row == 0 ? part(panels.ahead, k, width) : Ahead{});
    }
  }
}

// Rows as they lie. Rows that end inside a group of 64, and the rows of an incomplete panel, are
// copied to where zeros follow.
void Multiplier::raw(const Strip& strip, const Columns& x) {
  const std::uint64_t columns = strip.matrix.columns(), rows = strip.matrix.rows();
  const auto* data =
      reinterpret_cast<const std::uint16_t*>(strip.matrix.extents_.sign_mantissa.data());
  const auto width = static_cast<std::uint32_t>(ceil_to(columns, kGroupWeights));
  Panels panels{data + strip.begin * columns,
                static_cast<std::ptrdiff_t>(columns),
                strip.height(),
                width,
                {}};
  if (columns != width || strip.end > rows) {
    auto* panel = aligned_room<std::uint16_t>(panel_, strip.height() * width);
    std::memset(panel, 0, strip.height() * width * sizeof *panel);
    for (std::uint64_t row = strip.begin; row < std::min(strip.end, rows); ++row)
      std::memcpy(panel + (row - strip.begin) * width, data + row * columns,
                  columns * sizeof *panel);
    panels.rows = panel;
    panels.stride = width;
  } else if (strip.end + kPanelRows <= rows) {
    const std::uint16_t* next = data + strip.end * columns;
    for (std::size_t row = 0; row < kPanelRows; ++row)
      panels.ahead.stretches[row] = reinterpret_cast<const std::uint8_t*>(next + row * columns);
    panels.ahead.lines = width / kLineWeights;
  }
  if (dot_.rows != nullptr && x.count <= kCodedColumns)
    multiply_rows(panels, x, strip.sums);
  else
    multiply_panels(panels, x, strip.sums);
}

// Four columns stay in the first cache where rows are cut as for blocks, fewer at any length.
void Multiplier::multiply_rows(const Panels& panels, const Columns& x, const Sums& sums) {
  const std::uint32_t most =
      x.count == kCodedColumns ? choose_geometry(panels.height, panels.width).k_tile : panels.width;
  for (std::uint32_t k = 0; k < panels.width; k += most) {
    const std::uint32_t width = std::min(most, panels.width - k);
    const Sums of_k = of_piece(sums, k == 0, k + width == panels.width);
    for (std::uint64_t row = 0; row < panels.height; row += kPanelRows)
      dot_.rows(panels.rows + static_cast<std::ptrdiff_t>(row) * panels.stride + k, panels.stride,
                width, part(x, k, 0, x.count), part(of_k, row, 0));
  }
}

void Multiplier::decode_row(const PackedMatrix& matrix, std::uint64_t row, std::uint16_t* out) {
  if (!matrix.grid_) {
    const std::uint64_t bytes = matrix.columns() * sizeof *out;
    std::memcpy(out, matrix.extents_.sign_mantissa.data() + row * bytes, bytes);
    return;
  }
  if (matrix.layout_)
    throw std::invalid_argument("rows of integer codes are not decoded one by one");
  const Grid& grid = *matrix.grid_;
  const std::uint64_t group = row / grid.row_group();
  const Strip strip{matrix, grid.first_row(group), grid.first_row(group) + grid.height(group), {}};
  auto* panel = aligned_room<std::uint16_t>(panel_, kBlockWeights);
  for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
    const auto width = static_cast<std::ptrdiff_t>(grid.width(tile));
    decode_tile(matrix, group, tile, panel, width);
    std::memcpy(out + grid.first_column(tile),
                panel + static_cast<std::ptrdiff_t>(row - strip.begin) * width,
                grid.real_width(tile) * sizeof *out);
  }
}

bool are_ready(const Input& input, std::uint64_t weights) {
  // Whole pages apart, columns get in each other's way: half the speed of AVX2 at four of them.
  constexpr std::ptrdiff_t kPageWeights = 4096 / sizeof(std::uint16_t);
  const bool is_apart = input.count == 1 || input.stride % kPageWeights != 0;
  return weights % kGroupWeights == 0 && input.count <= kCodedColumns && is_apart;
}

void copy_column(const std::uint16_t* from, std::uint64_t weights, std::uint16_t* to) {
  std::memcpy(to, from, weights * sizeof *to);
  std::fill(to + weights, to + column_stride(weights), std::uint16_t{0});
}

}  // namespace zipmoe
