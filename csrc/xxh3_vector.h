// xxh3 for one instruction set each. Like kernels.h: no standard headers beyond the plain types.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zipmoe {

#if defined(__x86_64__)
std::uint64_t xxh3_avx2(const std::uint8_t* bytes, std::size_t size);
std::uint64_t xxh3_avx512(const std::uint8_t* bytes, std::size_t size);
#endif

}  // namespace zipmoe
