// Products straight from the packed planes: docs/kernels.md.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "buffer.h"
#include "codec.h"
#include "dot.h"
#include "geometry.h"
#include "integer_codec.h"
#include "rank_blocks.h"
#include "rank_layout.h"

namespace zipmoe {

// A BF16 matrix as it lies in memory, its fixed parts checked. Does not own its extents.
class PackedMatrix {
 public:
  // Throws CorruptError where the extents are no such matrix, std::invalid_argument for codecs that
  // have to be decoded whole (zstd, lz4hc) and for elements that are not BF16.
  PackedMatrix(const MatrixSpec& spec, const Extents& extents);
  // True for codecs that this class takes.
  static bool is_multiplied_packed(Codec codec);

  [[nodiscard]] std::uint64_t rows() const { return spec_.rows; }
  [[nodiscard]] std::uint64_t columns() const { return spec_.columns; }
  [[nodiscard]] const MatrixSpec& spec() const { return spec_; }
  // Products start at multiples of it.
  [[nodiscard]] std::uint64_t row_unit() const { return grid_ ? grid_->row_group() : kPanelRows; }

 private:
  friend class Multiplier;
  // Of an integer codec.
  [[nodiscard]] IntegerBlock block(std::uint64_t group, std::uint64_t tile) const;
  [[nodiscard]] const std::uint16_t* scales() const {
    return reinterpret_cast<const std::uint16_t*>(extents_.exponent.data());
  }
  MatrixSpec spec_;
  Extents extents_;
  std::optional<Grid> grid_;             // none for raw
  std::optional<RankExtent> codes_;      // of a rank codec, where there are weights
  std::optional<IntegerLayout> layout_;  // of an integer codec
};

// BF16 columns to multiply with, x[c * stride + k], as they come: nothing beyond the last k is
// read.
struct Input {
  const std::uint16_t* data;
  std::ptrdiff_t stride;
  std::uint64_t count;
};

// More are multiplied in turns, each of which decodes the weights, or their sums would leave the
// second cache.
inline constexpr std::uint32_t kMostColumns = 512;

// What a thread needs to multiply. Allocates when it grows, never otherwise.
class Multiplier {
 public:
  explicit Multiplier(Isa isa);

  // y[c * stride + r - begin] = the products of rows begin..end (begin a multiple of row_unit(),
  // end too or the last row) with `x`, columns ready: readable and 0 up to a multiple of 64 of K.
  void rows(const PackedMatrix& matrix, std::uint64_t begin, std::uint64_t end, const Columns& x,
            float* y, std::ptrdiff_t stride);
  // One row, decoded.
  void decode_row(const PackedMatrix& matrix, std::uint64_t row, std::uint16_t* out);

  [[nodiscard]] const DotKernels& dot() const { return dot_; }
  // Room for n floats, the content undefined. Two of them, for gate and up.
  float* values(unsigned which, std::size_t n);

 private:
  struct Strip;  // consecutive row groups of one matrix
  struct Block;  // a part of them
  template <class Work>
  static void for_blocks(const Strip& strip, const Columns& x, const Work& work);
  void fused(const Strip& strip, const Columns& x);
  void by_panels(const Strip& strip, const Columns& x);
  template <class Multiply>
  void multiply_block(const PackedMatrix& matrix, const Block& at, const BlockTarget& room,
                      const Multiply& multiply);
  void integers(const Strip& strip, const Columns& x);
  void raw(const Strip& strip, const Columns& x);
  static void scale_rows(const PackedMatrix& matrix, std::uint64_t begin, std::uint64_t count,
                         float* y);
  void decode_tile(const PackedMatrix& matrix, std::uint64_t group, std::uint64_t tile,
                   std::uint16_t* panel, std::ptrdiff_t stride);
  ReadyBlock prepare(const PackedMatrix& matrix, std::uint64_t group, std::uint64_t tile);
  struct Panels;  // decoded rows
  void multiply_panels(const Panels& panels, const Columns& x, const Sums& sums);
  void multiply_rows(const Panels& panels, const Columns& x, const Sums& sums);

  const Kernels& kernels_;
  const DotKernels& dot_;
  std::unique_ptr<BlockCodes> codes_;
  Buffer panel_, sums_, values_[2];
};

// Elements from one column to the next that Multiplier::rows likes best: a multiple of 64 bytes,
// and an odd one, because columns a power of two apart evict each other from the first cache.
constexpr std::uint64_t column_stride(std::uint64_t weights) {
  return ceil_to(weights, kGroupWeights) + kGroupWeights / 2;
}

// Whether columns are ready for Multiplier::rows as they are, and as good as copies.
bool are_ready(const Input& input, std::uint64_t weights);
// A copy of one that is: column_stride(weights) words at `to`.
void copy_column(const std::uint16_t* from, std::uint64_t weights, std::uint16_t* to);

}  // namespace zipmoe
