// Products of BF16 weights and BF16 columns, one table of function pointers per instruction set.
// As in kernels.h: files that implement them include nothing but these headers and intrinsics.
//
// The one order of every product (docs/kernels.md): 16 sums in FP32 per output. Weight k of a row
// goes to sum (k mod 32) div 2; a sum takes its weights in ascending k. The 16 sums are then added
// in halves: i and i + 8, i and i + 4, i and i + 2, the last two. Nothing else decides about a bit:
// not the number of columns, not the threads, not the codec, not the blocks.
//
// AVX-512 BF16 multiplies by vdpbf16ps, which takes denormals as 0 and adds the two products of a
// lane in its own way. All others add product after product with a single rounding each: a product
// of two BF16 numbers is exact in FP32 (unless it underflows), so a fused multiply-add and a
// multiplication followed by an addition give the same bits.
#pragma once
#include <cstddef>
#include <cstdint>

#include "integer_codes.h"
#include "kernels.h"

namespace zipmoe {

inline constexpr std::size_t kSums = 16;           // per output
inline constexpr std::uint32_t kCodedColumns = 4;  // the most that any `coded*` take at once
inline constexpr std::uint32_t kPanelColumns = 6;  // the most that `panel` takes at once

// The columns to multiply with. Readable and 0 from the last weight to the next multiple of 64.
struct Columns {
  const std::uint16_t* data;
  std::ptrdiff_t stride;  // elements from one column to the next
  std::uint32_t count;
};

// The sums of output (row, column) begin at data[(column * stride + row) * kSums]. Whoever adds the
// last products adds them up too: out[column * stride + row] is the output then.
struct Sums {
  float* data;
  std::ptrdiff_t stride;  // rows
  bool begin;             // from 0, not from what is there
  float* out;             // null: more products follow
};

// What the next products will read, to be fetched meanwhile: a line of each stretch at every step.
struct Ahead {
  const std::uint8_t* stretches[4];
  std::size_t lines;  // of each; not more than steps
};

// Which activation stands between the first and the last product of an expert.
enum class Gate : std::uint8_t { silu, gelu, gelu_tanh, relu, relu2 };

using MultiplyIntegers = void (*)(const IntegerBlock& block, std::uint32_t height,
                                  std::uint32_t width, const Columns& x, const Sums& sums);

struct DotKernels {
  using MultiplyCoded = std::size_t (*)(const CodedBlock& block, std::uint32_t height,
                                        std::uint32_t width, const Columns& x, const Sums& sums);
  using MultiplyAndKeep = std::size_t (*)(const CodedBlock& block, const BlockTarget& kept,
                                          const Columns& x, const Sums& sums);
  // The most columns that `coded*` take at once, up to kCodedColumns: beyond it, decoding into a
  // panel first is as good. 0 where there is no `coded*`.
  std::uint32_t coded_columns;
  // From this many columns on, several row groups are decoded before they are multiplied, so that a
  // few columns stay in the first cache while all of these rows pass.
  std::uint32_t many_columns;
  // A whole block of 2, 3 or 4-bit codes times a few columns. Return how many escapes were
  // consumed.
  MultiplyCoded coded2, coded3, coded4;
  // The same for kCodedColumns columns, and the decoded block kept for columns to come. Null where
  // decoding first is as good.
  MultiplyAndKeep keep2 = nullptr, keep3 = nullptr, keep4 = nullptr;
  // A whole block of integer codes times 1 to kCodedColumns columns. With scales a group of 64
  // weights is summed from 0 in the order above, and scale * sum is added to the sum of the output
  // with a single rounding; without, the integers are summed as weights are.
  MultiplyIntegers int8, int4, int2;
  // Of a row, `panel` is best given no more weights at once: a multiple of 64.
  std::uint32_t panel_weights;
  // Four rows of plain weights, `stride` elements apart, times 1 to kPanelColumns columns.
  void (*panel)(const std::uint16_t* rows, std::ptrdiff_t stride, std::uint32_t width,
                const Columns& x, const Sums& sums, const Ahead& ahead);
  // The same for 1 to kCodedColumns columns, row after row: memory is quickest in one run. Null
  // where `panel` is as good.
  void (*rows)(const std::uint16_t* rows, std::ptrdiff_t stride, std::uint32_t width,
               const Columns& x, const Sums& sums) = nullptr;
  // Round to BF16, to nearest and ties to even; NaN stays NaN. `bias` (BF16) may be null.
  void (*round)(const float* values, std::size_t n, const std::uint16_t* bias, std::uint16_t* out);
  // out = round(activation(gate) * up); `up` may be null: no multiplication.
  void (*gate)(Gate kind, const float* gate, const float* up, std::size_t n, std::uint16_t* out);
  // total += weight * value, in FP32, the product rounded first.
  void (*weigh)(const float* values, std::size_t n, float weight, float* total);
  // out = round(x + more), all BF16; `out` may be one of them.
  void (*add)(const std::uint16_t* x, const std::uint16_t* more, std::size_t n, std::uint16_t* out);
  // Rotary position embedding of a head's first 2 * half words, in place, cos and sin as many;
  // every product and every sum is rounded to BF16, as torch does.
  void (*rotate)(std::uint16_t* words, const std::uint16_t* cos, const std::uint16_t* sin,
                 std::size_t half);
};

// The table of an instruction set that this machine has.
const DotKernels& dot_kernels(Isa isa);

extern const DotKernels kPortableDot;
#if defined(__x86_64__)
extern const DotKernels kAvx2Dot;
extern const DotKernels kAvx512Dot;
extern const DotKernels kAvx512Bf16Dot;
#endif

}  // namespace zipmoe
