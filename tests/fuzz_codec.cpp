// Decodes damaged matrices and expects CorruptError or weights, the same from every instruction
// set. Built with AddressSanitizer by -DZIPMOE_SANITIZE=ON; buffers have their exact lengths, so
// that one byte read or written too far ends the run. Usage: fuzz_codec ROUNDS [SEED]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <random>
#include <vector>

#include "../csrc/codec.h"
#include "../csrc/error.h"
#include "../csrc/rank_layout.h"

namespace zipmoe {
namespace {

using Bytes = std::vector<std::uint8_t>;
using Words = std::vector<std::uint16_t>;

struct Coded {
  MatrixSpec spec;
  Bytes sign_mantissa, exponent;
};

class Fuzzer {
 public:
  explicit Fuzzer(unsigned seed) : random_(seed) {}

  void round() {
    Coded coded = make();
    const unsigned wounds = 1 + pick(3);
    for (unsigned i = 0; i < wounds; ++i) damage(coded);
    std::optional<Words> first = decoded(coded, Isa::portable);
    for (Isa isa : available_isas())
      if (decoded(coded, isa) != first) {
        std::fprintf(stderr, "%s and portable disagree on a damaged %s\n", name(isa).data(),
                     name(coded.spec.codec).data());
        std::exit(1);
      }
    ++(first ? accepted : refused);
  }

  unsigned long accepted = 0, refused = 0;

 private:
  unsigned pick(std::uint64_t below) {
    return static_cast<unsigned>(
        std::uniform_int_distribution<std::uint64_t>(0, below - 1)(random_));
  }

  Geometry some_geometry() {
    const unsigned tile = 64 * (1 + pick(32));
    return {4 * (1 + pick(kBlockWeights / 4 / tile)), tile};
  }

  Words some_weights(std::size_t count) {
    const unsigned kind = pick(3);
    std::normal_distribution<double> exponent(120, kind == 0 ? 1.3 : 6);
    Words weights(count);
    for (std::uint16_t& word : weights) {
      const auto e = static_cast<unsigned>(exponent(random_)) & 255U;
      word = static_cast<std::uint16_t>(kind == 2 ? pick(65536)
                                                  : (e << 7) | (pick(2) << 15) | pick(128));
    }
    return weights;
  }

  Coded make() {
    constexpr Codec kCodecs[] = {Codec::rank223, Codec::rank3, Codec::rank4,
                                 Codec::zstd,    Codec::lz4hc, Codec::raw,
                                 Codec::int8,    Codec::int4,  Codec::int2};
    const std::uint64_t rows = 1 + pick(40), columns = 1 + pick(400);
    Words weights = some_weights(rows * columns);
    EncodeOptions options;
    options.codec = kCodecs[pick(std::size(kCodecs))];
    options.scale_group = pick(2) == 0 ? 0 : 64;
    if (is_integer(options.codec))  // they have none for infinities and NaN
      for (std::uint16_t& word : weights) word &= 0xBFFF;
    options.geometry = some_geometry();
    options.allow_raw = false;
    const Encoded encoded =
        encode({weights.data(), rows, columns, static_cast<std::ptrdiff_t>(columns), 1}, options);
    const auto a = encoded.sign_mantissa.span(), b = encoded.exponent.span();
    return {{encoded.codec, rows, columns, encoded.geometry, 2},
            {a.begin(), a.end()},
            {b.begin(), b.end()}};
  }

  void damage(Coded& coded) {
    Bytes& bytes = coded.exponent;
    switch (pick(9)) {
      case 0:
        return flip(coded.sign_mantissa);
      case 1:
        return resize(pick(2) == 0 ? bytes : coded.sign_mantissa);
      case 2: {  // a run of one byte: all escapes, or none
        if (bytes.empty()) return;
        const std::size_t from = pick(bytes.size()), count = pick(bytes.size() - from) + 1;
        return (void)std::memset(bytes.data() + from, pick(2) == 0 ? 0xFF : 0, count);
      }
      case 3:
        return (void)(coded.spec.geometry = some_geometry());
      case 4:
        return (void)(pick(2) == 0 ? coded.spec.rows += pick(9) : coded.spec.columns += pick(99));
      case 5:
        return aim(coded);
      case 6:
        return inflate(coded);
      default:
        return flip(bytes);
    }
  }

  void flip(Bytes& bytes) {
    if (!bytes.empty()) bytes[pick(bytes.size())] ^= static_cast<std::uint8_t>(1U << pick(8));
  }

  void resize(Bytes& bytes) {
    Bytes other(pick(3) == 0 ? bytes.size() + 1 + pick(200) : pick(bytes.size() + 1));
    std::copy_n(bytes.begin(), std::min(other.size(), bytes.size()), other.begin());
    bytes = std::move(other);  // exactly allocated again
  }

  // Hits what lengths are taken from: tables, offsets, n2 and n3, or a shard table.
  void aim(Coded& coded) {
    Bytes& bytes = coded.exponent;
    std::size_t from = 0, count = std::min<std::size_t>(bytes.size(), 64);
    if (coded.spec.codec >= Codec::rank223 && coded.spec.codec <= Codec::rank4) {
      const RankLayout layout(coded.spec.codec,
                              Grid(coded.spec.rows, coded.spec.columns, coded.spec.geometry));
      const bool counts = pick(3) == 0;
      from = counts ? layout.variable_at : pick(2) == 0 ? layout.offsets_at : layout.tables_at;
      count = counts ? 4 : 32;
    }
    if (from + count > bytes.size() || count == 0) return;
    bytes[from + pick(count)] = static_cast<std::uint8_t>(pick(256));
  }

  // A last block with plenty of variable part and counts of codes that it may really hold.
  void inflate(Coded& coded) {
    Bytes& bytes = coded.exponent;
    if (coded.spec.codec < Codec::rank223 || coded.spec.codec > Codec::rank4) return;
    const Grid grid(coded.spec.rows, coded.spec.columns, coded.spec.geometry);
    const RankLayout layout(coded.spec.codec, grid);
    if (bytes.size() < layout.variable_at + kGuardBytes) return;
    const std::size_t extra = pick(40000);
    bytes.insert(bytes.end() - kGuardBytes, extra, static_cast<std::uint8_t>(pick(2) * 255));
    bytes.shrink_to_fit();
    const auto end = static_cast<std::uint32_t>(bytes.size() - layout.variable_at - kGuardBytes);
    std::uint32_t begin;
    std::memcpy(&begin, bytes.data() + layout.offsets_at + 4 * (grid.blocks() - 1), sizeof begin);
    std::memcpy(bytes.data() + layout.offsets_at + 4 * grid.blocks(), &end, sizeof end);
    if (layout.variable_at + begin + 4 > bytes.size()) return;
    const auto counts =
        static_cast<std::uint32_t>(pick(65536) | (pick(3) == 0 ? pick(65536) << 16 : 0));
    std::memcpy(bytes.data() + layout.variable_at + begin, &counts, sizeof counts);
  }

  std::optional<Words> decoded(const Coded& coded, Isa isa) {
    Words out(coded.spec.rows * coded.spec.columns);
    try {
      decode(coded.spec, {coded.sign_mantissa, coded.exponent},
             {out.data(), static_cast<std::ptrdiff_t>(coded.spec.columns)}, isa);
    } catch (const CorruptError&) {
      return std::nullopt;
    }
    return out;
  }

  std::mt19937_64 random_;
};

}  // namespace
}  // namespace zipmoe

int main(int argc, char** argv) {
  const unsigned long rounds = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1000;
  zipmoe::Fuzzer fuzzer(argc > 2 ? static_cast<unsigned>(std::strtoul(argv[2], nullptr, 10)) : 1);
  for (unsigned long i = 0; i < rounds; ++i) fuzzer.round();
  std::printf("{\"rounds\": %lu, \"refused\": %lu, \"accepted\": %lu}\n", rounds, fuzzer.refused,
              fuzzer.accepted);
}
