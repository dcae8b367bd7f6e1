// The engine for Python. Tensors come as addresses: whoever calls has checked dtypes and shapes
// (zipmoe.linear, zipmoe.experts), and a conversion of each would take longer than a small product.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "bindings_cache.h"
#include "bindings_matrix.h"
#include "engine.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace zipmoe {
namespace {

Input input_of(Address data, std::int64_t stride, std::uint64_t count) {
  return {at<const std::uint16_t>(data), stride, count};
}

// `with engine.urgent():`
struct UrgentBlock {
  Engine& engine;
  std::unique_ptr<Engine::Urgent> held;
};

}  // namespace

void bind_engine(nb::module_& m) {
  nb::enum_<Gate>(m, "Gate")
      .value("silu", Gate::silu)
      .value("gelu", Gate::gelu)
      .value("gelu_tanh", Gate::gelu_tanh)
      .value("relu", Gate::relu)
      .value("relu2", Gate::relu2);

  nb::class_<HeldMatrix>(m, "PackedMatrix")
      .def(
          "__init__",
          [](HeldMatrix* self, const std::string& codec, std::pair<Extent, Extent> extents,
             std::uint64_t rows, std::uint64_t columns, std::uint32_t row_group,
             std::uint32_t k_tile) {
            const MatrixSpec spec{
                codec_from_name(codec), rows, columns, {row_group, k_tile}, sizeof(std::uint16_t)};
            const PackedMatrix matrix(spec, {bytes_of(extents.first), bytes_of(extents.second)});
            new (self) HeldMatrix{std::move(extents), matrix};
          },
          "codec"_a, "extents"_a, nb::kw_only(), "rows"_a, "columns"_a, "row_group"_a, "k_tile"_a)
      .def_prop_ro(
          "codec",
          [](const HeldMatrix& self) { return std::string(name(self.matrix.spec().codec)); })
      .def_prop_ro("rows", [](const HeldMatrix& self) { return self.matrix.rows(); })
      .def_prop_ro("columns", [](const HeldMatrix& self) { return self.matrix.columns(); })
      .def_prop_ro("nbytes",
                   [](const HeldMatrix& self) {
                     return self.arrays.first.size() + self.arrays.second.size();
                   })
      .def(
          "decode",
          [](const HeldMatrix& self, Address out) {
            const MatrixSpec& spec = self.matrix.spec();
            nb::gil_scoped_release release;
            decode(spec, {bytes_of(self.arrays.first), bytes_of(self.arrays.second)},
                   {at<void>(out), static_cast<std::ptrdiff_t>(spec.columns)}, best_isa());
          },
          "out"_a);

  nb::class_<UrgentBlock>(m, "UrgentBlock")
      .def("__enter__",
           [](UrgentBlock& self) {
             if (self.held) throw std::invalid_argument("an urgent block is entered once");
             self.held = self.engine.urgent();
           })
      .def("__exit__", [](UrgentBlock& self, const nb::args&) { self.held = nullptr; });

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, unsigned threads, const std::string& isa) {
            new (self) Engine(threads, isa.empty() ? best_isa() : isa_from_name(isa));
          },
          nb::kw_only(), "threads"_a = 0, "isa"_a = "")
      .def_prop_ro("isa", [](const Engine& self) { return std::string(name(self.isa())); })
      .def_prop_ro("threads", &Engine::num_threads)
      .def("counters",
           [](const Engine& self) {
             nb::dict named;
             named["calls"] = self.counters().calls;
             named["busy_ns"] = self.counters().busy_ns;
             named["groups"] = self.counters().groups;
             named["suspensions"] = self.counters().suspensions;
             return named;
           })
      .def(
          "urgent", [](Engine& self) { return UrgentBlock{self, nullptr}; }, nb::keep_alive<0, 1>())
      .def("record_routing", &Engine::record_routing, "is_on"_a)
      .def("take_routing",
           [](Engine& self) {
             nb::list taken;
             for (RoutingRecord& record : self.take_routing())
               taken.append(nb::make_tuple(record.layer, record.k, nb::cast(record.experts)));
             return taken;
           })
      .def(
          "read",
          [](Engine& self, const Extent& bytes) {
            nb::gil_scoped_release release;
            return self.read(bytes_of(bytes));
          },
          "data"_a)
      .def(
          "multiply",
          [](Engine& self, const HeldMatrix& matrix, Address x, std::int64_t x_stride,
             std::uint64_t count, Address bias, Address out, std::int64_t out_stride) {
            nb::gil_scoped_release release;
            self.multiply(matrix.matrix, input_of(x, x_stride, count),
                          at<const std::uint16_t>(bias), at<std::uint16_t>(out), out_stride);
          },
          "matrix"_a, "x"_a, "x_stride"_a, "count"_a, "bias"_a, "out"_a, "out_stride"_a)
      .def(
          "multiply_wide",
          [](Engine& self, const HeldMatrix& matrix, Address x, std::int64_t x_stride,
             std::uint64_t count, Address out, std::int64_t out_stride) {
            nb::gil_scoped_release release;
            self.multiply_wide(matrix.matrix, input_of(x, x_stride, count), at<float>(out),
                               out_stride);
          },
          "matrix"_a, "x"_a, "x_stride"_a, "count"_a, "out"_a, "out_stride"_a)
      .def(
          "gated",
          [](Engine& self, const HeldMatrix& gate, const HeldMatrix& up, const HeldMatrix& down,
             Gate kind, Address x, std::int64_t x_stride, std::uint64_t count, Address out,
             std::int64_t out_stride) {
            nb::gil_scoped_release release;
            self.gated({{&gate.matrix, &up.matrix, &down.matrix}, kind},
                       input_of(x, x_stride, count), at<std::uint16_t>(out), out_stride);
          },
          "gate"_a, "up"_a, "down"_a, "kind"_a, "x"_a, "x_stride"_a, "count"_a, "out"_a,
          "out_stride"_a)
      .def(
          "decode_rows",
          [](Engine& self, const HeldMatrix& matrix, Address rows, std::uint64_t count, Address out,
             std::int64_t out_stride) {
            nb::gil_scoped_release release;
            self.decode_rows(matrix.matrix, {at<const std::int64_t>(rows), count},
                             at<std::uint16_t>(out), out_stride);
          },
          "matrix"_a, "rows"_a, "count"_a, "out"_a, "out_stride"_a)
      .def(
          "experts",
          [](Engine& self, const CacheHandle& cache, std::uint64_t layer, Address experts,
             Address weights, std::uint64_t k, std::uint64_t num_experts, Gate kind, Address x,
             std::int64_t x_stride, std::uint64_t count, Address out, std::int64_t out_stride) {
            const Routing routing{at<const std::int64_t>(experts), at<const float>(weights), k,
                                  num_experts};
            nb::gil_scoped_release release;
            self.experts(*cache.get(), layer, routing, kind, input_of(x, x_stride, count),
                         at<std::uint16_t>(out), out_stride);
          },
          "cache"_a, "layer"_a, "experts"_a, "weights"_a, "k"_a, "num_experts"_a, "kind"_a, "x"_a,
          "x_stride"_a, "count"_a, "out"_a, "out_stride"_a)
      .def(
          "multiply_expert",
          [](Engine& self, const CacheHandle& cache, std::uint64_t layer, std::uint64_t expert,
             std::uint64_t matrix, Address x, std::int64_t x_stride, std::uint64_t count,
             Address out, std::int64_t out_stride) {
            nb::gil_scoped_release release;
            self.multiply_expert(*cache.get(), layer, expert, matrix, input_of(x, x_stride, count),
                                 at<std::uint16_t>(out), out_stride);
          },
          "cache"_a, "layer"_a, "expert"_a, "matrix"_a, "x"_a, "x_stride"_a, "count"_a, "out"_a,
          "out_stride"_a);
  m.def("set_num_threads", &set_num_threads, "threads"_a);
}

}  // namespace zipmoe
