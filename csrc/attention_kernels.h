// The inner loops of attention, one table of function pointers per instruction set. As in
// kernels.h: files that implement them include nothing but these headers and intrinsics.
//
// The one order of every query row (docs/kernels.md). Its allowed keys are numbered in ascending
// order, keys that are not allowed left out; only these numbers count below, so that neither
// padding nor dropped keys nor neighbours nor the way in which a prompt is cut can change a bit.
//   score:   16 sums in FP32, as in dot.h: words 2i and 2i + 1 of every 32 go to sum i, in
//   ascending
//            order; the sums are added in halves: i and i + 8, i and i + 4, i and i + 2, the last
//            two. Then times the scaling, the soft-cap, plus the bias, each rounded once.
//   weight:  exp(score - the largest score or sink). Their sum: key number n goes to sum n mod 16,
//            the sums are added in halves, the sink last.
//   output:  of every value word one sum in FP32, key after key by fused multiply-add; times
//            1 / (sum of the weights); rounded to BF16 once.
// AVX-512 BF16 multiplies scores by vdpbf16ps, which takes denormals as 0 and adds the two products
// of a lane in its own way. All others give the same bits as each other: a product of two BF16
// numbers is exact in FP32, and the outputs' multiply-adds are fused everywhere.
#pragma once
#include <cstddef>
#include <cstdint>

namespace zipmoe {

enum class Isa;

inline constexpr std::uint32_t kScoreSums = 16;
inline constexpr std::uint32_t kWordGroup =
    32;                                         // queries and outputs are padded to multiples of it
inline constexpr std::uint32_t kKeyBlock = 64;  // keys that rows go through together
inline constexpr std::uint32_t kValueRows = 4;  // the most that `add` takes at once

constexpr std::uint32_t padded_words(std::uint32_t width) {
  return (width + kWordGroup - 1) / kWordGroup * kWordGroup;
}

// Keys or values of one head: n rows of `width` words, `stride` elements apart.
struct HeadRows {
  const std::uint16_t* data;
  std::ptrdiff_t stride;
  std::uint32_t n, width;
};

// What is between scores and weights. `bias` has an entry for each score; both may be null.
struct Softmax {
  float scaling;
  float softcap;  // 0: none
  const float* bias;
  const float* sink;
};

struct AttentionKernels {
  // out[j] = the product of `query` (padded with 0) and key j.
  void (*scores)(const std::uint16_t* query, const HeadRows& keys, float* out);
  // The same for many queries: keys are turned first, pairs of words beside those of other keys,
  // and `out` has a row of kKeyBlock for each query. Null where `scores` is as good.
  void (*turn)(const HeadRows& keys, std::uint32_t* turned);
  void (*turned_scores)(const std::uint16_t* queries, std::ptrdiff_t stride, std::uint32_t count,
                        const std::uint32_t* turned, std::uint32_t width, float* out);
  // n > 0 scores become weights, in place; returns 1 / their sum. Scores and bias have room for a
  // multiple of 16, the bias' beyond the last being a copy of it.
  float (*softmax)(float* scores, std::size_t n, const Softmax& how);
  // totals[r * stride] += the sum of weights[r][j] * value j, for 1 to kValueRows rows. Of each
  // kWordGroup words the even ones come first, then the odd ones.
  void (*add)(const float* const* weights, std::uint32_t rows, const HeadRows& values,
              float* totals, std::ptrdiff_t stride);
  // out = the totals times `factor`, rounded, in their proper order.
  void (*finish)(const float* totals, float factor, std::uint32_t width, std::uint16_t* out);
};

// The table of an instruction set that this machine has.
const AttentionKernels& attention_kernels(Isa isa);

extern const AttentionKernels kPortableAttention;
#if defined(__x86_64__)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
extern const AttentionKernels kAvx512Bf16Attention;
#endif

}  // namespace zipmoe
