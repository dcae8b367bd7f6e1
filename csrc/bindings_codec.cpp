// Geometry, checksum, encode and decode for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "codec.h"
#include "rank_layout.h"
#include "xxh3.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace zipmoe {
namespace {

using Weights = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::device::cpu>;
using Out = nb::ndarray<std::uint16_t, nb::ndim<2>, nb::device::cpu>;
using Extent = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ExtentOut = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;

Isa isa_or_best(const std::string& wanted) {
  return wanted.empty() ? best_isa() : isa_from_name(wanted);
}

// A contiguous buffer of any Python object, held while in scope.
class View {
 public:
  explicit View(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  ~View() { PyBuffer_Release(&view_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  std::span<const std::uint8_t> bytes() const {
    return {static_cast<const std::uint8_t*>(view_.buf), static_cast<std::size_t>(view_.len)};
  }

 private:
  Py_buffer view_{};
};

std::uint64_t xxh3_of(nb::handle data) {
  const View view(data);
  nb::gil_scoped_release release;
  return xxh3(view.bytes());
}

// An array that keeps the Encoded it is a part of alive.
ExtentOut extent_array(nb::handle owner, const Buffer& buffer) {
  const std::size_t shape[] = {buffer.size()};
  return ExtentOut(const_cast<std::uint8_t*>(buffer.data()), 1, shape, owner);
}

Encoded encode_matrix(const std::string& codec, const Weights& weights, EncodeOptions options,
                      const std::string& isa) {
  options.codec = codec_from_name(codec);
  options.isa = isa_or_best(isa);
  const Source source{weights.data(), weights.shape(0), weights.shape(1), weights.stride(0),
                      weights.stride(1)};
  nb::gil_scoped_release release;
  return encode(source, options);
}

std::span<const std::uint8_t> bytes_of(const Extent& extent) {
  return {extent.data(), extent.size()};
}

void decode_matrix(const MatrixSpec& spec, const std::pair<Extent, Extent>& extents, const Out& out,
                   unsigned threads, const std::string& isa) {
  if (out.size() != 0 && out.shape(1) > 1 && out.stride(1) != 1)
    throw std::invalid_argument("out: the columns must be contiguous");
  const Isa engaged = isa_or_best(isa);
  const Target target{out.data(), out.stride(0)};
  nb::gil_scoped_release release;
  decode(spec, {bytes_of(extents.first), bytes_of(extents.second)}, target, engaged, threads);
}

}  // namespace

void bind_codec(nb::module_& m) {
  m.def(
      "geometry",
      [](std::uint64_t rows, std::uint64_t columns) {
        const Geometry chosen = choose_geometry(rows, columns);
        return std::pair(chosen.row_group, chosen.k_tile);
      },
      "rows"_a, "columns"_a);
  m.def(
      "rank_layout",
      [](const std::string& codec, std::uint64_t rows, std::uint64_t columns,
         std::uint32_t row_group, std::uint32_t k_tile) {
        const RankLayout layout(codec_from_name(codec), Grid(rows, columns, {row_group, k_tile}));
        return std::tuple(layout.code_bits, layout.table_bytes, layout.tables_at, layout.offsets_at,
                          layout.variable_at);
      },
      "codec"_a, "rows"_a, "columns"_a, nb::kw_only(), "row_group"_a, "k_tile"_a);
  m.def("xxh3", &xxh3_of, "data"_a);

  nb::class_<Encoded>(m, "Encoded")
      .def_prop_ro("codec", [](const Encoded& self) { return std::string(name(self.codec)); })
      .def_prop_ro("row_group", [](const Encoded& self) { return self.geometry.row_group; })
      .def_prop_ro("k_tile", [](const Encoded& self) { return self.geometry.k_tile; })
      .def_prop_ro("extents", [](nb::handle_t<Encoded> self) {
        const Encoded& encoded = nb::cast<const Encoded&>(self);
        return nb::make_tuple(extent_array(self, encoded.sign_mantissa),
                              extent_array(self, encoded.exponent));
      });

  m.def(
      "encode",
      [](const std::string& codec, const Weights& weights, std::uint32_t row_group,
         std::uint32_t k_tile, unsigned shards, unsigned threads, const std::string& isa,
         bool allow_raw, std::uint32_t scale_group) {
        EncodeOptions options;
        options.geometry = {row_group, k_tile};
        options.shards = shards;
        options.threads = threads;
        options.allow_raw = allow_raw;
        options.scale_group = scale_group;
        return encode_matrix(codec, weights, options, isa);
      },
      "codec"_a, "weights"_a, nb::kw_only(), "row_group"_a = 0, "k_tile"_a = 0, "shards"_a = 3,
      "threads"_a = 1, "isa"_a = "", "allow_raw"_a = true, "scale_group"_a = 64);
  m.def(
      "decode",
      [](const std::string& codec, const std::pair<Extent, Extent>& extents, const Out& out,
         std::uint32_t row_group, std::uint32_t k_tile, unsigned threads, const std::string& isa) {
        const MatrixSpec spec{codec_from_name(codec),
                              out.shape(0),
                              out.shape(1),
                              {row_group, k_tile},
                              sizeof(std::uint16_t)};
        decode_matrix(spec, extents, out, threads, isa);
      },
      "codec"_a, "extents"_a, "out"_a, nb::kw_only(), "row_group"_a, "k_tile"_a, "threads"_a = 1,
      "isa"_a = "");
}

}  // namespace zipmoe
