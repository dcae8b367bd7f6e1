#include "codec.h"

#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "error.h"
#include "integer_codec.h"
#include "kernels.h"
#include "parallel.h"
#include "rank_codec.h"
#include "shard_codec.h"

namespace zipmoe {
namespace {

static_assert(std::endian::native == std::endian::little, "the store's words are little-endian");

constexpr std::pair<Codec, std::string_view> kNames[] = {
    {Codec::raw, "raw"},     {Codec::rank223, "rank223"}, {Codec::rank3, "rank3"},
    {Codec::rank4, "rank4"}, {Codec::zstd, "zstd"},       {Codec::lz4hc, "lz4hc"},
    {Codec::int8, "int8"},   {Codec::int4, "int4"},       {Codec::int2, "int2"},
};
constexpr std::uint64_t kPage = 4096;
constexpr std::uint32_t kMaxElementBytes = 8;

bool is_sharded(Codec codec) { return codec == Codec::zstd || codec == Codec::lz4hc; }

void expect_length(std::span<const std::uint8_t> extent, std::uint64_t length, const char* plane) {
  if (extent.size() != length)
    throw CorruptError("the plane has " + std::to_string(extent.size()) +
                           " bytes where such a matrix has " + std::to_string(length),
                       plane);
}

void decode_raw(const MatrixSpec& spec, const Extents& extents, const Target& target,
                unsigned threads) {
  // Before anything is multiplied: the product of forged sides could wrap round to a real length.
  if (!within_limits(spec.rows, spec.columns) || spec.element_bytes > kMaxElementBytes)
    throw CorruptError("a matrix of such a size is beyond the format's limits");
  const std::uint64_t row_bytes = spec.columns * spec.element_bytes;
  expect_length(extents.sign_mantissa, spec.rows * row_bytes, kSignMantissaPlane);
  expect_length(extents.exponent, 0, kExponentPlane);
  if (row_bytes == 0) return;
  const std::ptrdiff_t stride = target.row_stride * static_cast<std::ptrdiff_t>(spec.element_bytes);
  parallel_ranges(spec.rows, threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t row = begin; row < end; ++row)
      std::memcpy(
          static_cast<std::uint8_t*>(target.data) + static_cast<std::ptrdiff_t>(row) * stride,
          extents.sign_mantissa.data() + row * row_bytes, row_bytes);
  });
}

void encode_raw(const Source& source, unsigned threads, Encoded& encoded) {
  encoded = Encoded{};
  encoded.sign_mantissa.resize(source.rows * source.columns * sizeof(std::uint16_t));
  auto* out = reinterpret_cast<std::uint16_t*>(encoded.sign_mantissa.data());
  parallel_ranges(source.rows, threads, [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t row = begin; row < end; ++row) {
      const std::uint16_t* from =
          source.data + static_cast<std::ptrdiff_t>(row) * source.row_stride;
      std::uint16_t* to = out + row * source.columns;
      for (std::uint64_t column = 0; column < source.columns;
           ++column, from += source.column_stride)
        to[column] = *from;
    }
  });
}

bool is_smaller_than_raw(const Encoded& encoded, const Source& source) {
  return ceil_to(encoded.sign_mantissa.size(), kPage) + ceil_to(encoded.exponent.size(), kPage) <
         ceil_to(source.rows * source.columns * sizeof(std::uint16_t), kPage);
}

Grid grid_of(const MatrixSpec& spec) {
  try {
    return Grid(spec.rows, spec.columns, spec.geometry);
  } catch (const std::invalid_argument& error) {
    throw CorruptError(error.what());
  }
}

}  // namespace

std::string_view name(Codec codec) {
  for (const auto& [known, text] : kNames)
    if (known == codec) return text;
  return "?";
}

Codec codec_from_name(std::string_view wanted) {
  for (const auto& [codec, text] : kNames)
    if (text == wanted) return codec;
  throw std::invalid_argument("codec '" + std::string(wanted) + "' is unknown");
}

Codec codec_from_id(std::uint64_t id) {
  for (const auto& [codec, text] : kNames)
    if (static_cast<std::uint64_t>(codec) == id) return codec;
  throw std::invalid_argument("codec id " + std::to_string(id) + " is unknown");
}

void decode(const MatrixSpec& spec, const Extents& extents, const Target& target, Isa isa,
            unsigned threads) {
  if (spec.codec == Codec::raw) return decode_raw(spec, extents, target, threads);
  if (spec.element_bytes != sizeof(std::uint16_t))
    throw CorruptError("codec " + std::string(name(spec.codec)) + " is for 2-byte elements only");
  const Grid grid = grid_of(spec);
  if (is_integer(spec.codec)) return decode_integers(spec.codec, grid, extents, target, threads);
  expect_length(extents.sign_mantissa, grid.weights(), kSignMantissaPlane);
  if (grid.blocks() == 0) return expect_length(extents.exponent, 0, kExponentPlane);
  if (is_sharded(spec.codec))
    decode_shards(spec.codec, grid, extents, target, kernels(isa), threads);
  else
    decode_rank(spec.codec, grid, extents, target, kernels(isa), threads);
}

std::uint64_t decode_scratch_bytes(const MatrixSpec& spec) {
  return is_sharded(spec.codec) ? grid_of(spec).weights() : 0;
}

Encoded encode(const Source& source, const EncodeOptions& options) {
  if (options.shards == 0 || options.shards > kMaxShards)
    throw std::invalid_argument("shards must be 1 to " + std::to_string(kMaxShards));
  if (options.scale_group != 0 && options.scale_group != kGroupWeights)
    throw std::invalid_argument("a scale is for 64 weights, or for a row (0)");
  Encoded encoded;
  if (options.codec == Codec::raw) {
    encode_raw(source, options.threads, encoded);
    return encoded;
  }
  encoded.codec = options.codec;
  encoded.geometry = options.geometry == Geometry{} ? choose_geometry(source.rows, source.columns)
                                                    : options.geometry;
  const Grid grid(source.rows, source.columns, encoded.geometry);
  if (is_integer(options.codec)) {
    encode_integers(source, grid, options, encoded);
    return encoded;
  }
  try {
    if (is_sharded(options.codec))
      encode_shards(source, grid, kernels(options.isa), options, encoded);
    else
      encode_rank(source, grid, kernels(options.isa), options.threads, encoded);
  } catch (const std::length_error&) {  // too large for the coded form, not for raw
    if (!options.allow_raw) throw;
    encode_raw(source, options.threads, encoded);
    return encoded;
  }
  if (options.allow_raw && !is_smaller_than_raw(encoded, source))
    encode_raw(source, options.threads, encoded);
  return encoded;
}

}  // namespace zipmoe
