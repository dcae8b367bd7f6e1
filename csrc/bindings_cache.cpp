// The expert cache for Python.
#include "bindings_cache.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "read_meter.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace zipmoe {
namespace {

using Table = nb::ndarray<const std::uint64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using Experts = std::vector<std::uint64_t>;
using Counts = std::array<std::uint64_t, 4>;  // full, compressed, sign-mantissa, exponents

std::span<const std::uint64_t> numbers_of(const Table& table) {
  if (table.shape(1) != kTableColumns)
    throw std::invalid_argument("matrices: the table must have 16 columns");
  return {table.data(), table.size()};
}

void decode_into(const CacheHandle& cache, std::uint64_t layer, std::uint64_t expert,
                 std::uint64_t matrix, const Out& out) {
  const MatrixSpec& spec = cache->spec(layer, expert, matrix);
  if (out.shape(0) != spec.rows || out.shape(1) != spec.columns)
    throw std::invalid_argument("out: the matrix is " + std::to_string(spec.rows) + " x " +
                                std::to_string(spec.columns));
  if (out.itemsize() != spec.element_bytes)
    throw std::invalid_argument("out: its elements must have " +
                                std::to_string(spec.element_bytes) + " bytes");
  if (out.size() != 0 && out.shape(1) > 1 && out.stride(1) != 1)
    throw std::invalid_argument("out: the columns must be contiguous");
  const auto columns = static_cast<std::int64_t>(spec.columns);
  if (out.size() != 0 && out.shape(0) > 1 && out.stride(0) < columns)
    throw std::invalid_argument("out: the rows must not overlap or run backwards");
  const Target target{out.data(), out.stride(0)};
  nb::gil_scoped_release release;
  cache->decode(layer, expert, matrix, target);
}

nb::dict counters_of(const CacheHandle& cache) {
  const CacheCounters counters = cache->counters();
  nb::dict named;
  const std::uint64_t full = counters.found(Tier::full), whole = counters.found(Tier::compressed);
  const std::uint64_t first = counters.found(Tier::sign_mantissa);
  const std::uint64_t second = counters.found(Tier::exponents);
  named["hits"] = full + whole;
  named["misses"] = first + second + counters.found(Tier::absent);
  named["full_hits"] = full;
  named["sign_mantissa_hits"] = first;
  named["exponent_hits"] = second;
  named["bytes_read"] = counters.bytes_read;
  named["evictions"] = counters.evictions;
  named["demotions"] = counters.demotions;
  named["promotions"] = counters.promotions;
  named["read_errors"] = counters.read_errors;
  named["wait_ns"] = counters.wait_ns;
  named["decode_ns"] = counters.decode_ns;
  named["ahead_reads"] = counters.ahead_reads;
  named["ahead_used"] = counters.ahead_used;
  named["ahead_wasted"] = counters.ahead_wasted;
  return named;
}

}  // namespace

void bind_cache(nb::module_& m) {
  m.def(
      "measure_reads",
      [](const std::string& path, const std::string& reader, std::size_t request_bytes,
         unsigned depth, std::size_t record_bytes, double seconds) {
        nb::gil_scoped_release release;
        return measure_reads(path, reader_choice(reader), {request_bytes, depth}, record_bytes,
                             seconds);
      },
      "path"_a, nb::kw_only(), "reader"_a, "request_bytes"_a, "depth"_a, "record_bytes"_a,
      "seconds"_a);
  nb::class_<CacheHandle>(m, "ExpertCache")
      .def(
          "__init__",
          [](CacheHandle* self, std::vector<std::string> paths, const Table& matrices,
             std::uint64_t capacity_bytes, std::uint64_t limit_bytes, std::string reader,
             std::string isa, std::string policy, std::size_t request_bytes, unsigned depth,
             const std::optional<Counts>& tiers) {
            CacheOptions options{.capacity_bytes = capacity_bytes,
                                 .limit_bytes = limit_bytes,
                                 .reader = std::move(reader),
                                 .isa = std::move(isa),
                                 .policy = std::move(policy)};
            if (tiers) options.tiers = {(*tiers)[0], (*tiers)[1], (*tiers)[2], (*tiers)[3]};
            if (request_bytes != 0) options.shape = {request_bytes, depth};
            new (self) CacheHandle(std::move(paths), numbers_of(matrices), options);
          },
          "paths"_a, "matrices"_a, nb::kw_only(), "capacity_bytes"_a, "limit_bytes"_a = 0,
          "reader"_a = "", "isa"_a = "", "policy"_a = "", "request_bytes"_a = 0, "depth"_a = 0,
          "tiers"_a = nb::none())
      .def_static(
          "floor_bytes",
          [](const Table& matrices) { return ExpertCache::floor_bytes(numbers_of(matrices)); },
          "matrices"_a)
      .def_static(
          "needed_bytes",
          [](const Table& matrices, const Counts& tiers) {
            const TierCounts counts{tiers[0], tiers[1], tiers[2], tiers[3]};
            const ExpertTable table(numbers_of(matrices), {});
            return SlotLayout(table, std::numeric_limits<std::uint64_t>::max(), counts)
                .allocated_bytes();
          },
          "matrices"_a, "tiers"_a)
      .def_static(
          "tier_bytes",
          [](const Table& matrices) {
            return SlotLayout::tier_bytes(ExpertTable(numbers_of(matrices), {}));
          },
          "matrices"_a)
      .def_prop_ro("reader", [](const CacheHandle& self) { return self->reader_name(); })
      .def_prop_ro("isa", [](const CacheHandle& self) { return std::string(name(self->isa())); })
      .def_prop_ro("policy", [](const CacheHandle& self) { return self->policy_name(); })
      .def_prop_ro("slots", [](const CacheHandle& self) { return self->num_slots(); })
      .def_prop_ro("tiers",
                   [](const CacheHandle& self) {
                     const TierCounts held = self->tiers();
                     return Counts{held.full, held.compressed, held.sign_mantissa, held.exponents};
                   })
      .def_prop_ro("held",
                   [](const CacheHandle& self) {
                     nb::gil_scoped_release release;
                     return self->held();
                   })
      .def_prop_ro("allocated_bytes",
                   [](const CacheHandle& self) {
                     nb::gil_scoped_release release;
                     return self->allocated_bytes();
                   })
      .def_prop_ro("filled_bytes",
                   [](const CacheHandle& self) {
                     nb::gil_scoped_release release;
                     return self->filled_bytes();
                   })
      .def(
          "prefetch",
          [](const CacheHandle& self, std::uint64_t layer, const Experts& experts,
             const std::vector<std::uint32_t>& tokens, std::uint64_t num_tokens) {
            if (!tokens.empty() && tokens.size() != experts.size())
              throw std::invalid_argument("tokens: one number for each expert");
            nb::gil_scoped_release release;
            self->prefetch(layer, experts, tokens, num_tokens);
          },
          "layer"_a, "experts"_a, "tokens"_a = std::vector<std::uint32_t>(), "num_tokens"_a = 1)
      .def(
          "begin_request",
          [](const CacheHandle& self, double share) {
            nb::gil_scoped_release release;
            self->begin_request(share);
          },
          "share"_a = 1.0)
      .def(
          "look_ahead",
          [](const CacheHandle& self, std::uint64_t layer, const Experts& experts) {
            nb::gil_scoped_release release;
            self->look_ahead(layer, experts);
          },
          "layer"_a, "experts"_a)
      .def(
          "limit",
          [](const CacheHandle& self, std::uint64_t most) {
            nb::gil_scoped_release release;
            return self->limit(most);
          },
          "most"_a)
      .def("decode", &decode_into, "layer"_a, "expert"_a, "matrix"_a, "out"_a.noconvert())
      .def("counters", &counters_of)
      .def("close", [](const CacheHandle& self) {
        nb::gil_scoped_release release;
        self->close();
      });
}

}  // namespace zipmoe
