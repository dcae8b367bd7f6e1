#include "xxh3.h"

#include "isa.h"
#include "xxh3_vector.h"

// Compiled in, all of it static: no library to find, one copy per instruction set.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace zipmoe {
namespace {

using Hash = std::uint64_t (*)(const std::uint8_t* bytes, std::size_t size);

std::uint64_t xxh3_baseline(const std::uint8_t* bytes, std::size_t size) {
  return XXH3_64bits(bytes, size);
}

Hash best_hash() {
  switch (best_isa()) {
#if defined(__x86_64__)
    case Isa::avx512bf16:
    case Isa::avx512:
      return xxh3_avx512;
    case Isa::avx2:
      return xxh3_avx2;
#endif
    default:
      return xxh3_baseline;
  }
}

}  // namespace

std::uint64_t xxh3(std::span<const std::uint8_t> bytes) {
  static const Hash hash = best_hash();
  return hash(bytes.data(), bytes.size());
}

}  // namespace zipmoe
