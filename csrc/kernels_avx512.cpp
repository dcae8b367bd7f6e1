// The kernels for AVX-512 with VBMI and VBMI2: 64 weights, one group, per vector.
#include "lookup_avx512.h"

namespace zipmoe {
namespace {

template <unsigned kBits>
std::size_t unrank(const u8* codes, std::size_t n, const u8* table, const u8* escapes, u8* out) {
  const Lookup<kBits> look_up(table);
  const __m512i mark = escape_mark<kBits>(table);
  const u8* next = escapes;
  for (std::size_t i = 0; i < n; i += kGroup, codes += kGroupBytes<kBits>) {
    const __m512i looked_up = look_up(codes);
    u64 escaped = _cvtmask64_u64(_mm512_cmpeq_epi8_mask(looked_up, mark));
    if (n - i < kGroup) escaped = _bzhi_u64(escaped, static_cast<unsigned>(n - i));
    const __m512i exponents =
        _mm512_mask_expand_epi8(looked_up, _cvtu64_mask64(escaped), _mm512_loadu_si512(next));
    next += _mm_popcnt_u64(escaped);
    _mm512_storeu_si512(out + i, exponents);
  }
  return static_cast<std::size_t>(next - escapes);
}

template <bool kStream>
void store(const Words& words, u16* out) {
  if constexpr (kStream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), words.first);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + 32), words.second);
  } else {
    _mm512_storeu_si512(out, words.first);
    _mm512_storeu_si512(out + 32, words.second);
  }
}

template <unsigned kBits, bool kStream>
std::size_t merge_block(const CodedBlock& block, const BlockTarget& target) {
  GroupReader<kBits> groups(block);
  u16* panel = target.out;
  for (std::uint32_t row = 0; row < target.height; row += 4, panel += 4 * target.stride)
    for (std::uint32_t column = 0; column < target.width; column += kGroup) {
      u16* out = panel + column;
#pragma GCC unroll 4
      for (unsigned k = 0; k < 4; ++k, out += target.stride) store<kStream>(groups.next(k), out);
    }
  return groups.used();
}

template <unsigned kBits>
std::size_t merge(const CodedBlock& block, const BlockTarget& target) {
  return target.stream ? merge_block<kBits, true>(block, target)
                       : merge_block<kBits, false>(block, target);
}

template <bool kStream>
void merge8_block(const u8* sign_mantissa, const u8* exponents, const BlockTarget& target) {
  u16* panel = target.out;
  for (std::uint32_t row = 0; row < target.height; row += 4, panel += 4 * target.stride)
    for (std::uint32_t column = 0; column < target.width; column += kGroup) {
      u16* out = panel + column;
      for (unsigned k = 0; k < 4; ++k, out += target.stride) {
        store<kStream>(
            merge_words(_mm512_loadu_si512(sign_mantissa), _mm512_loadu_si512(exponents)), out);
        sign_mantissa += kGroup;
        exponents += kGroup;
      }
    }
}

void merge8(const u8* sign_mantissa, const u8* exponents, const BlockTarget& target) {
  if (target.stream)
    merge8_block<true>(sign_mantissa, exponents, target);
  else
    merge8_block<false>(sign_mantissa, exponents, target);
}

void fence() { _mm_sfence(); }

void split(const u16* words, std::ptrdiff_t stride, std::uint32_t height, std::uint32_t width,
           u8* sign_mantissa, u8* exponents) {
  const __m512i low_byte = _mm512_set1_epi16(0xFF);
  for (std::uint32_t panel = 0; panel < height; panel += 4, words += 4 * stride)
    for (std::uint32_t column = 0; column < width; column += kGroup) {
      const u16* from = words + column;
      for (unsigned k = 0; k < 4; ++k, from += stride) {
        __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 32);
        first = _mm512_shldi_epi16(first, first, 1);
        second = _mm512_shldi_epi16(second, second, 1);
        _mm512_storeu_si512(sign_mantissa, _mm512_packus_epi16(_mm512_and_si512(first, low_byte),
                                                               _mm512_and_si512(second, low_byte)));
        _mm512_storeu_si512(exponents, _mm512_packus_epi16(_mm512_srli_epi16(first, 8),
                                                           _mm512_srli_epi16(second, 8)));
        sign_mantissa += kGroup;
        exponents += kGroup;
      }
    }
}

// The code of each of the 256 exponents, looked up 64 at a time.
class CodeOf {
 public:
  CodeOf(const u8* table, unsigned entries) {
    alignas(64) u8 codes[256];
    __builtin_memset(codes, static_cast<int>(entries), sizeof codes);
    for (unsigned code = 0; code < entries; ++code) codes[table[code]] = static_cast<u8>(code);
    for (unsigned k = 0; k < 4; ++k) quarter_[k] = _mm512_load_si512(codes + 64 * k);
  }
  __m512i operator()(__m512i values) const {
    const __m512i low = _mm512_permutex2var_epi8(quarter_[0], values, quarter_[1]);
    const __m512i high = _mm512_permutex2var_epi8(quarter_[2], values, quarter_[3]);
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(values), high);
  }

 private:
  __m512i quarter_[4];
};

// Codes below 4 into a 2-bit group.
void pack2(__m512i codes, u8* out) {
  const __m512i moved = _mm512_sllv_epi32(codes, lane_shifts());
  const __m256i half =
      _mm256_or_si256(_mm512_castsi512_si256(moved), _mm512_extracti64x4_epi64(moved, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_or_si128(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

template <unsigned kBits>
void pack(__m512i codes, u8* out) {
  if constexpr (kBits == 2) {
    pack2(codes, out);
  } else if constexpr (kBits == 3) {
    pack2(_mm512_and_si512(codes, _mm512_set1_epi8(3)), out);
    const u64 high = _cvtmask64_u64(_mm512_test_epi8_mask(codes, _mm512_set1_epi8(4)));
    __builtin_memcpy(out + 16, &high, sizeof high);
  } else {
    const __m256i high = _mm256_slli_epi16(_mm512_extracti64x4_epi64(codes, 1), 4);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_or_si256(_mm512_castsi512_si256(codes), high));
  }
}

template <unsigned kBits>
std::size_t rank(const u8* values, std::size_t n, const u8* table, u8* codes, u8* escapes) {
  constexpr unsigned kEscape = (1U << kBits) - 1;
  const CodeOf code_of(table, kEscape);
  const __m512i escape = _mm512_set1_epi8(kEscape);
  std::size_t escaped = 0;
  for (std::size_t i = 0; i < n; i += kGroup, codes += kGroupBytes<kBits>) {
    const __mmask64 used = n - i < kGroup
                               ? _cvtu64_mask64(_bzhi_u64(~u64{0}, static_cast<unsigned>(n - i)))
                               : _cvtu64_mask64(~u64{0});
    const __m512i group = _mm512_loadu_si512(values + i);
    const __m512i coded = _mm512_maskz_mov_epi8(used, code_of(group));
    pack<kBits>(coded, codes);
    const __mmask64 is_escape = _mm512_mask_cmpeq_epi8_mask(used, coded, escape);
    _mm512_storeu_si512(escapes + escaped, _mm512_maskz_compress_epi8(is_escape, group));
    escaped += static_cast<std::size_t>(_mm_popcnt_u64(_cvtmask64_u64(is_escape)));
  }
  return escaped;
}

}  // namespace

const Kernels kAvx512Kernels{
    .unrank2 = unrank<2>,
    .unrank3 = unrank<3>,
    .merge2 = merge<2>,
    .merge3 = merge<3>,
    .merge4 = merge<4>,
    .merge8 = merge8,
    .fence = fence,
    .split = split,
    .histogram = histogram,
    .rank2 = rank<2>,
    .rank3 = rank<3>,
    .rank4 = rank<4>,
};

}  // namespace zipmoe
