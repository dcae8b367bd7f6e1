// The products for AVX2 with FMA: the 16 sums of an output are two vectors.
#include "dot_integers_avx2.h"
#include "dot_pointwise.h"
#include "lookup_avx2.h"
#include "sums_avx2.h"

namespace zipmoe {
namespace {

ZIPMOE_INLINE __m256 add(__m256 sums, const Halves& weights, const Halves& values) {
  return _mm256_fmadd_ps(weights.odd, values.odd, _mm256_fmadd_ps(weights.even, values.even, sums));
}

// Eight of the 16 sums of four rows.
struct FourRows {
  __m256 at[4];
  FourRows() = default;
  [[gnu::always_inline]] FourRows(const float* sums, bool begin) {
#pragma GCC unroll 4
    for (unsigned r = 0; r < 4; ++r)
      at[r] = begin ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + kSums * r);
  }
  [[gnu::always_inline]] void store(float* sums) const {
#pragma GCC unroll 4
    for (unsigned r = 0; r < 4; ++r) _mm256_storeu_ps(sums + kSums * r, at[r]);
  }
};

ZIPMOE_INLINE __m256i rotated(__m256i words) {
  return _mm256_or_si256(_mm256_srli_epi16(words, 1), _mm256_slli_epi16(words, 15));
}

// Half of a group of each of four rows: interleaved, 32 bytes are the weights 0 to 15 and 32 to 47
// from `x` on, each EEEEEEEE MMMMMMM S: one rotation is missing.
ZIPMOE_INLINE void add_half(FourRows& sums, const u8* sign_mantissa, const u8* exponents,
                            const u16* x) {
  const Halves first(x), second(x + 32);
#pragma GCC unroll 4
  for (unsigned r = 0; r < 4; ++r) {
    const __m256i low = load256(sign_mantissa + r * kGroup);
    const __m256i high = load256(exponents + r * kGroup);
    sums.at[r] = add(sums.at[r], Halves(rotated(_mm256_unpacklo_epi8(low, high))), first);
    sums.at[r] = add(sums.at[r], Halves(rotated(_mm256_unpackhi_epi8(low, high))), second);
  }
}

constexpr u32 kStripColumns = 512;

// Some columns of four rows whose exponents are read, times one column.
ZIPMOE_INLINE void add_strip(const u8* sign_mantissa, const u8* exponents, u32 width, const u16* x,
                             float* sums, bool begin) {
  FourRows low(sums, begin), high(sums + 8, begin);
  for (u32 k = 0; k < width; k += kGroup, sign_mantissa += 4 * kGroup, exponents += 4 * kGroup) {
    add_half(low, sign_mantissa, exponents, x + k);
    add_half(high, sign_mantissa + 32, exponents + 32, x + k + 16);
  }
  low.store(sums);
  high.store(sums + 8);
}

// Exponents go through the first cache, a strip at a time, because escapes are stored there one by
// one; they become BF16 in registers, for each column again.
template <unsigned kBits>
std::size_t coded(const CodedBlock& block, u32 height, u32 width, const Columns& x,
                  const Sums& sums) {
  alignas(64) u8 strip[4 * kStripColumns + kVectorSlack];
  ExponentReader<kBits> exponents(block.codes, block.table, block.escapes);
  const std::ptrdiff_t step = sums.stride * static_cast<std::ptrdiff_t>(kSums);
  const u8* sign_mantissa = block.sign_mantissa;
  float* out = sums.data;
  for (u32 row = 0; row < height; row += 4, out += 4 * kSums)
    for (u32 begin = 0; begin < width; begin += kStripColumns) {
      const u32 columns = width - begin < kStripColumns ? width - begin : kStripColumns;
      for (u32 k = 0; k < columns; k += kGroup) exponents.four(strip + 4 * k);
      for (u32 c = 0; c < x.count; ++c)
        add_strip(sign_mantissa, strip, columns, x.data + c * x.stride + begin, out + c * step,
                  sums.begin && begin == 0);
      sign_mantissa += 4 * columns;
    }
  finish<sum_of>(sums, height, x.count);
  return exponents.used();
}

template <unsigned kColumns>
void rows_of(const u16* from, std::ptrdiff_t stride, u32 width, const Columns& x,
             const Sums& sums) {
  const std::ptrdiff_t step = sums.stride * static_cast<std::ptrdiff_t>(kSums);
  for (unsigned r = 0; r < 4; ++r, from += stride) {
    float* out = sums.data + kSums * r;
    __m256 low[kColumns], high[kColumns];
#pragma GCC unroll 4
    for (unsigned c = 0; c < kColumns; ++c) {
      low[c] = sums.begin ? _mm256_setzero_ps() : _mm256_loadu_ps(out + c * step);
      high[c] = sums.begin ? _mm256_setzero_ps() : _mm256_loadu_ps(out + c * step + 8);
    }
    for (u32 k = 0; k < width; k += 32) {
      const Halves first(from + k), second(from + k + 16);
#pragma GCC unroll 4
      for (unsigned c = 0; c < kColumns; ++c) {
        const u16* values = x.data + c * x.stride + k;
        low[c] = add(low[c], first, Halves(values));
        high[c] = add(high[c], second, Halves(values + 16));
      }
    }
#pragma GCC unroll 4
    for (unsigned c = 0; c < kColumns; ++c) {
      _mm256_storeu_ps(out + c * step, low[c]);
      _mm256_storeu_ps(out + c * step + 8, high[c]);
    }
  }
}

void rows(const u16* from, std::ptrdiff_t stride, u32 width, const Columns& x, const Sums& sums) {
  static constexpr decltype(&rows) kByColumns[kCodedColumns] = {rows_of<1>, rows_of<2>, rows_of<3>,
                                                                rows_of<4>};
  kByColumns[x.count - 1](from, stride, width, x, sums);
  finish<sum_of>(sums, 4, x.count);
}

// Without it the compiler keeps words for their odd weights and sums in memory: half the speed.
ZIPMOE_INLINE void load_again() { asm volatile("" ::: "memory"); }

// Eight of the 16 sums of four rows times one column or two: as many as there are registers for.
template <unsigned kColumns>
class Tile {
 public:
  explicit Tile(const Sums& sums)
      : sums_(sums.data), step_(sums.stride * static_cast<std::ptrdiff_t>(kSums)) {
#pragma GCC unroll 2
    for (unsigned c = 0; c < kColumns; ++c) at_[c] = FourRows(sums_ + c * step_, sums.begin);
  }
  // The even or the odd ones of 16 weights.
  template <__m256 Halves::* kWhich>
  ZIPMOE_INLINE void add(const u16* from, std::ptrdiff_t stride, const u16* x,
                         std::ptrdiff_t x_stride) {
    __m256 values[kColumns];
#pragma GCC unroll 2
    for (unsigned c = 0; c < kColumns; ++c) values[c] = Halves(x + c * x_stride).*kWhich;
#pragma GCC unroll 4
    for (unsigned r = 0; r < 4; ++r) {
      const __m256 weights = Halves(from + r * stride).*kWhich;
#pragma GCC unroll 2
      for (unsigned c = 0; c < kColumns; ++c)
        at_[c].at[r] = _mm256_fmadd_ps(weights, values[c], at_[c].at[r]);
      load_again();
    }
  }
  void store() const {
#pragma GCC unroll 2
    for (unsigned c = 0; c < kColumns; ++c) at_[c].store(sums_ + c * step_);
  }

 private:
  float* sums_;
  std::ptrdiff_t step_;
  FourRows at_[kColumns];
};

template <unsigned kColumns>
void columns_of(const u16* from, std::ptrdiff_t stride, u32 width, const Columns& x,
                const Sums& sums, const Ahead& ahead) {
  Tile<kColumns> tile(sums);
  const u16* values = x.data;
  u32 k = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    tile.template add<&Halves::even>(from + k, stride, values + k, x.stride);
    tile.template add<&Halves::odd>(from + k, stride, values + k, x.stride);
    k += 32;
  };
  for (; k / 32 < ahead.lines; step())
#pragma GCC unroll 4
    for (const u8* stretch : ahead.stretches)
      _mm_prefetch(reinterpret_cast<const char*>(stretch + 2 * k), _MM_HINT_T1);
  while (k < width) step();
  tile.store();
}

void panel(const u16* from, std::ptrdiff_t stride, u32 width, const Columns& x, const Sums& sums,
           const Ahead& ahead) {
  for (u32 c = 0; c < x.count; c += 2)
    for (unsigned half = 0; half < 2; ++half) {
      const Columns few{x.data + c * x.stride + 16 * half, x.stride, x.count - c};
      float* out = sums.data + static_cast<std::ptrdiff_t>(c * kSums) * sums.stride + 8 * half;
      const auto multiply = few.count == 1 ? columns_of<1> : columns_of<2>;
      multiply(from + 16 * half, stride, width, few, {out, sums.stride, sums.begin, nullptr},
               c + half == 0 ? ahead : Ahead{});
    }
  finish<sum_of>(sums, 4, x.count);
}

}  // namespace

const DotKernels kAvx2Dot{
    .coded_columns = 2,
    .many_columns = 24,
    .coded2 = coded<2>,
    .coded3 = coded<3>,
    .coded4 = coded<4>,
    .int8 = integers<8>,
    .int4 = integers<4>,
    .int2 = integers<2>,
    .panel_weights = 2048,
    .panel = panel,
    .rows = rows,
    .round = round_values,
    .gate = gate_values,
    .weigh = weigh_values,
    .add = add_values,
    .rotate = rotate_values,
};

}  // namespace zipmoe
