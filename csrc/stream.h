// How fast memory can be read: the measure that products are held against.
#pragma once
#include <cstdint>
#include <span>

#include "pool.h"

namespace zipmoe {

// Reads all of it once, in the pool's threads, and returns the exclusive or of its 64-bit words
// (the last bytes that are no whole word left out), so that nothing can be optimised away.
std::uint64_t read_all(std::span<const std::uint8_t> bytes, WorkerPool& pool);

}  // namespace zipmoe
