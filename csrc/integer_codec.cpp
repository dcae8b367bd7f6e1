#include "integer_codec.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "blocks.h"
#include "error.h"
#include "integer_codes.h"
#include "integer_scale.h"
#include "parallel.h"
#include "scalar.h"

namespace zipmoe {
namespace {

constexpr std::uint16_t kInfinity = 0x7F80;

// A row's weights in FP32, and what becomes of them.
struct Row {
  std::vector<float> weights;
  std::vector<std::int8_t> integers;
};

void read_row(const Source& source, std::uint64_t row, Row& out) {
  const std::uint16_t* from = source.data + static_cast<std::ptrdiff_t>(row) * source.row_stride;
  for (std::uint64_t column = 0; column < source.columns; ++column, from += source.column_stride) {
    if ((*from & kInfinity) == kInfinity)
      throw std::domain_error("row " + std::to_string(row) + ", column " + std::to_string(column) +
                              ": an infinity or NaN has no integer");
    out.weights[column] = from_bf16(*from);
  }
}

template <unsigned kBits>
class IntegerEncoder {
 public:
  IntegerEncoder(const Source& source, const Grid& grid, std::uint32_t scale_group,
                 Encoded& encoded)
      : source_(source),
        grid_(grid),
        scale_group_(scale_group),
        codes_(encoded.sign_mantissa.data()),
        scales_(reinterpret_cast<std::uint16_t*>(encoded.exponent.data())),
        row_{std::vector<float>(source.columns), std::vector<std::int8_t>(source.columns)} {}

  void operator()(std::uint64_t group) {
    for (std::uint64_t r = 0; r < grid_.real_height(group); ++r) {
      const std::uint64_t row = grid_.first_row(group) + r;
      read_row(source_, row, row_);
      if (scale_group_ == 0) scales_[row] = quantise(0, source_.columns);
      for (std::uint64_t tile = 0; tile < grid_.k_tiles(); ++tile) put_tile(group, tile, r);
    }
  }

 private:
  std::uint16_t quantise(std::uint64_t begin, std::uint64_t count) {
    const std::span<const float> weights(row_.weights.data() + begin, count);
    const std::uint16_t scale = choose_scale(weights, kBits);
    to_integers(weights, kBits, scale, row_.integers.data() + begin);
    return scale;
  }

  void put_tile(std::uint64_t group, std::uint64_t tile, std::uint64_t row_in_block) {
    const std::uint64_t width = grid_.width(tile), real = grid_.real_width(tile);
    const auto row = static_cast<unsigned>(row_in_block % kPanelRows);
    for (std::uint64_t k = 0; k < real; k += kGroupWeights) {
      const std::uint64_t at = grid_.first_weight(group, tile) +
                               row_in_block / kPanelRows * kPanelRows * width + kPanelRows * k;
      const std::uint64_t count = std::min(kGroupWeights, real - k);
      const std::uint64_t column = grid_.first_column(tile) + k;
      if (scale_group_ != 0) scales_[at / kGroupWeights + row] = quantise(column, count);
      put_codes(codes_ + at * kBits / 8, row, row_.integers.data() + column, count);
    }
  }

  static void put_codes(std::uint8_t* chunk, unsigned row, const std::int8_t* integers,
                        std::uint64_t count) {
    constexpr unsigned kMask = (1U << kBits) - 1;
    for (unsigned w = 0; w < count; ++w) {
      const int code = kBits == 2 ? (integers[w] - 1) / 2 : integers[w];
      const CodePlace place = code_place<kBits>(row, w);
      chunk[place.byte] |=
          static_cast<std::uint8_t>((static_cast<unsigned>(code) & kMask) << place.shift);
    }
  }

  const Source& source_;
  const Grid& grid_;
  std::uint32_t scale_group_;
  std::uint8_t* codes_;
  std::uint16_t* scales_;
  Row row_;
};

template <unsigned kBits>
void encode_rows(const Source& source, const Grid& grid, const EncodeOptions& options,
                 Encoded& encoded) {
  parallel_ranges(grid.row_groups(), options.threads,
                  [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
                    IntegerEncoder<kBits> encode_group(source, grid, options.scale_group, encoded);
                    for (std::uint64_t group = begin; group < end; ++group) encode_group(group);
                  });
}

// The decoder of one block.
template <unsigned kBits>
void decode_block(const IntegerBlock& block, const std::uint16_t* row_scales,
                  const BlockTarget& target) {
  const std::uint8_t* chunk = block.codes;
  std::size_t group = 0;
  std::int8_t integers[kGroupWeights];
  for (std::uint32_t row = 0; row < target.height; row += kPanelRows)
    for (std::uint32_t column = 0; column < target.width; column += kGroupWeights) {
      for (unsigned r = 0; r < kPanelRows; ++r, ++group) {
        read_integers<kBits>(chunk, r, integers);
        const float scale =
            from_bf16(block.scales == nullptr ? row_scales[row + r] : block.scales[group]);
        std::uint16_t* out = target.out + static_cast<std::ptrdiff_t>(row + r) * target.stride +
                             static_cast<std::ptrdiff_t>(column);
        for (unsigned w = 0; w < kGroupWeights; ++w)
          out[w] = to_bf16(static_cast<float>(integers[w]) * scale);
      }
      chunk += kChunkBytes<kBits>;
    }
}

// Its negative is no code, and kernels take it for 0.
void check_codes(std::span<const std::uint8_t> codes) {
  constexpr int kNoCode = 0x80;
  if (const void* found = std::memchr(codes.data(), kNoCode, codes.size()))
    throw CorruptError("byte " +
                           std::to_string(static_cast<const std::uint8_t*>(found) - codes.data()) +
                           " is -128, which is no code",
                       kCodesPlane);
}

// Every one of them, before any weight is given out.
void check_scales(std::span<const std::uint8_t> scales) {
  for (std::size_t at = 0; at < scales.size(); at += sizeof(std::uint16_t)) {
    std::uint16_t scale;
    std::memcpy(&scale, scales.data() + at, sizeof scale);
    if (scale >= kInfinity)
      throw CorruptError(
          "scale " + std::to_string(at / sizeof scale) + " is negative or not finite",
          kScalesPlane);
  }
}

}  // namespace

IntegerLayout::IntegerLayout(Codec codec, const Grid& grid, std::uint64_t codes_length,
                             std::uint64_t scales_length)
    : bits_(code_bits(codec)), has_row_scales_(scales_length == scales_bytes(grid, 0)) {
  const auto expect = [](std::uint64_t found, std::uint64_t wanted, const char* plane) {
    if (found != wanted)
      throw CorruptError("the plane has " + std::to_string(found) +
                             " bytes where such a matrix has " + std::to_string(wanted),
                         plane);
  };
  expect(codes_length, codes_bytes(codec, grid), kCodesPlane);
  if (!has_row_scales_) expect(scales_length, scales_bytes(grid, kGroupWeights), kScalesPlane);
}

void decode_integers(Codec codec, const Grid& grid, const Extents& extents, const Target& target,
                     unsigned threads) {
  const IntegerLayout layout(codec, grid, extents.sign_mantissa.size(), extents.exponent.size());
  if (codec == Codec::int8 && !extents.sign_mantissa.empty()) check_codes(extents.sign_mantissa);
  check_scales(extents.exponent);
  if (grid.blocks() == 0) return;
  // Extents may come at any address.
  std::vector<std::uint16_t> scales(extents.exponent.size() / sizeof(std::uint16_t));
  std::memcpy(scales.data(), extents.exponent.data(), extents.exponent.size());
  const auto decode_one = codec == Codec::int8   ? decode_block<8>
                          : codec == Codec::int4 ? decode_block<4>
                                                 : decode_block<2>;
  parallel_ranges(
      grid.row_groups(), threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
        BlockWriter writer(grid, target, kernels(Isa::portable));
        for (std::uint64_t group = begin; group < end; ++group)
          for (std::uint64_t tile = 0; tile < grid.k_tiles(); ++tile) {
            const std::uint64_t first = grid.first_weight(group, tile);
            const IntegerBlock block{
                extents.sign_mantissa.data() + layout.first_code_byte(first),
                layout.has_row_scales() ? nullptr : scales.data() + first / kGroupWeights};
            decode_one(block, scales.data() + grid.first_row(group), writer.begin(group, tile));
            writer.end(group, tile);
          }
      });
}

void encode_integers(const Source& source, const Grid& grid, const EncodeOptions& options,
                     Encoded& encoded) {
  if (grid.blocks() == 0) return;
  // Padding has the code 0, and a scale of 0 where a group is nothing else.
  const auto fill_zero = [](Buffer& buffer, std::uint64_t bytes) {
    buffer.resize(bytes);
    std::memset(buffer.data(), 0, bytes);
  };
  fill_zero(encoded.sign_mantissa, IntegerLayout::codes_bytes(options.codec, grid));
  fill_zero(encoded.exponent, IntegerLayout::scales_bytes(grid, options.scale_group));
  if (options.codec == Codec::int8) return encode_rows<8>(source, grid, options, encoded);
  if (options.codec == Codec::int4) return encode_rows<4>(source, grid, options, encoded);
  encode_rows<2>(source, grid, options, encoded);
}

}  // namespace zipmoe
