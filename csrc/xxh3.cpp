#include "xxh3.h"

#include <xxhash.h>

namespace zipmoe {

std::uint64_t xxh3(std::span<const std::uint8_t> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

}  // namespace zipmoe
