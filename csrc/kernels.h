// The inner loops, one table of function pointers per instruction set. Files that implement them
// are compiled with their own -m flags: they include nothing but this header and intrinsics, so
// that no inline function of a standard header is emitted with instructions the machine may not
// have.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zipmoe {

enum class Isa;  // isa.h, which is not included: it pulls in standard headers

// Stray loads and stores of the kernels beyond their exact streams: one vector.
inline constexpr std::size_t kVectorSlack = 64;

// How far ahead, in bytes of each plane, a product has memory bring what it will read: beyond the
// page of 4 KiB, in which processors fetch by themselves.
inline constexpr std::size_t kFetchAhead = 6144;

// Where a block's weights go: `height` rows (a multiple of 4) of `width` (a multiple of 64).
struct BlockTarget {
  std::uint16_t* out;
  std::ptrdiff_t stride;  // elements
  std::uint32_t height, width;
  bool stream;  // non-temporal stores; `out` and every row must be 64-byte aligned then
};

// A block whose first level of codes is merged with its sign-mantissa bytes.
struct CodedBlock {
  const std::uint8_t* sign_mantissa;
  const std::uint8_t* codes;    // four groups beyond the block are read too
  const std::uint8_t* table;    // 4, 8 or 16 entries; the last differs from all others
  const std::uint8_t* escapes;  // exponents of weights whose code is the last one, in order
};

struct Kernels {
  // Undo n codes of 2 (3) bits: table lookups, escapes inserted. Whole groups are written to `out`,
  // and up to kVectorSlack beyond.
  // Return how many escapes were consumed: at most n.
  std::size_t (*unrank2)(const std::uint8_t* codes, std::size_t n, const std::uint8_t* table,
                         const std::uint8_t* escapes, std::uint8_t* out);
  std::size_t (*unrank3)(const std::uint8_t* codes, std::size_t n, const std::uint8_t* table,
                         const std::uint8_t* escapes, std::uint8_t* out);
  // The same for a whole block of 2, 3 or 4-bit codes, and merge to BF16.
  std::size_t (*merge2)(const CodedBlock& block, const BlockTarget& target);
  std::size_t (*merge3)(const CodedBlock& block, const BlockTarget& target);
  std::size_t (*merge4)(const CodedBlock& block, const BlockTarget& target);
  // Merge exponents stored as bytes.
  void (*merge8)(const std::uint8_t* sign_mantissa, const std::uint8_t* exponents,
                 const BlockTarget& target);
  // Makes non-temporal stores of this thread visible before anything it does next.
  void (*fence)();

  // Split a block into its planes, in the order of blocks and groups.
  void (*split)(const std::uint16_t* words, std::ptrdiff_t stride, std::uint32_t height,
                std::uint32_t width, std::uint8_t* sign_mantissa, std::uint8_t* exponents);
  // counts[v] = how often v occurs; n is a multiple of 64.
  void (*histogram)(const std::uint8_t* values, std::size_t n, std::uint32_t* counts);
  // Code n values in whole groups, codes after the last 0; values without a code go to `escapes`
  // (room for n + kVectorSlack). Return their number. `values` is readable up to whole groups.
  std::size_t (*rank2)(const std::uint8_t* values, std::size_t n, const std::uint8_t* table,
                       std::uint8_t* codes, std::uint8_t* escapes);
  std::size_t (*rank3)(const std::uint8_t* values, std::size_t n, const std::uint8_t* table,
                       std::uint8_t* codes, std::uint8_t* escapes);
  std::size_t (*rank4)(const std::uint8_t* values, std::size_t n, const std::uint8_t* table,
                       std::uint8_t* codes, std::uint8_t* escapes);
};

// The table of an instruction set that this machine has.
const Kernels& kernels(Isa isa);

// Counting gains nothing from vectors: all tables share it.
void histogram(const std::uint8_t* values, std::size_t n, std::uint32_t* counts);

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace zipmoe
