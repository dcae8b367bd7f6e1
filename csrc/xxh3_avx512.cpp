// The library chooses its vector code by the flags this file is compiled with.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "xxh3_vector.h"

namespace zipmoe {

std::uint64_t xxh3_avx512(const std::uint8_t* bytes, std::size_t size) {
  return XXH3_64bits(bytes, size);
}

}  // namespace zipmoe
