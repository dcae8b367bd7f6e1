// The codecs behind one interface: docs/format.md sections 5 to 7.
// Knows matrices and extents; knows neither files nor Python.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "buffer.h"
#include "geometry.h"
#include "isa.h"

namespace zipmoe {

// The ids of the format.
enum class Codec : std::uint16_t {
  raw = 0,
  rank223 = 1,
  rank3 = 2,
  rank4 = 3,
  zstd = 4,
  lz4hc = 5,
  int8 = 6,  // these three are lossy
  int4 = 7,
  int2 = 8
};

std::string_view name(Codec codec);
// Throw std::invalid_argument, naming what is unknown.
Codec codec_from_name(std::string_view name);
Codec codec_from_id(std::uint64_t id);

constexpr bool is_integer(Codec codec) {
  return codec == Codec::int8 || codec == Codec::int4 || codec == Codec::int2;
}
// Bits of extent 0 for each weight of a coded matrix.
constexpr unsigned code_bits(Codec codec) {
  return codec == Codec::int4 ? 4 : codec == Codec::int2 ? 2 : 8;
}

// What an index entry says of a matrix.
struct MatrixSpec {
  Codec codec = Codec::raw;
  std::uint64_t rows = 0;
  std::uint64_t columns = 0;
  Geometry geometry;                // ignored for raw
  std::uint32_t element_bytes = 2;  // other than 2 only for raw
};

// The exact bytes of both extents, without padding to 4096. Nothing beyond them is read. Any
// alignment; 64 is fastest. Integer codecs have their codes and their scales there.
struct Extents {
  std::span<const std::uint8_t> sign_mantissa;  // extent 0
  std::span<const std::uint8_t> exponent;       // extent 1
};

// Where the weights go: rows of `columns` elements, `row_stride` elements apart.
struct Target {
  void* data = nullptr;
  std::ptrdiff_t row_stride = 0;
};

// Decode a matrix. Throws CorruptError (plane filled in) where the bytes are no valid coding of
// such a matrix; the target's content is undefined then, but nothing outside it is touched.
void decode(const MatrixSpec& spec, const Extents& extents, const Target& target, Isa isa,
            unsigned threads = 1);

// What decode allocates while it runs, beyond a few tens of KiB per thread.
std::uint64_t decode_scratch_bytes(const MatrixSpec& spec);

// A BF16 matrix to encode, given as its bits. Strides in elements, of any sign.
struct Source {
  const std::uint16_t* data = nullptr;
  std::uint64_t rows = 0;
  std::uint64_t columns = 0;
  std::ptrdiff_t row_stride = 0;
  std::ptrdiff_t column_stride = 1;
};

struct EncodeOptions {
  Codec codec = Codec::rank223;
  Geometry geometry;        // {0, 0}: as choose_geometry
  unsigned shards = 3;      // of the exponent plane: zstd and lz4hc
  unsigned threads = 1;     // does not change the bytes
  Isa isa = Isa::portable;  // does not change the bytes
  // Store raw where the coded form takes no less space; integers stay what was asked for.
  bool allow_raw = true;
  // Weights of a row that share a scale, 64, or 0 for all of it: integer codecs.
  std::uint32_t scale_group = 64;
};

struct Encoded {
  Codec codec = Codec::raw;
  Geometry geometry;  // {0, 0} for raw
  Buffer sign_mantissa;
  Buffer exponent;
};

// Throws std::invalid_argument for options the format does not allow, std::length_error where the
// coded form does not fit the format (over 4 GiB of variable part) and raw is not allowed,
// std::domain_error for weights that integers cannot stand for: infinities and NaN.
Encoded encode(const Source& source, const EncodeOptions& options);

}  // namespace zipmoe
