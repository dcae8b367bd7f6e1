// Outputs of a product whose sums are in registers, for AVX-512: `Multiply` says how 32 weights and
// 32 values go into 16 sums. Internal linkage: each file that includes it has its own flags.
#pragma once
#include "dot.h"
#include "lookup_avx512.h"
#include "sums_avx512.h"

namespace zipmoe {
namespace {

// kRows x kColumns outputs whose sums are in registers.
template <class Multiply, unsigned kColumns, unsigned kRows = 4>
class Tile {
 public:
  explicit Tile(const Sums& sums, std::uint32_t row) : sums_(sums), row_(row) {
    if (sums.begin) {
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (unsigned c = 0; c < kColumns; ++c) at_[c][r] = _mm512_setzero_ps();
    } else {
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (unsigned c = 0; c < kColumns; ++c) at_[c][r] = _mm512_loadu_ps(place(r, c));
    }
  }
  [[gnu::always_inline]] void add(const __m512i (&weights)[kRows], const u16* x,
                                  std::ptrdiff_t stride) {
#pragma GCC unroll 8
    for (unsigned c = 0; c < kColumns; ++c) {
      const __m512i values = _mm512_loadu_si512(x + c * stride);
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r) at_[c][r] = Multiply::add(at_[c][r], weights[r], values);
    }
  }
  // Two steps of weights from a sum of their own, which is scaled and added.
  [[gnu::always_inline]] void add_scaled(const __m512i (&first)[kRows],
                                         const __m512i (&second)[kRows],
                                         const __m512 (&scales)[kRows], const u16* x,
                                         std::ptrdiff_t stride) {
#pragma GCC unroll 8
    for (unsigned c = 0; c < kColumns; ++c) {
      const __m512i low = _mm512_loadu_si512(x + c * stride);
      const __m512i high = _mm512_loadu_si512(x + c * stride + 32);
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r) {
        const __m512 sum =
            Multiply::add(Multiply::add(_mm512_setzero_ps(), first[r], low), second[r], high);
        at_[c][r] = _mm512_fmadd_ps(scales[r], sum, at_[c][r]);
      }
    }
  }
  [[gnu::always_inline]] void store() const {
    if (sums_.out != nullptr) return store_outputs();
#pragma GCC unroll 8
    for (unsigned c = 0; c < kColumns; ++c)
#pragma GCC unroll 4
      for (unsigned r = 0; r < kRows; ++r) _mm512_storeu_ps(place(r, c), at_[c][r]);
  }

 private:
  // Of the columns from the given one on, up to 16 outputs at a time.
  template <unsigned kFirst = 0>
  [[gnu::always_inline]] void store_outputs() const {
    constexpr unsigned kMost = 16 / kRows, kLeft = kColumns - kFirst;
    constexpr unsigned kCount = kLeft < kMost ? kLeft : kMost;
    __m512 sums[kCount * kRows];
#pragma GCC unroll 16
    for (unsigned i = 0; i < kCount * kRows; ++i) sums[i] = at_[kFirst + i / kRows][i % kRows];
    alignas(64) float outputs[16];
    _mm512_store_ps(outputs, reduce(sums));
#pragma GCC unroll 4
    for (unsigned c = 0; c < kCount; ++c)
      __builtin_memcpy(sums_.out + (kFirst + c) * sums_.stride + row_, outputs + c * kRows,
                       kRows * sizeof(float));
    if constexpr (kCount < kLeft) store_outputs<kFirst + kCount>();
  }
  float* place(unsigned r, unsigned c) const {
    return sums_.data + (static_cast<std::ptrdiff_t>(c) * sums_.stride + row_ + r) *
                            static_cast<std::ptrdiff_t>(kSums);
  }
  const Sums& sums_;
  std::uint32_t row_;
  __m512 at_[kColumns][kRows];
};

}  // namespace
}  // namespace zipmoe
