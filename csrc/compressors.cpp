#include "compressors.h"

// The literal compression mode is one of zstd's "experimental" parameters. Only encoding needs it.
#define ZSTD_STATIC_LINKING_ONLY
#include <lz4.h>
#include <lz4hc.h>
#include <zstd.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

namespace zipmoe {
namespace {

// docs/decisions/0003-zstd-and-lz4-settings.md
constexpr int kZstdLevel = -100;
constexpr int kLz4Level = 9;

struct FreeContext {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
};

std::size_t zstd_checked(std::size_t result) {
  if (ZSTD_isError(result) != 0)
    throw std::runtime_error(std::string("zstd: ") + ZSTD_getErrorName(result));
  return result;
}

std::size_t compress_zstd(std::span<const std::uint8_t> in, std::span<std::uint8_t> out) {
  const std::unique_ptr<ZSTD_CCtx, FreeContext> context(ZSTD_createCCtx());
  if (!context) throw std::bad_alloc();
  zstd_checked(ZSTD_CCtx_setParameter(context.get(), ZSTD_c_compressionLevel, kZstdLevel));
  zstd_checked(
      ZSTD_CCtx_setParameter(context.get(), ZSTD_c_literalCompressionMode, ZSTD_lcm_huffman));
  return zstd_checked(ZSTD_compress2(context.get(), out.data(), out.size(), in.data(), in.size()));
}

std::size_t compress_lz4(std::span<const std::uint8_t> in, std::span<std::uint8_t> out) {
  const int length =
      LZ4_compress_HC(reinterpret_cast<const char*>(in.data()), reinterpret_cast<char*>(out.data()),
                      static_cast<int>(in.size()), static_cast<int>(out.size()), kLz4Level);
  if (length <= 0) throw std::runtime_error("lz4: compression failed");
  return static_cast<std::size_t>(length);
}

}  // namespace

std::size_t compressed_bound(Codec codec, std::size_t bytes) {
  if (bytes > LZ4_MAX_INPUT_SIZE)
    throw std::length_error("a shard of the exponent plane exceeds " +
                            std::to_string(LZ4_MAX_INPUT_SIZE) + " bytes: use more shards");
  if (codec == Codec::zstd) return ZSTD_compressBound(bytes);
  return static_cast<std::size_t>(LZ4_compressBound(static_cast<int>(bytes)));
}

std::size_t compress(Codec codec, std::span<const std::uint8_t> in, std::span<std::uint8_t> out) {
  return codec == Codec::zstd ? compress_zstd(in, out) : compress_lz4(in, out);
}

bool decompress(Codec codec, std::span<const std::uint8_t> in, std::span<std::uint8_t> out) {
  if (codec == Codec::zstd)
    return ZSTD_decompress(out.data(), out.size(), in.data(), in.size()) == out.size();
  constexpr auto kMost = static_cast<std::size_t>(std::numeric_limits<int>::max());
  if (in.size() > kMost || out.size() > kMost) return false;
  return LZ4_decompress_safe(reinterpret_cast<const char*>(in.data()),
                             reinterpret_cast<char*>(out.data()), static_cast<int>(in.size()),
                             static_cast<int>(out.size())) == static_cast<int>(out.size());
}

}  // namespace zipmoe
